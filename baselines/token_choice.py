"""Token choice (TC): each token takes its top-k experts, with a load-balancing loss.

The router of DiT-MoE and of the DiffMoE paper's TC baseline. Capacity is k: each token has exactly k experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffmoe.config import ModelConfig, MoEConfig, PoolScope, RouterConfig, require
from diffmoe.moe.routing import Router, Routing, SeededGenerator


@dataclass(frozen=True, kw_only=True)
class TokenChoiceConfig(RouterConfig):
    """Options of token choice."""

    balance_loss_weight: float = 0.01
    """Weight of the load-balancing loss, summed over layers."""


class TokenChoice(Router):
    """Tokens choose experts; selection is the same in training and at inference."""

    Config = TokenChoiceConfig

    def __init__(self, model: ModelConfig, moe: MoEConfig) -> None:
        super().__init__(model, moe)
        self.top_k = int(moe.capacity)
        self.balance_loss_weight = moe.router.balance_loss_weight

    def forward(self, x_BTD: Tensor, row_bound: float | None = None) -> Routing:
        """Route every token to its top-k experts: always S * k pairs."""
        scores_SE = self.scores(x_BTD)
        chosen_Sk = scores_SE.topk(self.top_k, sorted=False).indices
        mask_SE = torch.zeros_like(scores_SE, dtype=torch.bool).scatter_(1, chosen_Sk, True)
        routing = Routing.from_mask(mask_SE, scores_SE, num_rows=chosen_Sk.numel())
        if self.training:
            # sum_e f_e P_e: f_e is E times the share of assignments, P_e the mean score; gradient through P only.
            counts_E = self.world.sum(routing.counts(self.num_experts))
            share_E = self.num_experts * counts_E / (chosen_Sk.numel() * self.world.size)
            balance = (share_E * scores_SE.mean(0)).sum()
            routing.losses["balance"] = self.balance_loss_weight * balance
        return routing

    def initialise(self, generator: SeededGenerator) -> None:
        """Set the gate to U(-1/sqrt(D), 1/sqrt(D)), the released code's rule for TC."""
        bound = self.gate.in_features**-0.5
        nn.init.uniform_(self.gate.weight, -bound, bound, generator=generator("gate.weight"))

    @classmethod
    def pool_images(cls, moe: MoEConfig, batch_size: int) -> int:
        """Return 1: selection is the token's own, and the balance loss is averaged over micro-batches, as is usual.

        With `pool_scope: global`, the batch: its load is counted whole.
        """
        return batch_size if moe.pool_scope is PoolScope.GLOBAL else 1

    @classmethod
    def check(cls, model: ModelConfig, moe: MoEConfig) -> None:
        """Require a whole number of experts a token."""
        require(moe.capacity == int(moe.capacity) and 1 <= moe.capacity <= moe.num_experts, "model.moe.capacity",
                moe.capacity, f"token choice needs a whole number from 1 to num_experts={moe.num_experts}")
        require(moe.router.balance_loss_weight >= 0, "model.moe.router.balance_loss_weight",
                moe.router.balance_loss_weight, "use 0 or more")
