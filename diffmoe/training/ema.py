"""Moving averages of the weights, which are sampled from."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from diffmoe.config import EmaBuffers
from diffmoe.training.parallel import local


def average_file(half_life_images: float | None = None, budget_images: int | None = None) -> str:
    """Name the file of a run's average.

    Args:
        half_life_images: None is the one of `training.ema_half_life_images`.
        budget_images: None is the end of the run.
    """
    half_life = "" if half_life_images is None else f"-{half_life_images:.15g}"
    return f"ema{half_life}{'' if budget_images is None else f'-at-{budget_images}'}.safetensors"


class Ema:
    """Average a model's parameters: e <- decay * e + (1 - decay) * v, starting from the model itself.

    Args:
        model: the model that trains; the average is a detached copy of it (`Ema.model`) in eval mode.
        buffers: COPY takes buffers (thresholds) as they are; AVERAGE averages them too, as the released code
            does, so that after n steps a threshold still holds decay^n of the zero that it started from.
        compiled: compile steps whose weight lies on the device.
    """

    def __init__(self, model: nn.Module, buffers: EmaBuffers = EmaBuffers.COPY, compiled: bool = False) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.buffers = buffers
        self.move = torch.compile(_move, dynamic=False) if compiled else _move

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float, unless: Tensor | None = None, *, weights: bool = True) -> None:
        """Take one step towards `model` (of the same structure).

        Args:
            unless: bool scalar on the model's device that turns this into no step, without waiting for it.
            weights: the parameters, too; else buffers alone (`OnePass` has moved the parameters).
        """
        averaged, current = (list(each.parameters()) if weights else [] for each in (self.model, model))
        if self.buffers is EmaBuffers.AVERAGE:
            averaged, current = averaged + list(self.model.buffers()), current + list(model.buffers())
        else:
            for copied, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
                copied.copy_(buffer)
        if not averaged:
            return
        averaged, values = local(averaged), local([value.detach() for value in current])
        if unless is None:
            torch._foreach_lerp_(averaged, values, 1 - decay)
        else:  # a weight that lies on the device
            self.move(averaged, values, (1 - decay) * (~unless).to(averaged[0].dtype))


def _move(averaged: list[Tensor], values: list[Tensor], weight: Tensor) -> None:
    """Move each average by a share of its distance; compiled, in one pass over all (lerp would be a kernel each)."""
    torch._foreach_add_(averaged, torch._foreach_mul(torch._foreach_sub(values, averaged), weight))
