"""Draw images whose label and noise depend on their own seed alone, and measure the computation that each token got.

Shapes: N images, K network calls, L mixture-of-experts layers, E experts; the others as in moe/routing.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffmoe.config import Precision, RunConfig, Sampler
from diffmoe.data.images import seeded_generator
from diffmoe.data.latent_data import load_decoder
from diffmoe.diffusion import build_process, guided
from diffmoe.models.dit import DiT, ModelOutput, build_model
from diffmoe.moe.routing import Routing
from diffmoe.training.graph import Graphed, compile_blocks
from diffmoe.training.precision import autocast, dtype_of_products, tf32

FIRST_ROW_BOUND = 2.0
"""Rows, in units of S, laid out for a dynamic router before an overflow asks for more."""

NetworkCall = Callable[[Tensor, Tensor, Tensor], Any]
"""Of noised images, times and labels."""


@dataclass(frozen=True)
class Tally:
    """What the routings of a network call activated, on the device."""

    pairs_BT: Tensor
    """int64: pairs of each token, over layers."""
    pairs_LE: Tensor
    """int64: pairs of each expert."""
    overflow: Tensor
    """bool scalar: a layer had more pairs than rows."""


@dataclass(frozen=True)
class Samples:
    """Generated images with what they cost."""

    images: Tensor
    """uint8 (N, C, H, W), on the CPU."""
    labels: Tensor
    """int64 (N,)."""
    capacity: Tensor | None
    """float32 (K, N): pairs a token of image n in call k, mean over layers; K is 1, the mean over calls, where the
    solver chooses its calls. None: a dense model."""
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
        self.capacity: list[Tensor] = []
        self.expert_load: list[Tensor] = []
        self.position_load: list[Tensor] = []
        self.pairs_BT = torch.zeros(num_images, tokens, dtype=torch.int64, device=device)
        self.num_summed = 0
        self.overflow = torch.zeros((), dtype=torch.bool, device=device)

    def add(self, tally: Tally | None) -> None:
        """Record what one call activated for the batch's images, or for them twice where guided halves share a call."""
        if tally is None:
            return
        images, tokens = self.pairs_BT.shape
        num_rows = len(tally.pairs_BT)
        pairs_BT = tally.pairs_BT.view(-1, images, tokens).sum(0)  # over guided halves
        repeats = len(tally.pairs_LE) * num_rows // images
        self.pairs_BT += pairs_BT
        self.num_summed += repeats
        self.capacity.append(pairs_BT.sum(1) / (repeats * tokens))
        self.position_load.append(pairs_BT.sum(0) / (repeats * images))
        self.expert_load.append(tally.pairs_LE / (num_rows * tokens))
        self.overflow |= tally.overflow

    def token_load(self) -> Tensor:
        """Return the pairs of each token, float32 (B, T), mean over calls and layers."""
        return self.pairs_BT / self.num_summed


def sample_images(model: DiT, config: RunConfig, seeds: Sequence[int]) -> Samples:
    """Draw one image a seed.

    Args:
        model: network in eval mode, on the device to use.
        config: process, sampling and precision of the run.
        seeds: image i's label (seed modulo the classes), start and step noise depend on seeds[i] alone.

    `selection: gate` couples the images of a sampling batch by definition; everything else does not.
    """
    return joined(list(sample_batches(model, config, cut_into_batches(config, seeds))))


def cut_into_batches(config: RunConfig, seeds: Sequence[int]) -> list[Sequence[int]]:
    """Return the seeds of each sampling batch."""
    size = config.sampling.batch_size
    return [seeds[start : start + size] for start in range(0, len(seeds), size)]


def joined(batches: Sequence[Samples]) -> Samples:
    """Return the samples of batches together, in their order."""
    images, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "labels"))
    if batches[0].capacity is None:
        return Samples(images, labels, None, None, None, None)
    expert_load, position_load = (sum(getattr(batch, name) * len(batch.images) for batch in batches) / len(images)
                                  for name in ("expert_load", "position_load"))
    return Samples(images, labels, torch.cat([batch.capacity for batch in batches], 1), expert_load, position_load,
                   torch.cat([batch.token_load for batch in batches]))


@torch.no_grad()
def sample_batches(model: DiT, config: RunConfig, batches: Sequence[Sequence[int]]) -> Iterator[Samples]:
    """Draw the images of some of the batches that `cut_into_batches` returns, as `sample_images` does."""
    decode = load_decoder(config.data, model.positions.device)
    adaptive = config.sampling.sampler is Sampler.DOPRI5
    row_bound = FIRST_ROW_BOUND
    compiled = _compiles(config, model.positions.device, sum(map(len, batches)))
    network = _tallied_call(model, config, row_bound, compiled=compiled)
    next_noise = StartNoise(config, batches[0])
    for seeds, following in zip(batches, [*batches[1:], ()], strict=True):
        labels, noise = torch.tensor(seeds) % config.model.num_classes, next_noise
        if compiled and len(seeds) < config.sampling.batch_size:  # a smaller last batch is not worth compiling
            compiled, network = False, _tallied_call(model, config, row_bound, compiled=False)
        images, meter = _sample_batch(model, network, config, noise, labels)
        next_noise = StartNoise(config, following)  # while the device works
        while meter.overflow:  # the one wait of a batch; pairs are never dropped
            row_bound *= 2
            network = _tallied_call(model, config, row_bound, compiled=compiled)
            images, meter = _sample_batch(model, network, config, StartNoise(config, seeds), labels)
        by_call = (_by_call(meter.capacity, adaptive), _by_call(meter.expert_load, adaptive),
                   _by_call(meter.position_load, adaptive), meter.token_load().cpu()) if meter.capacity else [None] * 4
        yield Samples(decode(images).cpu(), labels, *by_call)


