"""A data set of latents on disk, drawn from anew each step.

The folder holds what `diffmoe.data.latents` wrote:

    manifest.json      the autoencoder, the size, the classes, and each shard's images and SHA-256
    labels.npy         int64 (N,)
    shard-00000.npy    float32 (n, flips, 2, C, h, w): mean and log-variance of n images, each also mirrored

Shards are memory-mapped; a step's rows are read ahead by a thread, into pinned memory where a GPU takes them.
float32, since half precision would round a mean by more than the standard deviation of its latent.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffmoe.config import ConfigError, DataConfig, require
from diffmoe.data.images import draw_flips, to_pixels
from diffmoe.models.vae import load_vae

LATENTS = "latents"
"""The data set's `data.name`."""
MANIFEST, LABELS = "manifest.json", "labels.npy"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of latents holds."""

    vae: dict[str, Any]
    """`name`, `digest`, `scale`, `shift` of the autoencoder."""
    image_size: int
    """Pixels a side of the images that were encoded."""
    shape: tuple[int, int, int]
    """(C, h, w) of a latent."""
    flips: bool
    """Whether each image is there mirrored, too."""
    classes: list[str]
    """Names of the class folders, in the order of their labels."""
    shards: list[dict[str, Any]]
    """`file`, `images`, `sha256`."""
    labels_sha256: str
    skipped: list[str]
    """Broken images that were left out, by path below the root."""
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """Return 12 hex digits that name the content: latents, labels, and what they are scaled by."""
        content = [[shard["sha256"] for shard in self.shards], self.labels_sha256, list(self.shape), len(self.classes),
                   self.vae["scale"], self.vae["shift"]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder of latents.

    Raises:
        ConfigError: when there is none, or it is of another format.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        if content.get("format") != FORMAT:
            raise ValueError(f"format {content.get('format')}, this version reads {FORMAT}")
        return Manifest(**content | {"shape": tuple(content["shape"])})
    except FileNotFoundError:
        raise ConfigError(f"data.path={folder}: holds no {MANIFEST}; make or finish it with python -m "
                          f"diffmoe.data.latents --images DIR --vae NAME --out {folder}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: not a manifest of latents ({error})") from None


def load_latents(config: DataConfig) -> LatentData:
    """Open the latents in `data.path`.

    Raises:
        ConfigError: when something is missing, damaged, or not there mirrored though `data.horizontal_flip` is set.
    """
    require(config.path is not None, "data.path", config.path,
            "data.name=latents needs the folder that python -m diffmoe.data.latents wrote")
    data = LatentData(Path(config.path).expanduser(), config.name)
    require(data.manifest.flips or not config.horizontal_flip, "data.horizontal_flip", config.horizontal_flip,
            f"{config.path} holds no mirrored images; make it without --no-flips")
    return data


def load_decoder(config: DataConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return what turns the model's output (B, C, h, w) into uint8 images: the latents' autoencoder, or rounding.

    Raises:
        ConfigError: when no autoencoder is known, or it is not the one that encoded the latents in `data.path`.
    """
    if config.name != LATENTS:
        return to_pixels
    folder = None if config.path is None else Path(config.path).expanduser()
    manifest = read_manifest(folder) if folder and (folder / MANIFEST).exists() else None
    name = config.vae or (manifest and manifest.vae["name"])
    require(name is not None, "data.vae", name, "name the autoencoder that decodes the latents")
    vae = load_vae(name, device)
    encoder = vae.digest if manifest is None else manifest.vae["digest"]
    require(vae.digest == encoder, "data.vae", name,
            f"its weights ({vae.digest}) are not those that encoded {config.path} ({encoder})")
    return vae.decode


