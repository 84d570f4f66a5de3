"""Synthetic records of the digits table, for tests and for looking at figures: the structure is real, no number is."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from diffmoe.config import RunConfig, digest, from_dict, to_dict
from diffmoe.evaluation.grid import examples
from diffmoe.records import Record

EC, TC, RACE = "expert_choice", "baselines.token_choice:TokenChoice", "baselines.expert_race:ExpertRace"
SAMPLE_POOL = {"kind": EC, "pool": "sample"}
# row: label, system, router (None: dense), mean distance, capacity, activated parameters in thousands
ROWS: dict[str, tuple[str, str, dict[str, Any] | None, float, float, float]] = {
    "tc": ("TC", "token_choice", {"kind": TC}, 9.6, 1.0, 138),
    "dense": ("Dense", "dense", None, 8.5, 1.0, 137),
    "ec-static": ("EC (static)", "expert_choice", SAMPLE_POOL | {"inference": "static"}, 8.1, 1.0, 139),
    "ec-dynamic": ("EC (dynamic)", "expert_choice", SAMPLE_POOL, 11.9, 0.97, 138),
    "diffmoe-static": ("DiffMoE (static)", "diffmoe", {"kind": EC, "inference": "static"}, 7.6, 1.0, 139),
    "diffmoe": ("DiffMoE (dynamic)", "diffmoe", {"kind": EC}, 7.2, 0.95, 137),
    "diffmoe-predictor": ("DiffMoE (per-token threshold)", "diffmoe", {"kind": EC, "selection": "predictor"}, 7.3, 0.96,
                          137),
    "expert-race": ("Expert Race", "expert_race", {"kind": RACE}, 7.0, 1.04, 139),
    "dense-large": ("Dense (larger)", "dense", None, 7.4, 1.0, 300),
}
NUM_CALLS, NUM_LAYERS, NUM_EXPERTS, NUM_CLASSES, SIDE = 49, 2, 8, 10, 4
DEPTH, NUM_LEVELS = 4, 10
STEPS = range(25, 1001, 25)


def fake_records(rows: Sequence[str] = tuple(ROWS), seeds: Sequence[int] = (0, 1, 2), scale: str = "digits",
                 spread: float = 0.015) -> list[Record]:
    """Return one record a row and seed; `spread` is the coefficient of variation over training seeds."""
    return [fake_record(row, seed, scale=scale, spread=spread) for row in rows for seed in seeds]


def fake_record(row: str, seed: int, *, scale: str = "digits", spread: float = 0.015) -> Record:
    """Return the record of one row and seed, drawn from both."""
    label, system, router, distance, capacity, activated = ROWS[row]
    config = from_dict(RunConfig, {
        "model": {"size": "nano", "input_size": 8, "patch_size": 2, "in_channels": 1, "num_classes": NUM_CLASSES,
                  "moe": router and {"num_experts": NUM_EXPERTS, "router": router}}
        | ({"hidden_size": 72} if row == "dense-large" else {}),
        "data": {"name": "digits"}, "training": {"batch_size": 128, "num_images": 128_000},
        "sampling": {"sampler": "heun", "num_steps": 25},
        "evaluation": {"extractor": "digits64", "num_samples": 1000, "kid_subset_size": 500}})
    training = digest(config, scope="training")
    shared = _generator(training, seed)  # rows of one checkpoint share its luck
    own = _generator(row, seed)
    luck = spread * shared.normal()
    distance *= float(np.exp(luck + 0.2 * spread * own.normal()))
    name = f"{row}-{digest(config)}-s{seed}-fakedata"
    return Record(
        id=name, scale=scale, row=row, label=label, system=system, seed=seed, config=to_dict(config),
        config_digest=digest(config), training_digest=training,
        data={"name": "digits", "digest": "fakedata", "num_images": 1797},
        training={"steps": 1000, "images": 128_000, "seconds": 61.0 + seed,
                  "losses": _losses(system, distance, shared)},
        sampling={"num_samples": 1000, "seconds": 12.0},
        evaluation={"extractor": "digits64", "distance_name": "FD-digits64", "reference": "fakedata", "seconds": 3.0},
        metrics={"distance": distance, "kid": 0.004 * distance, "kid_std": 0.002, "precision": 0.9 - 0.02 * distance,
                 "recall": 0.85 - 0.03 * distance, "class_accuracy": 0.98 - 0.01 * distance},
        activation={"capacity": capacity, "activated_params": 1e3 * activated,
                    "activated_params_strict": 1e3 * (activated + 5), "gflops": activated / 31000,
                    "total_params": 3.3e5} | (_measured(row, capacity, own) if router else {}),
        threshold_sweep=_sweep(distance, activated) if row == "diffmoe" else [],
        examples=_examples(row, seed, capacity if router else None),
        diagnosis=_diagnosis(router, capacity, _generator(f"{training} inside", seed)),
        environment={"commit": "0" * 40, "dirty": False, "versions": {"torch": "2.14.1"}, "hardware": "2 CPU cores",
                     "threads": 1, "peak_memory_bytes": 1_100_000_000})


def at_budget(record: Record, budget_images: int) -> Record:
    """Return what a record's row would have measured at a smaller budget of its training."""
    share = budget_images / record.training["images"]
    config = record.config | {"training": record.config["training"] | {"budgets": [budget_images]},
                              "evaluation": record.config["evaluation"] | {"budget_images": budget_images}}
    training = record.training | {"images": budget_images, "steps": round(share * record.training["steps"]),
                                  "seconds": share * record.training["seconds"]}
    worse = share**-0.3
    sweep = [point | {"distance": worse * point["distance"]} for point in record.threshold_sweep]
    return replace(record, id=f"{record.row}-{budget_images}-s{record.seed}-fakedata", config=config,
                   config_digest=f"{record.config_digest[:6]}{budget_images}", training=training, threshold_sweep=sweep,
                   metrics=record.metrics | {"distance": worse * record.metrics["distance"]})


