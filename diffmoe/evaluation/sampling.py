"""Draw images whose label and noise depend on their own seed alone, and measure the capacity used.

Shapes: N images, K network calls, L mixture-of-experts layers, E experts; the others as in moe/routing.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffmoe.config import Precision, RunConfig
from diffmoe.data.images import seeded_generator, to_pixels
from diffmoe.diffusion import build_process, guided
from diffmoe.models.dit import DiT

FIRST_ROW_BOUND = 2.0
"""Rows, in units of S, laid out for a dynamic router before an overflow asks for more."""


@dataclass(frozen=True)
class Samples:
    """Generated images with what they cost."""

    images: Tensor
    """uint8 (N, C, H, W), on the CPU."""
    labels: Tensor
    """int64 (N,)."""
    capacity: Tensor | None
    """float32 (K, N): pairs a token of image n in call k, mean over layers. None: a dense model."""
    expert_load: Tensor | None
    """float32 (K, L, E): pairs a token of each expert, mean over images; sums to the capacity."""


class CapacityMeter:
    """Collects from each network call what was really activated; waits for nothing until read."""

    def __init__(self, model: DiT) -> None:
        self.model = model
        self.capacity: list[Tensor] = []
        self.load: list[Tensor] = []
        self.overflow = torch.zeros((), dtype=torch.bool, device=model.positions.device)

    def add(self, routings: list, num_images: int) -> None:
        """Record the routings of one call on `num_images` images."""
        if not routings:
            return
        tokens, experts = self.model.config.num_tokens, self.model.config.moe.num_experts
        pairs = [routing.pairs_per_sample(num_images, tokens, experts) for routing in routings]
        self.capacity.append(torch.stack(pairs).float().mean(0) / tokens)
        counts = [routing.counts(experts) for routing in routings]
        self.load.append(torch.stack(counts).float() / (num_images * tokens))
        for routing in routings:
            if routing.overflow is not None:
                self.overflow |= routing.overflow


@torch.no_grad()
def sample_images(model: DiT, config: RunConfig, seeds: Sequence[int]) -> Samples:
    """Draw one image a seed.

    Args:
        model: network in eval mode, on the device to use.
        config: process, sampling and precision of the run.
        seeds: image i's label (seed modulo the classes), start and step noise depend on seeds[i] alone.

    `selection: gate` couples the images of a sampling batch by definition; everything else does not.
    """
    labels = torch.tensor(seeds) % config.model.num_classes
    parts, capacity, load = [], [], []
    size = config.sampling.batch_size
    for start in range(0, len(seeds), size):
        part = slice(start, start + size)
        row_bound = FIRST_ROW_BOUND
        images, meter = _sample_batch(model, config, seeds[part], labels[part], row_bound)
        while meter.overflow:  # the one wait of a batch; pairs are never dropped
            row_bound *= 2
            images, meter = _sample_batch(model, config, seeds[part], labels[part], row_bound)
        parts.append(to_pixels(images).cpu())
        if meter.capacity:
            capacity.append(torch.stack(meter.capacity).cpu())
            load.append(torch.stack(meter.load).cpu() * len(images))
    return Samples(torch.cat(parts), labels, torch.cat(capacity, 1) if capacity else None,
                   sum(load) / len(seeds) if load else None)


def _sample_batch(model: DiT, config: RunConfig, seeds: Sequence[int], labels: Tensor,
                  row_bound: float) -> tuple[Tensor, CapacityMeter]:
    device = model.positions.device
    shape = (config.model.in_channels, config.model.input_size, config.model.input_size)
    generators = [seeded_generator("sample", seed) for seed in seeds]  # on the CPU: the same noise on every device

    def draw(step: int = -1) -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)

    meter = CapacityMeter(model)

    def predict_labels(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.training.precision is Precision.BF16):
            output = model(x, t, y, row_bound)
        meter.add(output.routings, len(x))
        return output.prediction.float()

    predict = guided(predict_labels, labels.to(device), config.model.null_label, config.sampling)
    images = build_process(config.diffusion).sample(predict, draw(), config=config.sampling, step_noise=draw)
    return images, meter
