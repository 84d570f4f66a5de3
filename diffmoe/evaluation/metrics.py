"""Distances between generated and real images, all through torch-fidelity, all on the features of one extractor.

    distance            Frechet distance of two Gaussians (Heusel et al. 2017, eq. 6)
    kid, kid_std        unbiased squared MMD with a cubic kernel, over subsets (Binkowski et al. 2018, section 4)
    precision, recall   share inside the other set's manifold of 3 neighbours (Kynkaanniemi et al. 2019, eq. 2)
    inception_score     Inception only (Salimans et al. 2016)

The Frechet distance falls with the number of samples: print N beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics

from diffmoe.config import ConfigError, require
from diffmoe.data.images import ImageData, seeded_generator
from diffmoe.evaluation.extractors import INCEPTION, weights_file

PREPROCESSING = 1
"""Part of the cache's names: raise it when an extractor treats its images in another way."""

RNG_SEED = 2020
"""Draws KID's subsets."""

MIN_SAMPLES = 10
"""The Inception score has 10 parts; precision and recall need 4 samples."""

RESULTS = {"distance": "frechet_inception_distance", "kid": "kernel_inception_distance_mean",
           "kid_std": "kernel_inception_distance_std", "precision": "precision", "recall": "recall",
           "inception_score": "inception_score_mean"}


class RgbImages(Dataset):
    """uint8 images (N, C, H, W) as torch-fidelity takes them: one tensor (3, H, W) each, grey ones repeated."""

    def __init__(self, images: Tensor) -> None:
        assert images.dtype == torch.uint8 and images.ndim == 4, (images.dtype, images.shape)
        self.images = images.cpu().expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def measure(samples: Tensor, reference: ImageData, *, extractor: str, device: torch.device, cache_root: Path,
            weights_path: Path | None = None, kid_subset_size: int = 1000, batch_size: int = 64) -> dict[str, float]:
    """Measure generated images against real ones.

    Args:
        samples: uint8 (N, C, H, W), C 1 or 3.
        reference: real images of the same shape.
        extractor: a name that torch-fidelity knows; extractors.py adds its own.
        cache_root: folder for the features of `reference`; those of `samples` are never kept.
        weights_path: file with the extractor's weights, in place of a download.
        kid_subset_size: images in each of KID's 100 subsets.
        batch_size: images a call of the extractor; no result depends on it.

    Returns:
        `distance`, `kid`, `kid_std`, `precision`, `recall`, and `inception_score` where the extractor is Inception.

    Raises:
        ConfigError: for inputs that do not fit, before any work; or weights that cannot be had.
    """
    check_counts(len(samples), len(reference.images), kid_subset_size)
    options = fidelity_options(samples, reference, extractor=extractor, device=device, cache_root=cache_root,
                               weights_path=weights_path, batch_size=batch_size)
    options |= {"kid": True, "kid_subset_size": kid_subset_size, "prc": True, "isc": extractor == INCEPTION}
    return _calculate(options)


def frechet_distance(samples: Tensor, reference: ImageData, *, extractor: str, device: torch.device, cache_root: Path,
                     weights_path: Path | None = None, batch_size: int = 64) -> float:
    """Return the `distance` of `measure` alone, which takes no more of the reference than its cached statistics.

    Raises:
        ConfigError: as `measure` does.
    """
    options = fidelity_options(samples, reference, extractor=extractor, device=device, cache_root=cache_root,
                               weights_path=weights_path, batch_size=batch_size)
    return _calculate(options)["distance"]


def check_counts(num_samples: int, num_reference: int, kid_subset_size: int) -> None:
    """Say whether so many samples can be measured, before they are drawn.

    Raises:
        ConfigError: for fewer than a Frechet distance takes, or than KID's subsets hold.
    """
    require(num_samples >= MIN_SAMPLES, "num_samples", num_samples, f"draw {MIN_SAMPLES} or more")
    require(kid_subset_size >= 2, "kid_subset_size", kid_subset_size, "use 2 or more")
    for count, what in ((num_samples, "samples"), (num_reference, "reference images")):
        require(kid_subset_size <= count, "kid_subset_size", kid_subset_size,
                f"there are only {count} {what}; use at most {count}, or more {what}")


