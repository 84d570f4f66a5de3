"""The contract of a diffusion process: what the trainer and the sampler know of it.

Shape legend, here and in every file of this package:
    B samples, C channels, H height, W width; the network returns C or 2C channels (the rest: learned sigma)
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from diffmoe.config import ProcessKind, Sampler, SamplingConfig, require

Predict = Callable[[Tensor, Tensor], Tensor]
"""The network at fixed labels: x (B, C, H, W) and times (B,) -> raw output (B, C or 2C, H, W)."""

StepNoise = Callable[[int], Tensor]
"""Gives the noise (B, C, H, W) of sampling step i, in order of use: 0 is the highest timestep."""


class Process(abc.ABC):
    """Noises data, scores a prediction, and turns noise into images. Stateless but for cached constants."""

    kind: ClassVar[ProcessKind]
    samplers: ClassVar[tuple[Sampler, ...]]

    @abc.abstractmethod
    def sample_times(self, batch_size: int, *, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """Draw the training times (B,) on the generator's device and return them on `device`."""

    @abc.abstractmethod
    def even_times(self, count: int) -> Tensor:
        """Return the middles (count,) of as many equal stretches of time, from the most noise to the least."""

    @abc.abstractmethod
    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the noised x_t (B, C, H, W) of data `x` at times `t` (B,)."""

    @abc.abstractmethod
    def loss(self, predict: Predict, x: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Call `predict` once on x_t and return named losses (B,), to be added with weight 1."""

    def num_calls(self, config: SamplingConfig) -> int | None:
        """Return how often one sampling run calls `predict`; None: as often as the solver finds it necessary."""
        self._check_sampler(config)
        if config.sampler is Sampler.DOPRI5:
            return None
        return config.num_steps * (2 if config.sampler is Sampler.HEUN else 1)

    @torch.no_grad()
    def sample(self, predict: Predict, noise: Tensor, *, config: SamplingConfig,
               step_noise: StepNoise | None = None) -> Tensor:
        """Integrate from `noise` (B, C, H, W) to images, in the dtype of `noise`.

        Nothing is drawn here: with per-seed `noise` and `step_noise`, image i depends on its own seed alone.

        Raises:
            ConfigError: when the sampler is not one of this process.
            ValueError: when the sampler adds noise and `step_noise` is None.
        """
        self._check_sampler(config)
        return self._integrate(predict, noise, config, step_noise)

    @abc.abstractmethod
    def _integrate(self, predict: Predict, noise: Tensor, config: SamplingConfig,
                   step_noise: StepNoise | None) -> Tensor: ...

    def _check_sampler(self, config: SamplingConfig) -> None:
        require(config.sampler in self.samplers, "sampling.sampler", config.sampler,
                f"with process {self.kind} use one of {', '.join(self.samplers)}")
