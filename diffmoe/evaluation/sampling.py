"""Draw images whose label and noise depend on their own seed alone, and measure the computation that each token got.

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
from diffmoe.moe.routing import Routing

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
    position_load: Tensor | None
    """float32 (K, T): pairs of the token at each position in call k, mean over images and layers."""
    token_load: Tensor | None
    """float32 (N, T): pairs of each token of image n, mean over calls and layers."""


class CapacityMeter:
    """Collects from the network calls of a batch what was really activated; waits for nothing until read.

    Only the sums over calls keep both images and tokens: the rest would not fit for 50,000 images.
    """

    def __init__(self, model: DiT, num_images: int) -> None:
        device, tokens = model.positions.device, model.config.num_tokens
        self.model = model
        self.capacity: list[Tensor] = []
        self.expert_load: list[Tensor] = []
        self.position_load: list[Tensor] = []
        self.pairs_BT = torch.zeros(num_images, tokens, dtype=torch.int64, device=device)
        self.num_summed = 0
        self.overflow = torch.zeros((), dtype=torch.bool, device=device)

    def add(self, routings: list[Routing], num_rows: int) -> None:
        """Record the routings of one call on `num_rows` images: the batch's, twice where guided halves share a call."""
        if not routings:
            return
        images, tokens = self.pairs_BT.shape
        experts = self.model.config.moe.num_experts
        pairs = torch.stack([routing.pairs_per_sample(num_rows * tokens, 1, experts) for routing in routings])
        pairs_BT = pairs.view(-1, images, tokens).sum(0)  # over layers and guided halves
        repeats = pairs.numel() // pairs_BT.numel()
        self.pairs_BT += pairs_BT
        self.num_summed += repeats
        self.capacity.append(pairs_BT.sum(1) / (repeats * tokens))
        self.position_load.append(pairs_BT.sum(0) / (repeats * images))
        counts = [routing.counts(experts) for routing in routings]
        self.expert_load.append(torch.stack(counts) / (num_rows * tokens))
        for routing in routings:
            if routing.overflow is not None:
                self.overflow |= routing.overflow

    def token_load(self) -> Tensor:
        """Return the pairs of each token, float32 (B, T), mean over calls and layers."""
        return self.pairs_BT / self.num_summed


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
    parts, capacity, expert_load, position_load, token_load = [], [], [], [], []
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
            expert_load.append(torch.stack(meter.expert_load).cpu() * len(images))
            position_load.append(torch.stack(meter.position_load).cpu() * len(images))
            token_load.append(meter.token_load().cpu())
    if not capacity:
        return Samples(torch.cat(parts), labels, None, None, None, None)
    return Samples(torch.cat(parts), labels, torch.cat(capacity, 1), sum(expert_load) / len(seeds),
                   sum(position_load) / len(seeds), torch.cat(token_load))


def _sample_batch(model: DiT, config: RunConfig, seeds: Sequence[int], labels: Tensor,
                  row_bound: float) -> tuple[Tensor, CapacityMeter]:
    device = model.positions.device
    shape = (config.model.in_channels, config.model.input_size, config.model.input_size)
    generators = [seeded_generator("sample", seed) for seed in seeds]  # on the CPU: the same noise on every device

    def draw(step: int = -1) -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)

    meter = CapacityMeter(model, len(seeds))

    def predict_labels(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.training.precision is Precision.BF16):
            output = model(x, t, y, row_bound)
        meter.add(output.routings, len(x))
        return output.prediction.float()

    predict = guided(predict_labels, labels.to(device), config.model.null_label, config.sampling)
    images = build_process(config.diffusion).sample(predict, draw(), config=config.sampling, step_noise=draw)
    return images, meter