def _generator(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(f"{name}:{seed}".encode()))


def _losses(system: str, distance: float, generator: np.random.Generator) -> list[list[Any]]:
    extra = {"token_choice": "balance", "expert_choice": "predictor", "diffmoe": "predictor"}.get(system)
    lines = []
    for step in STEPS:
        loss = 0.35 + 0.02 * distance + 1.2 / (1 + step / 40) + 0.02 * generator.normal()
        lines.append([step, {"mse": loss} | ({extra: 0.4 + 0.5 / (1 + step / 100)} if extra else {})])
    return lines


def _measured(row: str, capacity: float, generator: np.random.Generator) -> dict[str, Any]:
    wave = np.zeros(NUM_CALLS)
    classes = np.zeros(NUM_CLASSES)
    if row in ("ec-dynamic", "diffmoe", "diffmoe-predictor", "expert-race"):
        time = np.linspace(0, 1, NUM_CALLS)
        wave = 0.35 * np.exp(-time / 0.05) - 0.1 * np.cos(2 * np.pi * time) + 0.02 * generator.normal(size=NUM_CALLS)
        classes = np.linspace(-0.15, 0.2, NUM_CLASSES)[[3, 1, 4, 0, 5, 9, 2, 6, 8, 7]]
        classes = classes + 0.03 * generator.normal(size=NUM_CLASSES)
    load = np.full((NUM_LAYERS, NUM_EXPERTS), capacity / NUM_EXPERTS)
    if row in ("tc", "expert-race", "diffmoe", "diffmoe-predictor", "ec-dynamic"):
        load = load * np.exp(0.4 * generator.normal(size=load.shape))
    by_third = [capacity + own * _ring() for own in (0.05, 0.1, 0.3 if wave.any() else 0.1)]
    return {"load_by_position": np.mean(by_third, 0).round(4).tolist(), "load_by_third": np.round(by_third, 4).tolist(),
            "capacity_by_call": (capacity + wave - wave.mean()).tolist(),
            "capacity_by_class": (capacity + classes - classes.mean()).tolist(),
            "expert_load": (load * capacity / load.sum(1, keepdims=True)).tolist()}


def _ring() -> np.ndarray:
    """Return (T,) numbers of mean 0 that are high in the middle of the image."""
    y, x = np.indices((SIDE, SIDE)) - (SIDE - 1) / 2
    ring = -np.hypot(y, x).flatten()
    return ring - ring.mean()


