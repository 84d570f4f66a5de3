"""The one trainer: diffusion loss plus the routers' losses, AdamW, a weight average.

What step n computes depends on (config, seed, n) alone: the images, noise, times and dropped labels are those of
the whole batch, of which a process takes its share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffmoe.config import Precision, RunConfig
from diffmoe.data import ImageData, ImageOrder
from diffmoe.data.images import seeded_generator, to_model_range
from diffmoe.diffusion import build_process
from diffmoe.models.dit import ModelOutput, build_model
from diffmoe.training.ema import Ema


@dataclass(frozen=True)
class Batch:
    """One optimiser step's inputs, B rows each."""

    images: Tensor
    """float32 (B, C, H, W) in [-1, 1]."""
    labels: Tensor
    """int64 (B,), the null label where dropped."""
    noise: Tensor
    """float32 like `images`."""
    times: Tensor
    """As the process draws them."""


class Trainer:
    """Trains one configuration with one seed.

    Args:
        config: the run.
        seed: of the initial weights, the order of images and every draw.
        data: the images; moved to `device` whole.
        device: where to train.
    """

    def __init__(self, config: RunConfig, seed: int, data: ImageData, device: torch.device) -> None:
        self.config = config
        self.seed = seed
        self.device = device
        self.data = data.to(device)
        self.order = ImageOrder(len(data.images), seed)
        self.process = build_process(config.diffusion)
        self.model = build_model(config.model, seed).to(device).train().set_backend(config.runtime.backend)
        self.network = torch.compile(self.model) if config.runtime.compile else self.model
        self.ema = Ema(self.model, config.training.ema_buffers)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.training.learning_rate, weight_decay=config.training.weight_decay,
            fused=device.type == "cuda")
        predictors = {id(parameter) for parameter in self.model.predictor_parameters()}
        self.clipped = [p for p in self.model.parameters() if id(p) not in predictors]
        self.step = 0

    def batch(self, step: int) -> Batch:
        """Draw the inputs of optimiser step `step` (from 0)."""
        training, model = self.config.training, self.config.model
        index = self.order.indices(step * training.batch_size, training.batch_size).to(self.device)
        generator = seeded_generator("step", self.seed, step, device=self.device)
        images = to_model_range(self.data.images[index])
        noise = torch.randn(images.shape, generator=generator, device=self.device)
        times = self.process.sample_times(len(images), generator=generator, device=self.device)
        labels = self.data.labels[index]
        if model.null_label is not None:
            dropped = torch.rand(labels.shape, generator=generator, device=self.device) < model.class_dropout_prob
            labels = torch.where(dropped, model.null_label, labels)
        return Batch(images, labels, noise, times)

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], ModelOutput]:
        """Return the named scalar losses whose sum is minimised, and the network's output."""
        seen: list[ModelOutput] = []

        def predict(x: Tensor, t: Tensor) -> Tensor:
            seen.append(self.network(x, t, batch.labels))
            return seen[0].prediction.float()

        bf16 = self.config.training.precision is Precision.BF16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            terms = self.process.loss(predict, batch.images, batch.noise, batch.times)
        return {name: term.mean() for name, term in terms.items()} | seen[0].losses(), seen[0]

    def train_step(self) -> dict[str, Tensor]:
        """Make one optimiser step and return its losses, detached and still on the device."""
        training = self.config.training
        losses, output = self.losses(self.batch(self.step))
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        if training.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.clipped, training.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = training.learning_rate * self._warmup_factor()
        self.optimizer.step()
        observed = [routing.observed for routing in output.routings if routing.observed is not None]
        if observed:
            self.model.update_routers(observed, self.step)
        self.ema.update(self.model, training.ema_decay)
        self.step += 1
        return {name: loss.detach() for name, loss in losses.items()}

    def _warmup_factor(self) -> float:
        warmup = self.config.training.warmup_images
        seen = (self.step + 1) * self.config.training.batch_size
        return 1.0 if warmup == 0 else min(1.0, seen / warmup)


def is_finite(losses: dict[str, float]) -> bool:
    """Say whether every loss is a number."""
    return all(math.isfinite(value) for value in losses.values())
