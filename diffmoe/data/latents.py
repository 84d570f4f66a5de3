"""Encode an image folder into latents, once, for training on them.

    python -m diffmoe.data.latents --images imagenet/train --vae stabilityai/sd-vae-ft-mse --out latents
    torchrun --nproc-per-node 8 -m diffmoe.data.latents ...       a GPU each
    python -m diffmoe.data.latents ... --shard 2/16               the third of sixteen jobs, on any machine
    python -m diffmoe.data.latents --check latents                compare every byte with its checksum

Images are cut by ADM's centre crop and encoded as they are and mirrored; mean and log-variance are kept, not one sample
(latent_data.py has the layout). Interrupted, the same command goes on after the last finished shard; whoever finishes
the last one writes the manifest, without which nothing trains. ImageNet takes 84 GB (4x32x32 latents, mirrored too).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffmoe.cli import LOGGED_EVERY_S, choose_device, run_command
from diffmoe.config import ConfigError, require
from diffmoe.data.folder import decode_image, find_classes
from diffmoe.data.latent_data import LABELS, MANIFEST, Manifest, check_latents, read_manifest, sha256
from diffmoe.models.vae import Vae, load_vae
from diffmoe.training.checkpoint import write_whole

File = tuple[Path, int]
"""An image and its label."""


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """The images that are encoded, as decoding asks for them."""

    input_size: int
    in_channels: int = 3


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encodes shards of an image folder; equal ones in several processes share the work."""

    root: Path
    out: Path
    vae: Vae
    pixels: Pixels
    flips: bool
    skip_broken: bool
    shard_size: int
    batch_size: int
    say: Callable[[str], None]
    """Told of each broken image that is left out."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (C, h, w) of a latent."""
        side = self.pixels.input_size // self.vae.factor
        return self.vae.channels, side, side

    def shards(self, classes: dict[str, list[Path]]) -> list[list[File]]:
        """Return the files and labels of each shard."""
        files = [(path, label) for label, paths in enumerate(classes.values()) for path in paths]
        return [files[start : start + self.shard_size] for start in range(0, len(files), self.shard_size)]

    def finished(self, number: int, files: list[File]) -> dict[str, Any] | None:
        """Return what is known of a shard that is there and was made from the same files in the same way."""
        path = self._path(number)
        try:
            known = json.loads(path.with_suffix(".json").read_text())
            same = known["plan"] == self._plan(files) and known["bytes"] == path.stat().st_size
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return known if same else None

    def encode_shard(self, number: int, files: list[File], progress: Callable[[int], object]) -> None:
        """Encode and write a shard, then what is known of it.

        Raises:
            ConfigError: for a broken image, naming it, unless they are skipped; or a folder that cannot be written.
        """
        moments, labels, skipped = [], [], []
        for images, batch in self._decoded(files):
            kept = [(image, label) for image, (_, label) in zip(images, batch, strict=True) if image is not None]
            skipped += [str(path.relative_to(self.root)) for image, (path, _) in zip(images, batch, strict=True)
                        if image is None]
            if kept:
                moments.append(self._encode(torch.from_numpy(np.stack([image for image, _ in kept]))).numpy())
                labels += [label for _, label in kept]
            progress(len(batch))
        path = self._path(number)
        write_array(path, np.concatenate([np.empty((0, 1 + self.flips, 2, *self.shape), np.float32), *moments]))
        known = {"plan": self._plan(files), "bytes": path.stat().st_size, "sha256": sha256(path), "labels": labels,
                 "skipped": skipped}
        write_whole(path.with_suffix(".json"), lambda aside: aside.write_text(json.dumps(known)))

    def write_manifest(self, classes: dict[str, list[Path]]) -> Manifest | None:
        """Write the manifest if every shard is finished; processes that do so at a time write the same."""
        known = [self.finished(number, files) for number, files in enumerate(self.shards(classes))]
        if not all(known):
            return None
        labels = [label for shard in known for label in shard["labels"]]
        if not labels:
            raise ConfigError(f"--images {self.root}: every image is broken")
        write_array(self.out / LABELS, np.array(labels, np.int64))
        manifest = Manifest(
            vae=self.vae.describe(), image_size=self.pixels.input_size, shape=self.shape,
            flips=self.flips, classes=list(classes), labels_sha256=sha256(self.out / LABELS),
            shards=[{"file": self._path(number).name, "images": len(shard["labels"]), "sha256": shard["sha256"]}
                    for number, shard in enumerate(known) if shard["labels"]],
            skipped=[name for shard in known for name in shard["skipped"]])
        text = json.dumps(asdict(manifest), indent=1)
        write_whole(self.out / MANIFEST, lambda aside: aside.write_text(text))
        return manifest

    def _encode(self, images: Tensor) -> Tensor:
        """Return moments (b, flips, 2, C, h, w), on the CPU, of uint8 images (b, 3, H, W)."""
        sides = [images, images.flip(-1)] if self.flips else [images]
        return torch.stack([self.vae.encode_moments(side) for side in sides], 1).cpu()

    def _decoded(self, files: list[File]) -> Iterator[tuple[list[np.ndarray | None], list[File]]]:
        """Yield batches of files with their pixels (None: broken), decoded by threads one batch ahead."""
        batches = [files[start : start + self.batch_size] for start in range(0, len(files), self.batch_size)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ahead = pool.map(self._decode, batches[0])
            for batch, following in zip(batches, [*batches[1:], []], strict=True):
                images, ahead = ahead, pool.map(self._decode, following)
                yield list(images), batch

    def _decode(self, file: File) -> np.ndarray | None:
        try:
            return decode_image(file[0], self.pixels, resize=True)
        except ConfigError as error:
            if not self.skip_broken:
                raise ConfigError(f"{error}, or leave out such images with --broken skip") from None
            self.say(f"left out: {error}")
            return None

    def _plan(self, files: list[File]) -> str:
        names = [(path.relative_to(self.root).as_posix(), label) for path, label in files]
        plan = (self.vae.digest, self.pixels.input_size, self.flips, self.skip_broken, names)
        return hashlib.sha256(json.dumps(plan).encode()).hexdigest()

    def _path(self, number: int) -> Path:
        return self.out / f"shard-{number:05d}.npy"


def write_array(path: Path, content: np.ndarray) -> None:
    """Write a .npy file, whole or not at all."""
    def write(aside: Path) -> None:
        with aside.open("wb") as file:  # for np.save adds a suffix to a name
            np.save(file, content)

    write_whole(path, write)


def my_share(text: str | None) -> tuple[int, int]:
    """Return (index, count) of this process: `index/count` from 0, torchrun's rank, or alone.

    Raises:
        ConfigError: for a text of another form.
    """
    if text is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigError(f"--shard {text}: write INDEX/COUNT, 0/4 to 3/4 for four jobs")
    return int(match[1]), int(match[2])


def main(arguments: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmoe.data.latents", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, metavar="DIR", help="one folder of images a class")
    parser.add_argument("--vae", metavar="NAME", help="AutoencoderKL: a folder, or a name on the hub")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the latents go")
    parser.add_argument("--size", type=int, default=256, help="pixels a side of the crop (default: 256)")
    parser.add_argument("--no-flips", action="store_true", help="leave the mirrored images out; half the disk")
    parser.add_argument("--broken", choices=("fail", "skip"), default="fail",
                        help="a broken image: stop (default), or name it and leave it out")
    parser.add_argument("--shard", metavar="I/N", help="do this part of the work (default: torchrun's rank, or all)")
    parser.add_argument("--shard-images", type=int, default=4096, metavar="N", help="images a file (default: 4096)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images a call (default: 32)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--check", type=Path, metavar="DIR", help="compare latents with their checksums and stop")
    options = parser.parse_args(arguments)
    if options.check:
        manifest = check_latents(options.check)
        print(f"{options.check}: {len(manifest.shards)} shards as they were written, data digest {manifest.digest}")
        return 0
    for name in ("images", "vae", "out"):
        require(getattr(options, name) is not None, f"--{name}", None, "give it, or --check DIR")
    for name in ("shard_images", "batch_size"):
        require(getattr(options, name) > 0, f"--{name.replace('_', '-')}", getattr(options, name), "use 1 or more")
    return encode(options)


def encode(options: argparse.Namespace) -> int:
    """Encode this process's shards, then write the manifest if they were the last."""
    index, count = my_share(options.shard)
    classes = find_classes(options.images)
    vae = load_vae(options.vae, _device(options.device))
    require(options.size > 0 and options.size % vae.factor == 0, "--size", options.size,
            f"make it a multiple of {vae.factor}, the autoencoder's pixels a latent")
    encoder = Encoder(root=options.images, out=options.out, vae=vae, pixels=Pixels(input_size=options.size),
                      flips=not options.no_flips, skip_broken=options.broken == "skip",
                      shard_size=options.shard_images, batch_size=options.batch_size, say=tqdm.write)
    check_same_kind(encoder, classes)
    mine = list(enumerate(encoder.shards(classes)))[index::count]
    missing = [(number, files) for number, files in mine if encoder.finished(number, files) is None]
    interval = 1.0 if sys.stderr.isatty() else LOGGED_EVERY_S
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        if missing:  # until all of it is there again, nothing shall train on it
            (options.out / MANIFEST).unlink(missing_ok=True)
        with (tqdm(total=sum(len(files) for _, files in mine), unit="image", mininterval=interval,
                   desc=f"part {index}/{count}", initial=sum(len(f) for _, f in mine) - sum(len(f) for _, f in missing))
              as bar, warnings.catch_warnings()):
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for number, files in missing:
                encoder.encode_shard(number, files, bar.update)
        manifest = encoder.write_manifest(classes)
    except OSError as error:
        raise ConfigError(f"--out {options.out}: cannot be written ({error.strerror})") from None
    if manifest is None:
        print(f"part {index}/{count}: {len(mine)} shards done; other parts are not finished yet")
    else:
        print(f"{sum(shard['images'] for shard in manifest.shards)} images of {len(classes)} classes in "
              f"{len(manifest.shards)} shards, {len(manifest.skipped)} left out; data digest {manifest.digest}: "
              f"data.name=latents data.path={options.out}")
    return 0


def check_same_kind(encoder: Encoder, classes: dict[str, list[Path]]) -> None:
    """Refuse a folder that holds finished latents of another kind.

    Raises:
        ConfigError: when it does.
    """
    if not (encoder.out / MANIFEST).exists():
        return
    manifest = read_manifest(encoder.out)
    have = manifest.vae["digest"], manifest.image_size, manifest.flips, manifest.classes
    if have != (encoder.vae.digest, encoder.pixels.input_size, encoder.flips, list(classes)):
        raise ConfigError(f"--out {encoder.out}: holds latents of another autoencoder, size or image folder; "
                          "choose another folder, or remove it")


def _device(name: str) -> torch.device:
    rank = os.environ.get("LOCAL_RANK")
    return choose_device(f"cuda:{rank}" if name == "auto" and rank and torch.cuda.is_available() else name)


if __name__ == "__main__":
    sys.exit(run_command(main))
