"""What a model holds and what a call activates: parameters by part, three counts, multiply-adds.

Counted on the meta device from the modules themselves, in seconds at any size. Three counts are reported
(DiffMoE, appendix C), because published numbers differ in which they mean:

    paper   Eq. 40: (dense + C * expert) / (dense + E * expert) x FFN + the rest, where FFN includes routers and
            predictors
    strict  what runs on every token counts whole (router, predictor, shared experts), experts by C of E
    FLOPs   of one network call on one image, by torch's own counter
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffmoe.config import ModelConfig, Parallel, RunConfig
from diffmoe.models.dit import DiT
from diffmoe.moe.routing import Routing

PREDICTOR = ".router.predictor."
STATE_BYTES = 20
"""A parameter in training: float32 weight, two moments, average; gradient, in float32 or in bf16 beside a bf16 copy."""
COPY_BYTES = 4
"""Of these, a copy and its gradient in bf16."""
GATHERED_BYTES = 2
"""Beside these, a parameter that FSDP has gathered in bf16."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part; `positions` is a fixed table and in none of them."""

    dense_ffn: int
    """Feed-forward networks that every token passes, shared experts among them."""
    experts: int
    """Routed experts, all E of them."""
    routers: int
    """Gates."""
    predictors: int
    """Capacity predictors."""
    rest: int
    """Attention, adaLN, embeddings, final layer."""
    num_experts: int
    """E; 1 for a dense model."""
    predictors_work: bool
    """Whether inference asks the predictors; static inference does not."""

    @property
    def total(self) -> int:
        """Everything."""
        return self.dense_ffn + self.experts + self.routers + self.predictors + self.rest

    @property
    def total_without_predictors(self) -> int:
        """What Table 1 prints as total for S and B."""
        return self.total - self.predictors

    def activated_paper(self, capacity: float) -> float:
        """Return the paper's average activated parameters (Eq. 40) at a measured capacity C."""
        per_expert = self.experts / self.num_experts
        ffn = self.dense_ffn + self.experts
        share = (self.dense_ffn + capacity * per_expert) / ffn
        return share * (ffn + self.routers + self.predictors) + self.rest

    def activated_strict(self, capacity: float) -> float:
        """Return the parameters that work on an average token at a measured capacity C."""
        idle = 0 if self.predictors_work else self.predictors
        return self.total - idle - self.experts + capacity * self.experts / self.num_experts


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count a configuration's parameters by part."""
    with torch.device("meta"):
        model = DiT(config)
    parts = dict.fromkeys(("dense_ffn", "experts", "routers", "predictors", "rest"), 0)
    for name, parameter in model.named_parameters():
        part = ("predictors" if PREDICTOR in name else "routers" if ".router." in name else
                "experts" if ".ffn.experts." in name else "dense_ffn" if ".ffn." in name else "rest")
        parts[part] += parameter.numel()
    inference = getattr(config.moe.router, "inference", None) if config.moe else None
    return ParameterCount(**parts, num_experts=config.moe.num_experts if config.moe else 1,
                          predictors_work=inference != "static")


def flops_per_call(config: ModelConfig, capacity: float = 1.0) -> float:
    """Return the floating-point operations of one call on one image at a measured capacity C.

    A multiply-add counts as two. Products and attention are counted; norms, activations and biases, as is usual,
    are not.
    """
    without_experts, num_layers = _flops_without_experts(config)
    expert = 4 * config.hidden_size * config.expert_size  # on one token: two products of D x F
    return without_experts + capacity * config.num_tokens * expert * num_layers


@functools.cache  # a second at the paper's sizes
def _flops_without_experts(config: ModelConfig) -> tuple[float, int]:
    """Return the operations of a call on one image but for the routed experts', and the layers that have such."""
    batch = config.moe.num_experts if config.moe else 1  # so that every expert finds a token
    with torch.device("meta"):
        model = DiT(config).eval()
        inputs = (torch.empty(batch, config.in_channels, config.input_size, config.input_size),
                  torch.empty(batch), torch.empty(batch, dtype=torch.int64))
    for layer in model.moe_layers().values():
        layer.experts = _NoExperts()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs, row_bound=1.0)
    return counter.get_total_flops() / batch, len(model.moe_layers())


class _NoExperts(torch.nn.Module):
    """Stands for the experts, which `flops_per_call` adds by capacity."""

    def forward(self, x_SD: Tensor, routing: Routing) -> Tensor:
        return x_SD


def state_bytes(config: RunConfig, num_parameters: int, processes: int = 1) -> int:
    """Return the bytes of weights, gradients, moments and averages on each of some processes, a GPU each.

    Where bf16 copies train, a process has them and their gradients whole and a share of all else; under FSDP, a share
    of everything, and beside it what is gathered for products. DDP without copies has all whole.
    """
    state, share = STATE_BYTES + 4 * len(config.training.extra_ema_half_lives), 1 / processes
    if config.trains_copies(processes, "cuda"):
        return math.ceil((COPY_BYTES + (state - COPY_BYTES) * share) * num_parameters)
    if processes > 1 and config.runtime.parallel is Parallel.FSDP:
        return math.ceil((GATHERED_BYTES + state * share) * num_parameters)
    return state * num_parameters
