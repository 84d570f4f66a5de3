"""Distances between generated and real images, through torch-fidelity, all on the features of one extractor.

    distance            Frechet distance of two Gaussians (Heusel et al. 2017, eq. 6)
    distance_se         its standard error by the drawing of samples, see standard_error
    kid, kid_std        unbiased squared MMD with a cubic kernel, over subsets (Binkowski et al. 2018, section 4)
    precision, recall   share inside the other set's manifold of 3 neighbours (Kynkaanniemi et al. 2019, eq. 2)
    inception_score     Inception only (Salimans et al. 2016)
    nn_ratio, copied    on demand: how near samples lie to training images, see nearest_neighbours

The Frechet distance falls with the number of samples: print N beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics
from torch_fidelity.metric_fid import fid_featuresdict_to_statistics_cached, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_featuresdict_to_metric
from torch_fidelity.metric_kid import kid_featuresdict_to_metric
from torch_fidelity.utils import (
    create_feature_extractor,
    extract_featuresdict_from_input_id_cached,
    resolve_feature_layer_for_metric,
)

from diffmoe.config import ConfigError, require
from diffmoe.data.images import ImageData, seeded_generator
from diffmoe.evaluation.extractors import INCEPTION, weights_file
from diffmoe.training.checkpoint import write_whole

PREPROCESSING = 1
"""Part of the cache's names: raise it when an extractor treats its images in another way."""

RNG_SEED = 2020
"""Draws KID's subsets."""

NEAREST_SHARE = 0.01
"""A sample is called copied where it lies nearer to a training image than this share of training images do."""

CHUNK = 1000
"""Samples whose distances are held at once: 0.2 GB of float32 at 50,000 training images."""

NEIGHBOURS = 3
"""Of a point, within whose distance is its part of the manifold."""

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
            weights_path: Path | None = None, kid_subset_size: int = 1000, batch_size: int = 64,
            memorisation: bool = False) -> dict[str, float]:
    """Measure generated images against real ones.

    Args:
        samples: uint8 (N, C, H, W), C 1 or 3.
        reference: real images of the same shape.
        extractor: a name that torch-fidelity knows; extractors.py adds its own.
        cache_root: folder for the features of `reference`; those of `samples` are never kept.
        weights_path: file with the extractor's weights, in place of a download.
        kid_subset_size: images in each of KID's 100 subsets.
        batch_size: images a call of the extractor; no result depends on it.
        memorisation: compare features with `nearest_neighbours` too.

    Returns:
        `distance`, `distance_se`, `kid`, `kid_std`, `precision`, `recall`, `inception_score` where the extractor is
        Inception, and `nn_ratio` and `copied` on demand.

    Raises:
        ConfigError: for inputs that do not fit, before any work; or weights that cannot be had.
    """
    check_counts(len(samples), len(reference.images), kid_subset_size)
    options = fidelity_options(samples, reference, extractor=extractor, device=device, cache_root=cache_root,
                               weights_path=weights_path, batch_size=batch_size)
    options |= {"kid_subset_size": kid_subset_size}
    metrics = ("fid", "kid", "prc", "isc") if extractor == INCEPTION else ("fid", "kid", "prc")
    layers = {metric: resolve_feature_layer_for_metric(metric, **options) for metric in metrics}
    with _torch_fidelity(options):  # calculate_metrics, but that it keeps the features
        network = create_feature_extractor(extractor, sorted(set(layers.values())), **options)
        drawn, real = (extract_featuresdict_from_input_id_cached(number, network, **options) for number in (1, 2))
        statistics = [fid_featuresdict_to_statistics_cached(features, name, network, layers["fid"], **options)
                      for features, name in ((drawn, None), (real, options["input2_cache_name"]))]
        results = (fid_statistics_to_metric(*statistics, verbose=False)
                   | kid_featuresdict_to_metric(drawn, real, layers["kid"], **options)
                   | precision_recall(*(features[layers["prc"]].to(device) for features in (drawn, real))))
        if "isc" in layers:
            results |= isc_featuresdict_to_metric(drawn, layers["isc"], **options)
    found = {name: results[key] for name, key in RESULTS.items() if key in results}
    mean, covariance = (torch.from_numpy(statistics[1][part]) for part in ("mu", "sigma"))
    found["distance_se"] = standard_error(drawn[layers["fid"]], mean, covariance)
    if memorisation:
        found |= nearest_neighbours(*(features[layers["fid"]].to(device) for features in (drawn, real)))
    return found


def precision_recall(samples: Tensor, reference: Tensor) -> dict[str, float]:
    """Return `precision`, the share of samples inside the reference's manifold, and `recall`, the other way round.

    torch-fidelity's own takes each of the M x M distances to the CPU and sorts there, while a GPU waits.

    Args:
        samples: features (N, D), N and M above `NEIGHBOURS`.
        reference: features (M, D), on the same device.
    """
    return {"precision": _share_inside(samples, reference), "recall": _share_inside(reference, samples)}


