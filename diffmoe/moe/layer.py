"""The mixture-of-experts layer: a router decides, the bank computes, shared experts see every token."""

from __future__ import annotations

from torch import Tensor, nn

from diffmoe.config import ModelConfig, resolve_router
from diffmoe.models.kernels import product_dtype
from diffmoe.models.layers import FeedForward
from diffmoe.moe.experts import ExpertBank
from diffmoe.moe.routing import Router, Routing, without_autocast


class MoE(nn.Module):
    """Replaces the feed-forward network of a block.

    Args:
        config: the backbone's configuration, with `config.moe` set.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.moe
        self.router: Router = resolve_router(moe.router.kind)(config, moe)
        self.experts = ExpertBank(moe.num_experts, config.hidden_size, config.expert_size)
        self.shared = None
        if moe.shared_experts:  # n networks of width F side by side are one of width n*F
            self.shared = FeedForward(config.hidden_size, moe.shared_experts * config.expert_size)

    def forward(self, x_BTD: Tensor, row_bound: float | None = None) -> tuple[Tensor, Routing]:
        """Return the layer's output (B, T, D) and the routing it used."""
        x_BTD = x_BTD.to(product_dtype(x_BTD))  # the router sees what the experts see
        routing = self.route(x_BTD, row_bound)
        y_BTD = self.experts(x_BTD.flatten(0, 1), routing).view_as(x_BTD)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        return y_BTD, routing

    def route(self, x_BTD: Tensor, row_bound: float | None = None) -> Routing:
        """Call the router, whose products are float32 (float64 stays) whatever the precision around it."""
        with without_autocast(x_BTD.device):
            return self.router(x_BTD, row_bound)
