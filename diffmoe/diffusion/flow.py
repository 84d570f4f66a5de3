"""Rectified flow (Liu et al. 2022, arXiv 2209.03003; SiT's linear path), time running from noise to data.

    x_t = t x + (1 - t) z,    velocity target dx_t/dt = x - z,    t in [0, 1]

A learned sigma has no meaning here: those output channels are dropped and get no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe.config import ProcessKind, Sampler, SamplingConfig
from diffmoe.diffusion.process import Predict, Process, StepNoise
from diffmoe.diffusion.samplers import dopri5, euler, heun


class RectifiedFlow(Process):
    """Straight paths from noise (t = 0) to data (t = 1); times are float32."""

    kind = ProcessKind.FLOW
    samplers = (Sampler.EULER, Sampler.HEUN, Sampler.DOPRI5)

    def sample_times(self, batch_size: int, *, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """Draw float32 times (B,), uniform in [0, 1)."""
        return torch.rand(batch_size, generator=generator, device=generator.device).to(device)

    def even_times(self, count: int) -> Tensor:
        """Return float32 times: 0.05, 0.15 ... 0.95 for 10."""
        return (torch.arange(count) + 0.5) / count

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return t x + (1 - t) noise."""
        t = t.to(x.dtype)[:, None, None, None]
        return t * x + (1 - t) * noise

    def loss(self, predict: Predict, x: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Return `mse` (B,): the squared error of the velocity, mean over C, H, W."""
        velocity = predict(self.add_noise(x, noise, t), t)[:, : x.shape[1]]
        return {"mse": (velocity - (x - noise)).square().mean((1, 2, 3))}

    def _integrate(self, predict: Predict, noise: Tensor, config: SamplingConfig,
                   step_noise: StepNoise | None) -> Tensor:
        if config.sampler is Sampler.DOPRI5:
            return dopri5(predict, noise)
        integrator = {Sampler.EULER: euler, Sampler.HEUN: heun}[config.sampler]
        return integrator(predict, noise, config.num_steps)
