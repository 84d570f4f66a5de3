"""What training draws from: images in memory, and the order in which they are seen."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor


class TrainingData(Protocol):
    """Labelled images or latents of one size."""

    name: str
    labels: Tensor
    """int64 (N,)."""
    num_classes: int

    @property
    def digest(self) -> str:
        """Return 12 hex digits that name the content."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (C, H, W)."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> Self:
        """Return the same data with what is drawn, and the labels, on `device`."""

    def draw(self, index: Tensor, rows: slice, *, flip: bool, generator: torch.Generator) -> Tensor:
        """Return inputs of the model, float32 (b, C, H, W), for `rows` of the batch `index` (int64 (B,), on the CPU).

        The generator is moved on by the whole batch, so that a row does not depend on the rows drawn beside it.

        Args:
            flip: mirror half of them at random.
        """

    def prefetch(self, index: Tensor) -> None:
        """Begin to read the rows `index` (int64 (b,)), which the next `draw` will want."""


@dataclass(frozen=True)
class ImageData:
    """Labelled images of one size, held in memory."""

    name: str
    images: Tensor
    """uint8 (N, C, H, W)."""
    labels: Tensor
    """int64 (N,)."""
    num_classes: int

    @functools.cached_property
    def digest(self) -> str:
        """Return 12 hex digits that name the content: shape, pixels and labels."""
        content = hashlib.sha256(repr((tuple(self.images.shape), self.num_classes)).encode())
        for tensor in (self.images, self.labels):
            content.update(tensor.cpu().contiguous().numpy().tobytes())
        return content.hexdigest()[:12]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (C, H, W)."""
        return tuple(self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> ImageData:
        """Return the same images on `device`."""
        return ImageData(self.name, self.images.to(device), self.labels.to(device), self.num_classes)

    def draw(self, index: Tensor, rows: slice, *, flip: bool, generator: torch.Generator) -> Tensor:
        """Return images in [-1, 1], as `TrainingData.draw` says."""
        images = to_model_range(self.images[send(index[rows], self.images.device)])
        if not flip:
            return images
        flipped = draw_flips(len(index), generator)[rows]
        return torch.where(flipped[:, None, None, None], images.flip(-1), images)

    def prefetch(self, index: Tensor) -> None:
        """Do nothing: the images are there."""


def send(values: Tensor, device: torch.device) -> Tensor:
    """Return what lies on the host on `device`; from memory that is not pinned, torch would wait for all GPU work."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def to_model_range(images: Tensor) -> Tensor:
    """Map uint8 pixels to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Map [-1, 1] to uint8, clipping and rounding."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def draw_flips(count: int, generator: torch.Generator) -> Tensor:
    """Draw which of `count` images are mirrored: bool (count,), each with probability 1/2."""
    return torch.rand(count, generator=generator, device=generator.device) < 0.5


class ImageOrder:
    """The endless sequence of image indices of one run: a new permutation each epoch.

    Args:
        num_images: images in the data set.
        seed: the run's seed; the n-th index depends on (num_images, seed, n) alone.
    """

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images = num_images
        self.seed = seed
        self._permutation = functools.lru_cache(maxsize=2)(self._make_permutation)

    def indices(self, start: int, count: int) -> Tensor:
        """Return the indices of images number `start` to `start + count` of the run, int64 (count,)."""
        parts = []
        while count > 0:
            epoch, position = divmod(start, self.num_images)
            part = self._permutation(epoch)[position : position + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(parts)

    def _make_permutation(self, epoch: int) -> Tensor:
        return torch.randperm(self.num_images, generator=seeded_generator("order", self.seed, epoch))


def seeded_generator(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose stream depends on `key` alone."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")
    return torch.Generator(device).manual_seed(seed)
