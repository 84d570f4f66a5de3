"""DDPM with learned sigma (Ho et al. 2020; Nichol and Dhariwal 2021, arXiv 2102.09672), 1000 linear steps.

The network predicts the noise (first C channels) and where its log variance lies between the bounds (last C).
The loss is L_hybrid of Nichol and Dhariwal, eq. 16, with the weight 1 of the released code (theirs: 0.001):

    mse  squared error of the noise
    vb   a term of the variational bound in bits, KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0 and
         -log p(x_0 | x_1) for t = 0; it trains the variance only, its mean is detached
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffmoe.config import ProcessKind, Sampler, SamplingConfig, require
from diffmoe.diffusion.process import Predict, Process, StepNoise
from diffmoe.diffusion.samplers import ancestral, ddim
from diffmoe.diffusion.schedule import Schedule


class DDPM(Process):
    """The discrete chain; times are int64 in [0, 1000), 0 the least noise."""

    kind = ProcessKind.DDPM
    samplers = (Sampler.DDIM, Sampler.ANCESTRAL)

    def __init__(self) -> None:
        self.schedule = Schedule.linear(1000)

    def sample_times(self, batch_size: int, *, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """Draw int64 timesteps (B,), uniform over the chain."""
        return torch.randint(len(self.schedule), (batch_size,), generator=generator, device=generator.device).to(device)

    def even_times(self, count: int) -> Tensor:
        """Return int64 timesteps: 950, 850 ... 50 for 10."""
        steps = len(self.schedule)
        return steps - steps * (2 * torch.arange(count) + 1) // (2 * count)

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t of q(x_t | x_0), Ho et al. eq. 4."""
        c = self.schedule.at_each(t, x.dtype)
        return c.signal * x + c.noise * noise

    def loss(self, predict: Predict, x: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Return `mse` and `vb` (bits), each (B,), mean over C, H, W."""
        x_t = self.add_noise(x, noise, t)
        eps, variance_output = predict(x_t, t).split(x.shape[1], dim=1)
        c = self.schedule.at_each(t, x.dtype)
        mean = c.posterior_mean(c.x0_from_eps(x_t, eps.detach()), x_t)
        log_variance = c.log_variance(variance_output)
        kl = gaussian_kl(c.posterior_mean(x, x_t), c.min_log_variance, mean, log_variance)
        nats = torch.where(t[:, None, None, None] == 0, -discretised_log_likelihood(x, mean, log_variance), kl)
        return {"mse": (eps - noise).square().mean((1, 2, 3)), "vb": nats.mean((1, 2, 3)) / math.log(2)}

    def _integrate(self, predict: Predict, noise: Tensor, config: SamplingConfig,
                   step_noise: StepNoise | None) -> Tensor:
        eta, clip = config.ddim_eta, config.clip_denoised
        require(0 <= eta <= 1, "sampling.ddim_eta", eta, "use a number in [0, 1]")
        schedule = self.schedule.respace(config.num_steps)
        if config.sampler is Sampler.DDIM and eta == 0:
            return ddim(predict, noise, schedule, None, eta=eta, clip=clip)
        if step_noise is None:
            raise ValueError(f"step_noise=None: {config.sampler} adds noise at each step; pass a function of the step")
        if config.sampler is Sampler.ANCESTRAL:
            return ancestral(predict, noise, schedule, step_noise, clip=clip)
        return ddim(predict, noise, schedule, step_noise, eta=eta, clip=clip)


def gaussian_kl(mean_q: Tensor, log_variance_q: Tensor | float, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """Return KL(q || p) of normal distributions in nats, elementwise."""
    log_ratio = log_variance_q - log_variance_p
    return (log_ratio.exp() - log_ratio - 1 + (mean_q - mean_p).square() * (-log_variance_p).exp()) / 2


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return log p of `x`, one of 256 levels in [-1, 1], under a normal distribution, in nats (Ho et al. eq. 13).

    The level's bin is x -+ 1/255; the bins at the ends reach to infinity.
    """
    inverse_std = (-log_variance / 2).exp()
    below = _normal_cdf((x - mean - 1 / 255) * inverse_std)
    upto = _normal_cdf((x - mean + 1 / 255) * inverse_std)
    below = torch.where(x < -0.999, 0.0, below)
    upto = torch.where(x > 0.999, 1.0, upto)
    return (upto - below).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Approximate the normal CDF by a tanh, as the released code does; the exact one differs by up to 2e-4."""
    return (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()) / 2
