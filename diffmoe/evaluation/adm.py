"""The paper's protocol: ADM's metrics against ADM's reference batch (Dhariwal and Nichol 2021, arXiv 2105.05233).

The reference is an .npz file: `arr_0`, uint8 images (N, H, W, 3), and where it has them the statistics of the whole
training set, `mu`, `sigma` (pooled features) and `mu_s`, `sigma_s` (spatial ones). All features are Inception's, by
torch-fidelity's port of the network that ADM loads.

    distance            FID: pooled features (2048), against mu, sigma
    sfid                the same on the first 7 channels of mixed_6/conv, 17x17 each (Nash et al. 2021), mu_s, sigma_s
    inception_score     parts of 5,000 samples in their order, logits without bias
    precision, recall   3 neighbours, pooled features, against the images of the file (10,000 in ADM's)
    kid, kid_std        as in metrics.py, against the images of the file; not one of ADM's
"""

from __future__ import annotations

import functools
import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from diffmoe.config import ConfigError, require
from diffmoe.evaluation.extractors import INCEPTION
from diffmoe.evaluation.metrics import MIN_SAMPLES, RNG_SEED, precision_recall

SPATIAL_CHANNELS = 7
SCORE_PART = 5000
Statistics = dict[str, np.ndarray]
"""`mu` (D,) and `sigma` (D, D), float64."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What a file in ADM's format holds; equal to itself alone, as a key of `reference_features`."""

    digest: str
    """12 hex digits of the file's content."""
    images: Tensor
    """uint8 (N, 3, H, W)."""
    pooled: Statistics | None
    spatial: Statistics | None


@functools.lru_cache(maxsize=1)
def read_reference(path: Path) -> Reference:
    """Read an .npz file of images and statistics.

    Raises:
        ConfigError: when it cannot be read or has no images, which precision and recall need.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file.get("arr_0")
            pooled, spatial = (
                {"mu": file[f"mu{mark}"].astype(np.float64), "sigma": file[f"sigma{mark}"].astype(np.float64)}
                if f"mu{mark}" in file and f"sigma{mark}" in file else None for mark in ("", "_s"))
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()[:12]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"evaluation.reference={path}: not a file in ADM's format ({str(error)[:150]})") from None
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        have = "none" if images is None else f"{images.dtype} {images.shape}"
        raise ConfigError(f"evaluation.reference={path}: needs images in arr_0, uint8 (N, H, W, 3), and has {have}")
    return Reference(digest, torch.from_numpy(images).permute(0, 3, 1, 2), pooled, spatial)


class AdmInception(FeatureExtractorInceptionV3):
    """Inception with the three outputs that ADM reads."""

    def __init__(self, weights_path: Path | None) -> None:
        super().__init__(INCEPTION, ["2048", "logits_unbiased"],
                         feature_extractor_weights_path=weights_path and str(weights_path))
        self.Mixed_6d.branch1x1.register_forward_hook(self._keep)  # TensorFlow's name of it is mixed_6/conv

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return pooled features (B, 2048), logits (B, 1008) and spatial features (B, 2023) of uint8 images."""
        pooled, logits = super().forward(images)
        return pooled, logits, self.kept

    def _keep(self, module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.kept = output[:, :SPATIAL_CHANNELS].flatten(1)


@torch.no_grad()
def extract(images: Tensor, weights_path: Path | None, device: torch.device, batch_size: int) -> tuple[Tensor, ...]:
    """Return pooled features, logits and spatial features, float64 on the CPU, of uint8 images (N, 3, H, W).

    Raises:
        ConfigError: for weights that cannot be had.
    """
    try:
        network = AdmInception(weights_path).to(device)
    except (OSError, RuntimeError, EOFError) as error:
        raise ConfigError(f"extractor={INCEPTION}: {str(error)[:200]}; give its weights as a file, "
                          "evaluation.extractor_weights, where there is no network") from None
    parts = [network(part.to(device).contiguous()) for part in images.split(batch_size)]
    return tuple(torch.cat([part[place].cpu() for part in parts]).double() for place in range(3))


@functools.lru_cache(maxsize=1)
def reference_features(reference: Reference, weights_path: Path | None, device: torch.device,
                       batch_size: int) -> tuple[Tensor, ...]:
    """Return `extract` of a reference's images; the last ones are kept, since many samples meet one reference."""
    return extract(reference.images, weights_path, device, batch_size)


def measure_adm(samples: Tensor, reference: Reference, *, device: torch.device, weights_path: Path | None = None,
                kid_subset_size: int = 1000, batch_size: int = 64) -> dict[str, float]:
    """Measure samples, uint8 (N, 3, H, W), as this file's head says.

    Raises:
        ConfigError: for samples of another shape or too few, or weights that cannot be had.
    """
    require(samples.shape[1:] == reference.images.shape[1:], "samples", tuple(samples.shape),
            f"the reference has images of {tuple(reference.images.shape[1:])}")
    require(len(samples) >= MIN_SAMPLES, "samples", len(samples), f"draw {MIN_SAMPLES} or more")
    pooled, logits, spatial = extract(samples, weights_path, device, batch_size)
    real_pooled, _, real_spatial = reference_features(reference, weights_path, device, batch_size)
    kid = kid_features_to_metric(pooled, real_pooled, kid_subset_size=kid_subset_size, rng_seed=RNG_SEED, verbose=False)
    score = isc_features_to_metric(logits, splits=max(1, len(logits) // SCORE_PART), shuffle=False)
    return {"distance": frechet(pooled, reference.pooled or real_pooled),
            "sfid": frechet(spatial, reference.spatial or real_spatial),
            "inception_score": score["inception_score_mean"],
            "kid": kid["kernel_inception_distance_mean"], "kid_std": kid["kernel_inception_distance_std"]
            } | precision_recall(pooled, real_pooled)


def frechet(features: Tensor, reference: Tensor | Statistics) -> float:
    """Return the Frechet distance of features (N, D) from other features or their statistics.

    Raises:
        ConfigError: for statistics of other features.
    """
    if isinstance(reference, Tensor):
        reference = fid_features_to_statistics(reference)
    want = (features.shape[1],)
    if reference["mu"].shape != want or reference["sigma"].shape != want * 2:
        raise ConfigError(f"evaluation.reference: statistics of {reference['mu'].shape} features, these are {want}")
    return fid_statistics_to_metric(fid_features_to_statistics(features), reference,
                                    verbose=False)["frechet_inception_distance"]
