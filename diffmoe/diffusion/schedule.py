"""The noise schedule of DDPM: float64 arrays of one chain, and the algebra at a timestep.

Names follow Ho et al. 2020 (arXiv 2006.11239), section 2; alphas_cumprod is their bar-alpha.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffmoe.config import require


class Coefficients(NamedTuple):
    """Constants at one step: floats, or tensors (B, 1, 1, 1) with a step for each sample."""

    signal: float | Tensor
    """sqrt(bar-alpha_t): x_t = signal x_0 + noise eps."""
    noise: float | Tensor
    """sqrt(1 - bar-alpha_t)."""
    posterior_x0: float | Tensor
    """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
    posterior_xt: float | Tensor
    """Weight of x_t in the same mean."""
    min_log_variance: float | Tensor
    """log of the posterior variance, clipped at the first step where it is 0."""
    max_log_variance: float | Tensor
    """log beta_t."""

    def x0_from_eps(self, x_t: Tensor, eps: Tensor) -> Tensor:
        """Return the clean image that the noise `eps` implies."""
        return (x_t - self.noise * eps) / self.signal

    def eps_from_x0(self, x_t: Tensor, x0: Tensor) -> Tensor:
        """Return the noise that the clean image `x0` implies."""
        return (x_t - self.signal * x0) / self.noise

    def posterior_mean(self, x0: Tensor, x_t: Tensor) -> Tensor:
        """Return the mean of q(x_{t-1} | x_t, x_0), Ho et al. eq. 7."""
        return self.posterior_x0 * x0 + self.posterior_xt * x_t

    def log_variance(self, output: Tensor) -> Tensor:
        """Interpolate between the bounds by `output`, -1 to 1 (Nichol and Dhariwal 2021, eq. 15)."""
        share = (output + 1) / 2
        return share * self.max_log_variance + (1 - share) * self.min_log_variance


class Schedule:
    """One chain: step i of `len(schedule)` is the original timestep `timesteps[i]`, ascending.

    Attributes:
        betas, alphas_cumprod, alphas_cumprod_prev, posterior_variance, posterior_log_variance_clipped: float64.
        timesteps: int64.
    """

    def __init__(self, betas: np.ndarray, timesteps: np.ndarray) -> None:
        self.betas = betas
        self.timesteps = timesteps
        self.alphas_cumprod = np.cumprod(1 - betas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        remaining = (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_variance = betas * remaining
        # The first step has variance 0, whose log is taken from the second.
        self.posterior_log_variance_clipped = np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))
        self._table = np.stack([
            np.sqrt(self.alphas_cumprod),
            np.sqrt(1 - self.alphas_cumprod),
            betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod),
            remaining * np.sqrt(1 - betas),
            self.posterior_log_variance_clipped,
            np.log(betas),
        ], axis=1)
        self._device_tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __len__(self) -> int:
        return len(self.betas)

    @classmethod
    def linear(cls, num_steps: int) -> Schedule:
        """Return the linear schedule of Ho et al., 1e-4 to 2e-2; the end points belong to 1000 steps."""
        return cls(np.linspace(1e-4, 2e-2, num_steps), np.arange(num_steps))

    def respace(self, num_steps: int) -> Schedule:
        """Return the chain of `num_steps` evenly spaced steps, first and last included, rounded half to even.

        Raises:
            ConfigError: unless 2 <= num_steps <= len(self).
        """
        require(2 <= num_steps <= len(self), "sampling.num_steps", num_steps,
                f"a chain of {len(self)} timesteps is sampled in 2 to {len(self)} steps")
        # One division of integers: the halves that are rounded to even are exact.
        kept = np.rint(np.arange(num_steps) * (len(self) - 1) / (num_steps - 1)).astype(np.int64)
        alphas_cumprod = self.alphas_cumprod[kept]
        betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        return Schedule(betas, self.timesteps[kept])

    def at(self, step: int) -> Coefficients:
        """Return the constants of one step as floats."""
        return Coefficients(*self._table[step].tolist())

    def at_each(self, steps: Tensor, dtype: torch.dtype) -> Coefficients:
        """Return the constants of the steps (B,), cast from float64 to `dtype`, on the device of `steps`."""
        key = (steps.device, dtype)
        if key not in self._device_tables:  # once: copying to a device waits for the work queued on it
            self._device_tables[key] = torch.from_numpy(self._table).to(dtype).to(steps.device)
        rows = self._device_tables[key][steps]
        return Coefficients(*rows[:, :, None, None, None].unbind(1))