def _share_inside(points: Tensor, centres: Tensor) -> float:
    radii = torch.cat([torch.cdist(rows, centres).topk(NEIGHBOURS + 1, largest=False).values[:, -1]
                       for rows in centres.split(CHUNK)])  # the nearest is the point itself
    inside = [(torch.cdist(rows, centres) <= radii).any(1) for rows in points.split(CHUNK)]
    return torch.cat(inside).double().mean().item()


def standard_error(features: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """Return how much a Frechet distance would scatter if as many other samples were drawn.

    By the delta method: a sample's influence is the derivative of the distance by its weight, and the sd of the
    influences over sqrt(N) the standard error. Samples of fixed classes scatter a little less.

    Args:
        features: of the samples (N, D).
        mean, covariance: those of the reference, float64 (D,) and (D, D).
    """
    centred = features.double().cpu()
    shift = centred.mean(0) - mean
    centred = centred - centred.mean(0)
    root = _power(covariance, 0.5)
    transport = root @ _power(root @ centred.T.cov() @ root, -0.5) @ root  # the derivative of the trace term
    influence = centred @ (2 * shift) + (centred * (centred - centred @ transport)).sum(1)
    return (influence.std() / len(features) ** 0.5).item()


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Return a power of a symmetric positive semi-definite matrix; directions without variance stay without."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    return (vectors[:, kept] * values[kept] ** exponent) @ vectors[:, kept].T


def nearest_neighbours(samples: Tensor, reference: Tensor) -> dict[str, float]:
    """Compare how near samples lie to training images with how near training images lie to one another.

    A sample's distance is the Euclidean one to its nearest training image; a training image's, to the nearest other
    one, over a fixed subset of as many images as there are samples.

    Args:
        samples: features (N, D).
        reference: features of the training images (M, D), on the same device.

    Returns:
        `nn_ratio`: the median of the samples' distance over that of the subset's; 1 is expected of new real images.
        `copied`: the share of samples that are as near as the nearest 1 % of the subset; 0.01 is expected of them.
    """
    order = torch.randperm(len(reference), generator=seeded_generator("nearest neighbours", 0))
    subset = order[: len(samples)].to(reference.device)
    ours, real = _nearest(samples, reference), _nearest(reference[subset], reference, itself=subset)
    return {"nn_ratio": (ours.quantile(0.5) / real.quantile(0.5)).item(),
            "copied": (ours <= real.quantile(NEAREST_SHARE)).double().mean().item()}


def _nearest(points: Tensor, reference: Tensor, itself: Tensor | None = None) -> Tensor:
    """Return the distance (N,) of points (N, D) to the nearest of reference (M, D), but for each one's row `itself`."""
    square = reference.square().sum(1)
    nearest = []
    for rows in torch.arange(len(points), device=points.device).split(CHUNK):
        distance = torch.addmm(square, points[rows], reference.T, alpha=-2)  # (n, M), squared, less the point's square
        if itself is not None:
            distance.scatter_(1, itself[rows, None], torch.inf)
        nearest.append(distance.argmin(1))
    return (points - reference[torch.cat(nearest)]).norm(dim=1)  # a copy keeps 0, which the products would round


def frechet_distance(samples: Tensor, reference: ImageData, *, extractor: str, device: torch.device, cache_root: Path,
                     weights_path: Path | None = None, batch_size: int = 64) -> float:
    """Return the `distance` of `measure` alone, which takes no more of the reference than its cached statistics.

    Raises:
        ConfigError: as `measure` does.
    """
    options = fidelity_options(samples, reference, extractor=extractor, device=device, cache_root=cache_root,
                               weights_path=weights_path, batch_size=batch_size)
    return _distance(options)


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
    floor = _distance(options)
    with contextlib.suppress(OSError):  # not kept
        write_whole(kept, lambda aside: aside.write_text(json.dumps(floor)))
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
        "save_cpu_ram": True,  # no worker processes for images in memory
        "verbose": False,
    }


def _distance(options: dict[str, Any]) -> float:
    with _torch_fidelity(options):
        return calculate_metrics(**options)[RESULTS["distance"]]


@contextlib.contextmanager
def _torch_fidelity(options: dict[str, Any]) -> Iterator[None]:
    """Make what torch-fidelity raises one line, and leave the global random state as it was.

    NumPy has one thread here: by default each process's has every core, and where several measure beside one another,
    the eigenvalues of 1,280 features take two minutes in place of a second.
    """
    given = options["feature_extractor_weights_path"]
    unusable = (RuntimeError, UnpicklingError, EOFError) if given else (NotImplementedError,)
    try:
        with torch.random.fork_rng(devices=[]), threadpool_limits(1, "blas"):
            yield
    except (OSError, *unusable) as error:  # no network, no write permission, a file that holds something else
        raise ConfigError(f"extractor={options['feature_extractor']}: {str(error)[:200] or type(error).__name__}; "
                          f"check cache_root={options['cache_root']} and weights_path={given}; without a network, "
                          "give the weights as a file") from error