class LatentData:
    """Labelled latents, as `TrainingData`: z = mean + exp(logvar / 2) eps, with another eps each time.

    Args:
        folder: where they lie.
        name: of the data set.

    Raises:
        ConfigError: when a file is missing or of another size than the manifest says.
    """

    def __init__(self, folder: Path, name: str = LATENTS) -> None:
        self.folder, self.name = folder, name
        self.manifest = read_manifest(folder)
        self.shards = [self._open(shard) for shard in self.manifest.shards]
        self.ends = list(accumulate(len(shard) for shard in self.shards))
        self.labels = torch.from_numpy(self._load(LABELS))
        require(len(self.shards) > 0 and len(self.labels) == self.ends[-1], "data.path", folder,
                f"its {LABELS} does not fit its shards; remove {MANIFEST} and run diffmoe.data.latents again")
        self.num_classes = len(self.manifest.classes)
        self.device = torch.device("cpu")
        self.reader: ThreadPoolExecutor | None = None
        self.ahead: tuple[Tensor, Future[Tensor]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # another process maps the files itself
        return LatentData, (self.folder, self.name)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (C, h, w)."""
        return self.manifest.shape

    @property
    def digest(self) -> str:
        """Return the manifest's digest."""
        return self.manifest.digest

    def to(self, device: torch.device) -> LatentData:
        """Return the same latents, drawn on `device`; what is stored stays on disk."""
        data = LatentData(self.folder, self.name)
        data.labels, data.device = self.labels.to(device), device
        return data

    def draw(self, index: Tensor, rows: slice, *, flip: bool, generator: torch.Generator) -> Tensor:
        """Return latents (z - shift) * scale, as `TrainingData.draw` says."""
        moments = self._moments(index[rows]).to(self.device, non_blocking=True)  # (b, flips, 2, C, h, w)
        noise = torch.randn(len(index), *self.shape, generator=generator, device=self.device)[rows]
        chosen = moments[:, 0]
        if flip:
            flipped = draw_flips(len(index), generator)[rows]
            chosen = torch.where(flipped[:, None, None, None, None], moments[:, 1], chosen)
        mean, logvar = chosen.unbind(1)
        return (mean + (logvar / 2).exp() * noise - self.manifest.vae["shift"]) * self.manifest.vae["scale"]

    def prefetch(self, index: Tensor) -> None:
        """Read rows in a thread."""
        if self.reader is None:
            self.reader = ThreadPoolExecutor(1, thread_name_prefix="latents")
        self.ahead = index, self.reader.submit(self._read, index)

    def _moments(self, index: Tensor) -> Tensor:
        if self.ahead is not None and torch.equal(self.ahead[0], index):
            return self.ahead[1].result()
        return self._read(index)

    def _read(self, index: Tensor) -> Tensor:
        """Return stored rows, float32 (b, flips, 2, C, h, w), pinned for a GPU."""
        rows = torch.empty(len(index), *self.shards[0].shape[1:], pin_memory=self.device.type == "cuda")
        target = rows.numpy()
        for place, number in enumerate(index.tolist()):
            shard = bisect_right(self.ends, number)
            target[place] = self.shards[shard][number - self.ends[shard]]  # from the end: negative
        return rows

    def _open(self, shard: dict[str, Any]) -> np.ndarray:
        content = self._load(shard["file"], mapped=True)
        want = (shard["images"], 1 + self.manifest.flips, 2, *self.shape)
        if content.shape != want or content.dtype != np.float32:
            raise ConfigError(f"{self.folder / shard['file']}: {content.dtype} {content.shape}, the manifest has "
                              f"float32 {want}; remove it and {MANIFEST}, and run diffmoe.data.latents again")
        return content

    def _load(self, name: str, *, mapped: bool = False) -> np.ndarray:
        try:
            return np.load(self.folder / name, mmap_mode="r" if mapped else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(f"{self.folder / name}: missing or cut off ({error}); remove {MANIFEST} and run "
                              "diffmoe.data.latents again") from None


def check_latents(folder: Path) -> Manifest:
    """Read every byte of a folder of latents and compare it with the checksums.

    Raises:
        ConfigError: for the first file that is not as it was written.
    """
    manifest = read_manifest(folder)
    files = [(shard["file"], shard["sha256"]) for shard in manifest.shards]
    for name, expected in [*files, (LABELS, manifest.labels_sha256)]:
        try:
            found = sha256(folder / name)
        except OSError as error:
            raise ConfigError(f"{folder / name}: cannot be read ({error.strerror})") from None
        if found != expected:
            raise ConfigError(f"{folder / name}: damaged (another SHA-256 than in {MANIFEST}); remove it and "
                              f"{MANIFEST}, and run diffmoe.data.latents again")
    return manifest


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