def _examples(row: str, seed: int, capacity: float | None) -> dict[str, Any]:
    """Return discs, two a class, of a row's own brightness."""
    labels = torch.arange(2 * NUM_CLASSES) // 2
    y, x = torch.meshgrid(torch.arange(8) - 3.5, torch.arange(8) - 3.5, indexing="ij")
    discs = torch.hypot(y, x)[None, None] < 1 + labels[:, None, None, None] / 3
    noise = torch.from_numpy(_generator(f"{row} images", seed).integers(0, 40, (len(labels), 1, 8, 8)))
    load = None if capacity is None else torch.from_numpy(capacity + 0.3 * _ring()).expand(len(labels), -1)
    return examples((200 * discs + noise).to(torch.uint8), labels, load)


def _diagnosis(router: dict[str, Any] | None, capacity: float, generator: np.random.Generator) -> dict[str, Any]:
    """Return what rows of one training share, but for the capacity; experts of a batch pool prefer noise levels."""
    levels = np.linspace(0.95, 0.05, NUM_LEVELS)
    is_moe = [router is not None and block % 2 == 1 for block in range(DEPTH)]
    parts = {"embedding": 1.5, "attention": 0.3, "adaln": 0.7, "ffn": 0.4, "final": 1.3}
    parts |= {"experts": 0.03, "router": 0.08} if router else {}
    has_threshold = router is not None and router["kind"] != TC
    parts |= {"predictor": 0.3} if has_threshold and router["kind"] == EC else {}
    size = np.where(is_moe, 0.3, 1.0)[:, None] * (1 + 0.1 * levels) * np.exp(0.1 * generator.normal(size=(DEPTH, 1)))
    loss = 0.3 - 0.2 * levels - (0.01 * capacity * levels if router else 0) + 0.002 * generator.normal(size=NUM_LEVELS)
    found = {"images": 128, "batch": 1000, "noise_levels": levels.round(4).tolist(), "loss": loss.round(6).tolist(),
             "blocks": {"is_moe": is_moe, "rms": size.round(4).tolist(), "share": (size / 5).round(4).tolist()},
             "gradients": parts, "weights": {part: 20 * norm for part, norm in parts.items()}}
    if router is None:
        return found
    wave = np.cos(np.pi * levels) * np.linspace(-0.8, 0.8, NUM_EXPERTS)[:, None]
    wave = wave * (router.get("pool") != "sample") * np.ones((NUM_LAYERS, 1, 1))
    classes = np.exp(0.1 * generator.normal(size=(NUM_LAYERS, NUM_EXPERTS, NUM_CLASSES)))
    pair = 0.2 + 0.05 * generator.random((NUM_LAYERS, 1)) + 0.02 * levels
    found |= {"mixed_loss": (loss - 0.01 * (1 - levels)).round(6).tolist(),
              "gates": {"pair": pair.round(4).tolist(), "token": (pair * capacity).round(4).tolist()},
              "capacity": np.full((NUM_LAYERS, NUM_LEVELS), capacity).tolist(),
              "load_by_level": ((1 + wave) / NUM_EXPERTS).round(4).tolist(),
              "load_by_class": (classes / NUM_EXPERTS).round(4).tolist()}
    if not has_threshold:
        return found
    quality = 0.9 - 0.1 * generator.random((2, NUM_LAYERS, 1)) - 0.1 * levels
    return found | {"passes": dict(zip(("precision", "recall"), quality.round(4).tolist(), strict=True)),
                    "thresholds": (0.4 + 0.05 * generator.random((NUM_LAYERS, NUM_EXPERTS))).round(4).tolist()}


def _sweep(distance: float, activated: float) -> list[dict[str, float]]:
    """Return a curve like the paper's interval search: best between C = 1 and 3, bad at both ends."""
    found = {0.9: (0.71, 1.22), 0.7: (0.83, 1.08), 0.5: (0.92, 1.01), 0.3: (1.03, 0.955), 0.1: (1.22, 0.9),
             1e-2: (1.71, 0.84), 1e-3: (2.33, 0.82), 1e-4: (3.17, 0.83)}
    return [{"threshold": threshold, "capacity": capacity, "distance": share * distance,
             "activated_params": 1e3 * activated * (0.75 + 0.25 * capacity), "seconds": 9.0}
            for threshold, (capacity, share) in found.items()]