def sampling_floor(reference: ImageData, num_samples: int, *, extractor: str, device: torch.device, cache_root: Path,
                   weights_path: Path | None = None, batch_size: int = 64) -> float | None:
    """Return the distance that about `num_samples` real images, the same number of each class, keep from all of them.

    It is the share of a distance that comes from drawing few samples; the subset is part of the whole, so that
    `num_samples` new real images would score a little more. None where a class has too few images, or the subset too
    few to be measured. A file in `cache_root` keeps it.

    Raises:
        ConfigError: as `measure` does.
    """
    each = num_samples // reference.num_classes
    smallest = reference.labels.bincount(minlength=reference.num_classes).min()
    if each > smallest or each * reference.num_classes < MIN_SAMPLES:
        return None
    order = torch.randperm(len(reference.labels), generator=seeded_generator("sampling floor", 0))
    labels = reference.labels.cpu()[order]
    chosen = torch.cat([order[labels == label][:each] for label in range(reference.num_classes)])
    options = fidelity_options(reference.images[chosen], reference, extractor=extractor, device=device,
                               cache_root=cache_root, weights_path=weights_path, batch_size=batch_size)
    kept = cache_root / f"{options['input2_cache_name']}-{extractor}-floor-{num_samples}.json"
    with contextlib.suppress(OSError, ValueError):  # not there, or not whole
        return float(json.loads(kept.read_text()))
    floor = _calculate(options)["distance"]
    with contextlib.suppress(OSError):  # not kept
        with tempfile.NamedTemporaryFile("w", dir=cache_root, delete=False) as aside:  # several processes may write it
            json.dump(floor, aside)
        Path(aside.name).replace(kept)
    return floor


def fidelity_options(samples: Tensor, reference: ImageData, *, extractor: str, device: torch.device, cache_root: Path,
                     weights_path: Path | None, batch_size: int) -> dict[str, Any]:
    """Return the arguments of torch-fidelity for a Frechet distance; it ignores any that it does not know.

    Raises:
        ConfigError: for images, an extractor or a weights file that cannot be used.
    """
    require(samples.shape[1:] == reference.images.shape[1:] and samples.shape[1] in (1, 3), "samples",
            tuple(samples.shape), f"use images of 1 or 3 channels in the shape of the reference's, "
            f"{tuple(reference.images.shape[1:])}")
    require(len(samples) >= MIN_SAMPLES, "samples", len(samples), f"draw {MIN_SAMPLES} or more")
    weights = weights_file(extractor, weights_path)
    # torch-fidelity adds the extractor's and the layer's name to this one, and nothing about weights or device.
    content = hashlib.sha256(weights.read_bytes()).hexdigest()[:12] if weights else "default"
    return {
        "input1": RgbImages(samples), "input2": RgbImages(reference.images),
        "input2_cache_name": f"{reference.digest}-p{PREPROCESSING}-w{content}-{device.type}",
        "cache_root": str(cache_root), "feature_extractor": extractor,
        "feature_extractor_weights_path": weights_path and str(weights_path),
        "fid": True, "cuda": device.type == "cuda", "batch_size": batch_size, "rng_seed": RNG_SEED,
        "save_cpu_ram": True,  # no worker processes for images in memory; neighbours 10 000 rows at a time
        "verbose": False,
    }


def _calculate(options: dict[str, Any]) -> dict[str, float]:
    """Call torch-fidelity, leave the global random state as it was, and rename the results."""
    given = options["feature_extractor_weights_path"]
    unusable = (RuntimeError, UnpicklingError, EOFError) if given else (NotImplementedError,)
    try:
        with torch.random.fork_rng(devices=[]):
            results = calculate_metrics(**options)
    except (OSError, *unusable) as error:  # no network, no write permission, a file that holds something else
        raise ConfigError(f"extractor={options['feature_extractor']}: {str(error)[:200] or type(error).__name__}; "
                          f"check cache_root={options['cache_root']} and weights_path={given}; without a network, "
                          "give the weights as a file") from error
    return {name: results[key] for name, key in RESULTS.items() if key in results}
