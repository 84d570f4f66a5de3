"""Weights and thresholds for timing inference of an untrained network: dynamic, at a chosen capacity and load.

A network as it starts computes zero behind its gates, and thresholds of zero let every expert take every token. So
zero matrices are drawn at random, and each expert's threshold is put where the share of tokens that it shall take
passes, over all steps of a sampling run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from diffmoe.config import ConfigError, ModelConfig, RunConfig
from diffmoe.data.images import seeded_generator
from diffmoe.evaluation.sampling import sample_images
from diffmoe.models.dit import DiT, build_model
from diffmoe.training.parallel import shared_out, whole

STD = 0.02
PASSES = 2
"""Sampling runs of a calibration: the first sets each call's own thresholds, since one layer's move the next's tokens;
the second finds those for all calls."""
FEWEST_IMAGES, MOST_IMAGES = 16, 512
"""Images of a calibration: those of the batch to be timed, between these."""


@torch.no_grad()
def drawn_model(config: ModelConfig, device: torch.device) -> DiT:
    """Return a network of seed 0 on `device` without zero matrices; the same one for the same configuration."""
    with torch.device(device):
        model = build_model(config, 0)
    return fill_zeros(model)


@torch.no_grad()
def fill_zeros(model: DiT) -> DiT:
    """Draw the matrices that start at zero and put thresholds at one half; returns the model."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not whole(parameter).any():
            drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            drawn.normal_(std=STD, generator=seeded_generator("bench", name, device=parameter.device))
            parameter.copy_(shared_out(drawn, parameter))
    for layer in model.moe_layers().values():
        if hasattr(layer.router, "threshold"):
            layer.router.threshold.fill_(0.5)
    return model


def expert_rates(config: ModelConfig, load: str, record: Path | None) -> Tensor:
    """Return the experts' share of tokens, float32 (L, E); each layer's sum is 1, the capacity to reach.

    Args:
        load: `balanced`, or `skewed`: each layer as one of `record`'s (its `activation.expert_load`), where another
            number of experts takes points of the sorted curve.

    Raises:
        ConfigError: for `skewed` without a record that holds a load.
    """
    layers = sum(config.is_moe_block(index) for index in range(config.depth))
    experts = config.moe.num_experts
    if load == "balanced":
        return torch.full((layers, experts), 1 / experts)
    if record is None:
        raise ConfigError("load skewed: name the record of a trained model with --expert-load FILE.json")
    try:
        measured = torch.tensor(json.loads(record.read_text())["activation"]["expert_load"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{record}: holds no expert load ({error}); use the record of a mixture") from None
    rows = [measured[layer * len(measured) // layers] for layer in range(layers)]
    if measured.shape[1] != experts:
        rows = [torch.nn.functional.interpolate(row.sort().values[None, None], experts, mode="linear",
                                                align_corners=True).flatten() for row in rows]
    return torch.stack([row / row.sum() for row in rows])


def calibrate(model: DiT, config: RunConfig, rates_LE: Tensor) -> list[Tensor]:
    """Set the thresholds so that expert e of layer l takes the share rates[l, e] of tokens; return them.

    Args:
        model: in eval mode, with a capacity predictor in each router.
        config: its `sampling` is the run over which the shares are reached.
    """
    routers = [layer.router for layer in model.moe_layers().values()]
    num_images = min(max(config.sampling.batch_size, FEWEST_IMAGES), MOST_IMAGES)
    few = replace(config, sampling=replace(config.sampling, batch_size=num_images))
    for number in range(PASSES):
        seen: list[list[Tensor]] = [[] for _ in routers]
        hooks = [router.register_forward_pre_hook(_watch(seen[layer], rates_LE[layer] if number == 0 else None))
                 for layer, router in enumerate(routers)]
        try:
            sample_images(model, few, range(num_images))
        finally:
            for hook in hooks:
                hook.remove()
        for router, probabilities, rates_E in zip(routers, seen, rates_LE, strict=True):
            router.threshold.copy_(_thresholds(torch.cat(probabilities), rates_E))
    return [router.threshold.clone() for router in routers]


def set_thresholds(model: DiT, thresholds: Sequence[Tensor]) -> None:
    """Set what `calibrate` returned."""
    for layer, threshold in zip(model.moe_layers().values(), thresholds, strict=True):
        layer.router.threshold.copy_(threshold)


def _watch(seen: list[Tensor], rates_E: Tensor | None):
    """Return a hook that keeps a call's probabilities and, given rates, sets the thresholds for this call alone."""
    def hook(router: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        probabilities_SE = router.probabilities(inputs[0])
        seen.append(probabilities_SE)
        if rates_E is not None:
            router.threshold.copy_(_thresholds(probabilities_SE, rates_E))

    return hook


def _thresholds(probabilities_SE: Tensor, rates_E: Tensor) -> Tensor:
    """Return the values that exactly the given share of each column is above (but for ties)."""
    order_SE = probabilities_SE.sort(dim=0, descending=True).values
    above_E = (rates_E.to(order_SE.device) * len(order_SE)).round().long().clamp(max=len(order_SE) - 1)
    return order_SE.gather(0, above_E[None])[0]
