"""Measure a trained network's thresholds anew, in place of the average that training kept (an option; off)."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffmoe.config import RunConfig
from diffmoe.data import TrainingData
from diffmoe.models.dit import DiT
from diffmoe.training.trainer import Trainer


def calibration_batches(config: RunConfig) -> int:
    """Return the batches that `config` measures thresholds on; 0 where its router has no such option."""
    return getattr(config.model.moe and config.model.moe.router, "calibration_batches", 0)


def trainer_of(model: DiT, config: RunConfig, seed: int, data: TrainingData) -> Trainer:
    """Return an uncompiled trainer whose network is a copy of `model`, to see it under the training rule."""
    eager = replace(config, runtime=replace(config.runtime, compile=False))
    trainer = Trainer(eager, seed, data, model.positions.device)
    trainer.model.load_state_dict(model.state_dict())
    return trainer


@torch.no_grad()
def calibrate_thresholds(model: DiT, config: RunConfig, seed: int, data: TrainingData) -> DiT:
    """Set each threshold to what the training rule observes of `model` itself, mean over fresh training batches.

    Training averages what its moving weights showed; this is what the averaged weights show. Returns the model.
    """
    num_batches = calibration_batches(config)
    if num_batches == 0:
        return model
    trainer = trainer_of(model, config, seed, data)
    first = config.training.num_steps  # images, noise and times beyond the last step
    observed = [[routing.observed for routing in trainer.losses(trainer.batch(first + index))[1].routings]
                for index in range(num_batches)]
    for layer, values in zip(model.moe_layers().values(), zip(*observed, strict=True), strict=True):
        layer.router.threshold.copy_(torch.stack(values).mean(0))
    return model
