"""Samples as PNG files, in grids and one by one, and the example images that a record holds."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

SMALLEST_SIDE = 48
"""Images below this many pixels are enlarged by a whole factor, so that a person can see them."""

GAP = 4
"""Black pixels on each side of an image."""

IMAGES_A_CLASS, MOST_GRID_CLASSES = 10, 10
EXAMPLES_A_CLASS, MOST_EXAMPLE_CLASSES, LARGEST_EXAMPLE = 2, 10, 64
"""Examples of a record: some 100 kB at 32x32 pixels, none above 64x64."""


def save_class_grid(path: Path, images: Tensor, labels: Tensor) -> None:
    """Write one row a class, of the first classes, with the first images of each."""
    rows = [images[labels == label][:IMAGES_A_CLASS] for label in labels.unique()[:MOST_GRID_CLASSES]]
    save_grid(path, torch.cat([row for row in rows if len(row) == IMAGES_A_CLASS] or rows), columns=IMAGES_A_CLASS)


def grid_seeds(num_classes: int) -> list[int]:
    """Return the seeds of the images that a grid shows: a seed's class is its remainder."""
    return [label + num_classes * index for index in range(IMAGES_A_CLASS)
            for label in range(min(num_classes, MOST_GRID_CLASSES))]


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write uint8 images (N, C, H, W), C 1 or 3, row by row; missing ones of the last row stay black."""
    factor = -(-SMALLEST_SIDE // images.shape[-1])
    images = images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    images = torch.nn.functional.pad(images, (GAP, GAP, GAP, GAP))
    missing = -len(images) % columns
    images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
    pixels = rearrange(images, "(r q) c h w -> (r h) (q w) c", q=columns)
    _to_picture(pixels).save(path)


def save_each(folder: Path, images: Tensor, seeds: Sequence[int]) -> None:
    """Write each of uint8 images (N, C, H, W), C 1 or 3, to a file named by its seed, at its own size."""
    for seed, pixels in zip(seeds, rearrange(images, "n c h w -> n h w c"), strict=True):
        _to_picture(pixels).save(folder / f"{seed:06d}.png")


def _to_picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.squeeze(-1).numpy() if pixels.shape[-1] == 1 else pixels.numpy())


def examples(images: Tensor, labels: Tensor, token_load: Tensor | None) -> dict[str, Any]:
    """Return the first images of the first classes as a record holds them, class by class.

    Args:
        images: uint8 (N, C, H, W); nothing is returned for large ones, or unless C is 1 or 3.
        labels: (N,).
        token_load: (N, T) experts of each token, or None for a dense model.

    Returns:
        `labels` [n], `images` (base64 of a lossless PNG, the images side by side) and `token_load` [n][T].
    """
    if images.shape[1] not in (1, 3) or images.shape[-1] > LARGEST_EXAMPLE:
        return {}
    classes = labels.unique()[:MOST_EXAMPLE_CLASSES]
    chosen = torch.cat([(labels == label).nonzero().flatten()[:EXAMPLES_A_CLASS] for label in classes])
    strip = rearrange(images[chosen], "n c h w -> h (n w) c")
    file = io.BytesIO()
    _to_picture(strip).save(file, "PNG", optimize=True)
    found = {"labels": labels[chosen].tolist(), "images": base64.b64encode(file.getvalue()).decode()}
    if token_load is not None:
        found["token_load"] = token_load[chosen].double().round(decimals=4).tolist()
    return found


def decode_examples(found: dict[str, Any]) -> np.ndarray:
    """Return the images of a record's examples, uint8 (n, H, W) or (n, H, W, 3)."""
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["images"]))))
    return np.stack(np.split(strip, len(found["labels"]), axis=1))
