"""From any decoded image to the model's pixels: one mode, one size, 8 bits.

Conversions are PIL's, with these rules where PIL leaves a choice:

- grey images are repeated over RGB; RGB becomes grey by PIL's weights (ITU-R 601-2);
- 16 bits keep their upper 8 (PIL itself clips grey at 255), for grey as for RGB;
- a palette is looked up; transparency is dropped, and the colour below it counts;
- CMYK becomes RGB without a colour profile; profiles and EXIF orientation are not applied;
- of an animation the first frame counts.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffmoe.config import ConfigError, require

MODES = {1: "L", 3: "RGB"}


class ImageShape(Protocol):
    """What images are made for: a ModelConfig, or anything else of a size."""

    in_channels: int
    input_size: int


def require_image_channels(model: ImageShape) -> None:
    """Raise ConfigError unless the model takes grey or RGB images."""
    require(model.in_channels in MODES, "model.in_channels", model.in_channels,
            "images have 1 channel (grey) or 3 (RGB)")


def convert_image(image: Image.Image, model: ImageShape, *, resize: bool, source: object) -> np.ndarray:
    """Return the pixels that `model` takes, uint8 (C, H, W).

    Args:
        image: may still be undecoded: a size that is refused is refused before decoding.
        model: its in_channels (1 or 3) and input_size rule.
        resize: scale and crop an image of another size instead of refusing it.
        source: names the image in errors.

    Raises:
        ConfigError: for an image of another size without `resize`, or too long and thin to scale.
    """
    size = model.input_size
    width, height = image.size
    if (width, height) != (size, size):
        if not resize:
            raise ConfigError(f"{source}: {width}x{height} pixels, but model.input_size={size} takes {size}x{size}; "
                              "set data.resize=true to scale and crop every image")
        if size * size * max(width, height) > min(width, height) * Image.MAX_IMAGE_PIXELS:
            raise ConfigError(f"{source}: {width}x{height} pixels is too long and thin to scale to {size}; remove it")
    image = _to_mode(image, MODES[model.in_channels])
    if image.size != (size, size):
        image = centre_crop(image, size)
    return np.asarray(image).reshape(size, size, model.in_channels).transpose(2, 0, 1)


def convert_arrays(images: np.ndarray, model: ImageShape, *, resize: bool, source: object) -> Tensor:
    """Return uint8 (N, H, W) grey or (N, H, W, 3) RGB images as `model` takes them, (N, C, H, W).

    Raises:
        ConfigError: as `convert_image`.
    """
    size = model.input_size
    channels = 1 if images.ndim == 3 else images.shape[-1]
    if (*images.shape[1:3], channels) == (size, size, model.in_channels):
        return torch.from_numpy(images).reshape(-1, size, size, channels).permute(0, 3, 1, 2).contiguous()
    return torch.from_numpy(np.stack([
        convert_image(Image.fromarray(pixels), model, resize=resize, source=f"{source}, image {index}")
        for index, pixels in enumerate(images)]))


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the short side to `size` and cut the centre square, as ADM does (guided-diffusion, center_crop_arr).

    Halves with a box filter while the short side is at least 2 `size`, then one bicubic step.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":  # straight to RGB, PIL warns of transparency
        image = image.convert("RGBA")
    return image.convert(mode)
