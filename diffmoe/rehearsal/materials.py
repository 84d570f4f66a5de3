"""What a rehearsal works on, made here: pictures, a reference batch, an untrained autoencoder and Inception."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from diffmoe.models.vae import autoencoder_class

CLASSES = 10
FACTOR = 8
"""Pixels a side that a latent's pixel stands for, as in Stable Diffusion's autoencoder."""


def make_images(folder: Path, count: int, side: int) -> None:
    """Write pictures of coloured waves as `<class>/<index>.png`: a class has its direction, frequency and colours."""
    places = np.mgrid[:side, :side] / side
    for label in range(CLASSES):
        rng = np.random.default_rng(label)
        angle, waves, colours = rng.uniform(0, np.pi), rng.integers(2, 6), rng.uniform(0.2, 1, (3, 1, 1))
        phase = np.tensordot([np.cos(angle), np.sin(angle)], places, 1) * waves
        target = folder / f"{label}"
        target.mkdir(parents=True, exist_ok=True)
        for index in range(count // CLASSES):
            wave = np.sin(2 * np.pi * (phase + rng.uniform())) * rng.uniform(0.5, 1)
            pixels = 127.5 * (1 + colours * wave) + rng.normal(0, 8, (3, side, side))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(target / f"{index:04}.png")


def make_reference(images: Path, path: Path) -> None:
    """Write the pictures as a reference batch in ADM's format: `arr_0`, uint8 (N, H, W, 3)."""
    np.savez(path, arr_0=np.stack([np.asarray(Image.open(file)) for file in sorted(images.rglob("*.png"))]))


def make_vae(folder: Path, width: int) -> None:
    """Save an AutoencoderKL of random weights that makes 4 channels and an eighth of the side.

    Args:
        width: channels of its blocks; a multiple of 8.

    Raises:
        ConfigError: when diffusers is missing.
    """
    torch.manual_seed(0)
    levels = FACTOR.bit_length()
    autoencoder_class()(
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[width] * levels, latent_channels=4, norm_num_groups=8).save_pretrained(folder)


class _Untrained(FeatureExtractorInceptionV3):
    def load_state_dict(self, state: object) -> None:
        """Keep the random weights."""


def make_inception(path: Path) -> None:
    """Save the weights of an Inception of random weights: its distances mean nothing, their arithmetic is the same."""
    torch.save({}, path)  # what the extractor would load
    torch.manual_seed(0)
    torch.save(_Untrained("random", ["2048"], feature_extractor_weights_path=str(path)).state_dict(), path)
