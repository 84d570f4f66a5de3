"""Integrators from noise to image. A step costs one call of the network (Heun: two; dopri5: six, and it is adaptive).

Constants of a step are Python floats and times are filled on the device, so that no step waits for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffmoe.diffusion.process import Predict, StepNoise
from diffmoe.diffusion.schedule import Coefficients, Schedule

DOPRI5_RTOL, DOPRI5_ATOL = 1e-3, 1e-6
"""Tolerances of the authors' solver."""


def euler(predict: Predict, x: Tensor, num_steps: int) -> Tensor:
    """Follow the velocity from t = 0 to 1 with first-order steps, evaluated at i / N."""
    for i in range(num_steps):
        x = x + _velocity(predict, x, i / num_steps) / num_steps
    return x


def heun(predict: Predict, x: Tensor, num_steps: int) -> Tensor:
    """Follow the velocity with second-order steps, evaluated at i / N and (i + 1) / N; the last includes t = 1."""
    for i in range(num_steps):
        start = _velocity(predict, x, i / num_steps)
        end = _velocity(predict, x + start / num_steps, (i + 1) / num_steps)
        x = x + (start + end) / (2 * num_steps)
    return x


def dopri5(predict: Predict, x: Tensor) -> Tensor:
    """Follow the velocity from t = 0 to 1 with Dormand and Prince's adaptive steps of order 5, by torchdiffeq.

    A step's error is the root mean square over the whole batch, as the authors have it: images share their steps.
    """
    from torchdiffeq import odeint

    times = torch.tensor([0.0, 1.0], dtype=torch.float64, device=x.device)
    return odeint(lambda t, x: _velocity(predict, x, float(t)), x, times, rtol=DOPRI5_RTOL, atol=DOPRI5_ATOL,
                  method="dopri5")[-1]


def ancestral(predict: Predict, x: Tensor, schedule: Schedule, step_noise: StepNoise, *, clip: bool) -> Tensor:
    """Draw each x_{t-1} from the learned reverse step (Ho et al. 2020, Algorithm 2, with learned variance).

    The last step adds no noise, so `step_noise` is called for one step less than the chain has.
    """
    for i, step in enumerate(reversed(range(len(schedule)))):
        c = schedule.at(step)
        x0, _, variance_output = _estimate(predict, x, int(schedule.timesteps[step]), c, clip)
        x = c.posterior_mean(x0, x)
        if step > 0:
            x = x + (c.log_variance(variance_output) / 2).exp() * step_noise(i)
    return x


def ddim(predict: Predict, x: Tensor, schedule: Schedule, step_noise: StepNoise | None, *, eta: float,
         clip: bool) -> Tensor:
    """Take DDIM steps (Song et al. 2020, arXiv 2010.02502, eq. 12 and 16); eta 0 is deterministic.

    `step_noise` is None at eta 0; else it is called for every step but the last.
    """
    for i, step in enumerate(reversed(range(len(schedule)))):
        x0, eps, _ = _estimate(predict, x, int(schedule.timesteps[step]), schedule.at(step), clip)
        alpha_prev = float(schedule.alphas_cumprod_prev[step])
        sigma = eta * math.sqrt(schedule.posterior_variance[step])
        x = math.sqrt(alpha_prev) * x0 + math.sqrt(1 - alpha_prev - sigma**2) * eps
        if step_noise is not None and step > 0:
            x = x + sigma * step_noise(i)
    return x


def _velocity(predict: Predict, x: Tensor, time: float) -> Tensor:
    t = torch.full((x.shape[0],), time, dtype=torch.float32, device=x.device)
    return predict(x, t)[:, : x.shape[1]]


def _estimate(predict: Predict, x: Tensor, timestep: int, c: Coefficients, clip: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the estimates of x_0 and of the noise, which agree with each other, and the variance output."""
    t = torch.full((x.shape[0],), timestep, dtype=torch.int64, device=x.device)
    eps, variance_output = predict(x, t).split(x.shape[1], dim=1)
    x0 = c.x0_from_eps(x, eps)
    if clip:
        x0 = x0.clamp(-1, 1)
        eps = c.eps_from_x0(x, x0)
    return x0, eps, variance_output