@torch.no_grad()
def compile_ahead(config: RunConfig, device: torch.device, doublings: int = 0) -> None:
    """Compile what `sample_images` will call for the run's samples, on a network that knows nothing yet.

    Networks of a shape share what is compiled. So it can be done while another process has the GPU.

    Args:
        doublings: overflows of a dynamic router's rows to be ready for.
    """
    if _compiles(config, device, config.evaluation.num_samples):
        model, size = build_model(config.model).to(device).eval(), config.sampling.batch_size
        model.set_backend(config.runtime.backend)
        noise = StartNoise(config, range(size)).images.to(device)
        labels = torch.zeros(size, dtype=torch.int64, device=device)
        for exponent in range(doublings + 1):
            call = _tallied_call(model, config, FIRST_ROW_BOUND * 2**exponent, compiled=True)
            predict = guided(lambda *inputs, call=call: call(*inputs)[0], labels, config.model.null_label,
                             config.sampling)  # of as many images as a guided call has
            predict(noise, noise.new_zeros(size))


def _compiles(config: RunConfig, device: torch.device, num_samples: int) -> bool:
    """Say whether full batches are compiled: where it pays."""
    return config.runtime.compiles(device.type) and num_samples >= 2 * config.sampling.batch_size


class StartNoise:
    """The starts of a batch, and the generators that go on to draw its step noise.

    Drawn on the CPU, for the same images on every device.
    """

    def __init__(self, config: RunConfig, seeds: Sequence[int]) -> None:
        self.shape = (config.model.in_channels, config.model.input_size, config.model.input_size)
        self.generators = [seeded_generator("sample", seed) for seed in seeds]
        self.images = self.draw()

    def draw(self) -> Tensor:
        """Return fresh noise (N, C, H, W)."""
        noise = torch.empty(len(self.generators), *self.shape)
        for image, generator in zip(noise, self.generators, strict=True):
            image.normal_(generator=generator)
        return noise


def _by_call(values: list[Tensor], adaptive: bool) -> Tensor:
    """Stack the values of a batch's calls, on the CPU; batches of an adaptive solver share nothing but their mean."""
    stacked = torch.stack(values).cpu()
    return stacked.mean(0, keepdim=True) if adaptive else stacked


def prepare_call(model: DiT, config: RunConfig, row_bound: float | None, *, compiled: bool,
                 then: Callable[[ModelOutput], Any] = lambda output: output) -> NetworkCall:
    """Return a call of the network under the run's precision; compiled, a GPU replays it as one CUDA graph.

    The graph is for inputs of one shape, and its outputs last until the next call.

    Args:
        then: what becomes of the network's output, in the same graph.
    """
    device = model.positions.device

    def call(x: Tensor, t: Tensor, y: Tensor) -> Any:
        eager = contextlib.nullcontext() if compiled else torch.compiler.set_stance("force_eager")
        with eager, autocast(config.training, device), tf32(config.training.tf32):
            return then(model(x, t, y, row_bound))

    model = inference_weights(model, config, compiled=compiled)
    if compiled:
        compile_blocks(model.blocks)
    graphed = compiled and device.type == "cuda" and not model.waits_for_device(dtype_of_products(config.training))
    return Graphed(call) if graphed else call


def _tallied_call(model: DiT, config: RunConfig, row_bound: float | None, *, compiled: bool) -> NetworkCall:
    """Return a call that gives its prediction and, of a mixture, the tally of its routings in place of every pair."""
    activated = torch.compile(_activated, dynamic=False) if compiled else _activated
    tokens = config.model.num_tokens

    def tallied(output: ModelOutput) -> tuple[Tensor, Tally | None]:
        if not output.routings:
            return output.prediction, None
        num_tokens, num_experts = len(output.prediction) * tokens, config.model.moe.num_experts
        pairs_S, *others = activated(output.routings, num_tokens, num_experts)
        return output.prediction, Tally(pairs_S.view(-1, tokens), *others)

    return prepare_call(model, config, row_bound, compiled=compiled, then=tallied)


def _activated(routings: list[Routing], num_tokens: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    pairs_LS = torch.stack([routing.pairs_per_token(num_tokens, num_experts) for routing in routings])
    pairs_LE = torch.stack([routing.counts(num_experts) for routing in routings])
    overflows = [routing.overflow for routing in routings if routing.overflow is not None]
    overflow = torch.stack(overflows).any() if overflows else pairs_LE.new_zeros((), dtype=torch.bool)
    return pairs_LS.sum(0), pairs_LE, overflow


def inference_weights(model: DiT, config: RunConfig, *, compiled: bool) -> DiT:
    """Return the network whose weights a call uses: compiled in bf16, one with bf16 copies of them."""
    return model.rounded(torch.bfloat16) if compiled and config.training.precision is Precision.BF16 else model


def _sample_batch(model: DiT, network: NetworkCall, config: RunConfig, noise: StartNoise,
                  labels: Tensor) -> tuple[Tensor, CapacityMeter]:
    device = model.positions.device
    meter = CapacityMeter(model, len(labels))

    def predict_labels(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        prediction, tally = network(x, t, y)
        meter.add(tally)
        return prediction.to(torch.float32, copy=True)  # the next replay of a CUDA graph overwrites it

    predict = guided(predict_labels, labels.to(device), config.model.null_label, config.sampling)
    images = build_process(config.diffusion).sample(
        predict, noise.images.to(device), config=config.sampling, step_noise=lambda step: noise.draw().to(device))
    return images, meter
