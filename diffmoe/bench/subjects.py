"""A case that stands ready to be called: this suite's trainer, sampler and network, as their users call them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from diffmoe.bench.capacity import calibrate, drawn_model, expert_rates, fill_zeros, set_thresholds
from diffmoe.bench.cases import Case, random_images
from diffmoe.config import ModelConfig, RunConfig
from diffmoe.data import ImageData
from diffmoe.evaluation.sampling import FIRST_ROW_BOUND, prepare_call, sample_images
from diffmoe.models.counting import flops_per_call
from diffmoe.models.dit import DiT, ModelOutput
from diffmoe.training.distributed import ALONE, World
from diffmoe.training.graph import EAGER_CALLS
from diffmoe.training.trainer import Trainer

WARM_UP = {"train": EAGER_CALLS + 2, "sample": 1, "forward": 4}
"""Calls before the clock: they compile, choose algorithms and capture the graph."""


class Subject(Protocol):
    """What the runner calls."""

    config: RunConfig

    def call(self) -> object:
        """Do the work once."""

    def scope(self) -> contextlib.AbstractContextManager:
        """Return the context of all calls."""

    def facts(self) -> dict[str, Any]:
        """Return what is known after warming up: `capacity`, `flops_per_image`, `num_params`."""


class Shared:
    """What cases of one process share: images on the host, thresholds once found.

    Args:
        device: where all of it runs.
        expert_load: the record that `skewed` takes its load from.
    """

    def __init__(self, device: torch.device, expert_load: Path | None = None) -> None:
        self.device = device
        self.expert_load = expert_load
        self._images: dict[tuple[int, ...], ImageData] = {}
        self._thresholds: dict[tuple, list[Tensor]] = {}

    def images(self, config: RunConfig) -> ImageData:
        """Return the images of a run."""
        key = (config.model.in_channels, config.model.input_size, config.model.num_classes)
        if key not in self._images:
            self._images[key] = random_images(config, self.device)
        return self._images[key]

    def inference_model(self, case: Case, config: RunConfig) -> DiT:
        """Return the network of a case in eval mode, with the thresholds that its load asks for."""
        model = drawn_model(config.model, self.device).eval().set_backend(config.runtime.backend)
        if case.load:
            key = (case.workload, case.size, case.system, case.load, case.batch)
            if key not in self._thresholds:
                rates_LE = expert_rates(config.model, case.load, self.expert_load)
                self._thresholds[key] = calibrate(model, config, rates_LE)
            set_thresholds(model, self._thresholds[key])
        return model


class Training:
    """`Trainer.train_step`: data on the device, augmentation, loss, optimiser, average."""

    def __init__(self, case: Case, config: RunConfig, shared: Shared, world: World = ALONE) -> None:
        self.config = config
        self.trainer = Trainer(config, 0, shared.images(config), shared.device, world)
        fill_zeros(self.trainer.model)
        self.trainer.round_weights()

    def call(self) -> object:
        """Make one optimiser step."""
        return self.trainer.train_step()

    def scope(self) -> contextlib.AbstractContextManager:
        """Return nothing special."""
        return contextlib.nullcontext()

    def facts(self) -> dict[str, Any]:
        """Count a step as three forwards at the training capacity."""
        return training_facts(self.config.model)


def training_facts(model: ModelConfig) -> dict[str, Any]:
    """Return capacity and operations of a training step: one forward, and two for the backward."""
    capacity = model.moe.capacity if model.moe else 1.0
    return {"capacity": capacity, "flops_per_image": 3 * flops_per_call(model, capacity)}


class Sampling:
    """`sample_images` on some batches: noise, all steps, capacity meter, pixels on the host."""

    def __init__(self, case: Case, config: RunConfig, shared: Shared) -> None:
        self.config = config
        self.model = shared.inference_model(case, config)
        self.num_images = case.images
        self.capacity = 1.0

    def call(self) -> object:
        """Draw the images."""
        samples = sample_images(self.model, self.config, range(self.num_images))
        if samples.capacity is not None:
            self.capacity = samples.capacity.mean().item()
        return samples

    def scope(self) -> contextlib.AbstractContextManager:
        """Return nothing special."""
        return contextlib.nullcontext()

    @property
    def calls(self) -> int:
        """Return how often the network is called, by as many batches as it takes."""
        return self.num_images // self.config.sampling.batch_size * self.config.sampling.num_steps

    def facts(self) -> dict[str, Any]:
        """Count the calls of the network at the capacity that the last images had."""
        calls = self.config.sampling.num_steps
        return {"capacity": self.capacity, "flops_per_image": calls * flops_per_call(self.config.model, self.capacity)}


class Forward:
    """One call of the network in eval mode, as `sample_images` makes it but for the tally of its routings."""

    calls = 1

    def __init__(self, case: Case, config: RunConfig, shared: Shared) -> None:
        self.config = config
        self.model = shared.inference_model(case, config)
        self.network = prepare_call(self.model, config, FIRST_ROW_BOUND, compiled=bool(config.runtime.compile))
        self.inputs = network_inputs(config.model, case.batch, shared.device)

    def call(self) -> ModelOutput:
        """Predict for a batch."""
        with torch.no_grad():
            return self.network(*self.inputs)

    def scope(self) -> contextlib.AbstractContextManager:
        """Return nothing special."""
        return contextlib.nullcontext()

    def facts(self) -> dict[str, Any]:
        """Count one call at the capacity that it has."""
        capacity = 1.0
        routings = self.call().routings
        if routings:
            pairs = [routing.counts(self.config.model.moe.num_experts).sum().item() for routing in routings]
            capacity = sum(pairs) / len(pairs) / (len(self.inputs[0]) * self.config.model.num_tokens)
        return {"capacity": capacity, "flops_per_image": flops_per_call(self.config.model, capacity)}


OURS = {"train": Training, "sample": Sampling, "forward": Forward}


def network_inputs(config: ModelConfig, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return random images, times and labels."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, config.in_channels, config.input_size, config.input_size)
    inputs = (torch.randn(shape, generator=generator), torch.rand(batch, generator=generator),
              torch.randint(0, config.num_classes, (batch,), generator=generator))
    return tuple(value.to(device) for value in inputs)
