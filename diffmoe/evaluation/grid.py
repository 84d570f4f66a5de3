"""Sample grids as PNG files."""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

SMALLEST_SIDE = 48
"""Images below this many pixels are enlarged by a whole factor, so that a person can see them."""

GAP = 4
"""Black pixels on each side of an image."""


IMAGES_A_CLASS = 10


def save_class_grid(path: Path, images: Tensor, labels: Tensor) -> None:
    """Write one row a class, with the first images of each."""
    rows = [images[labels == label][:IMAGES_A_CLASS] for label in labels.unique()]
    save_grid(path, torch.cat([row for row in rows if len(row) == IMAGES_A_CLASS] or rows), columns=IMAGES_A_CLASS)


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write uint8 images (N, C, H, W), C 1 or 3, row by row; missing ones of the last row stay black."""
    factor = -(-SMALLEST_SIDE // images.shape[-1])
    images = images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    images = torch.nn.functional.pad(images, (GAP, GAP, GAP, GAP))
    missing = -len(images) % columns
    images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
    pixels = rearrange(images, "(r q) c h w -> (r h) (q w) c", q=columns)
    Image.fromarray(pixels.squeeze(-1).numpy() if images.shape[1] == 1 else pixels.numpy()).save(path)
