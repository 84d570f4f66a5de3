"""The linear maps of routers: float32 whatever precision surrounds them, and on a GPU on its matrix units all the same.

Shapes: see the legend in routing.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.models.kernels import HAS_TRITON, kernels_apply

if HAS_TRITON:
    from diffmoe.moe.router_kernels import MANY_ROWS, gate, predict, predict_only


class Float32Linear(nn.Linear):
    """A linear map that takes tokens of any precision to float32 (float64 stays); without a bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x_SD: Tensor) -> Tensor:
        """Map (S, D) to (S, O)."""
        if kernels_apply(x_SD):
            return gate(x_SD, self.weight)
        return F.linear(at_least_float32(x_SD), self.weight)


class CapacityPredictor(nn.Sequential):
    """Predicts from a token, with one hidden layer of its width, whether each expert takes it (DiffMoE section 3.3).

    The token is detached: no loss of the prediction can reach the backbone.
    """

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, num_experts))

    def forward(self, x_SD: Tensor) -> Tensor:
        """Map tokens (S, D) of any precision to logits (S, E), float32 (float64 stays)."""
        x_SD = x_SD.detach()
        if kernels_apply(x_SD):
            first, _, second = self
            weights = first.weight, first.bias, second.weight, second.bias
            if not torch.is_grad_enabled() and len(x_SD) >= MANY_ROWS:
                return predict_only(x_SD, *weights)
            return predict(x_SD, *weights)[0]
        return super().forward(at_least_float32(x_SD))


def at_least_float32(x: Tensor) -> Tensor:
    """Return float32 of what is less precise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
