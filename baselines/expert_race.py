"""Expert Race (Yuan et al. 2025, arXiv 2503.16057): one top-k over all token-expert pairs of the batch.

The S * C best pairs win, whichever token and expert they belong to, so both loads are ragged. At inference a
pair is computed when its score passes the threshold, an average of the last winner's score in training.
Scores are the logits themselves (the paper's identity gating). The paper adds two losses to the rule: router
similarity, an option here, and a per-layer regularisation of the backbone, which is not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffmoe.config import ModelConfig, MoEConfig, RouterConfig, require
from diffmoe.moe.routing import Router, Routing, largest, row_count

THRESHOLD_DECAY = 0.95


@dataclass(frozen=True, kw_only=True)
class ExpertRaceConfig(RouterConfig):
    """Options of the race."""

    similarity_loss_weight: float = 0.0
    """Weight of the router-similarity loss, summed over layers."""


class ExpertRace(Router):
    """All pairs of the batch compete."""

    Config = ExpertRaceConfig

    def __init__(self, model: ModelConfig, moe: MoEConfig) -> None:
        super().__init__(model, moe)
        self.similarity_loss_weight = moe.router.similarity_loss_weight
        self.register_buffer("threshold", torch.zeros(1))

    def forward(self, x_BTD: Tensor, row_bound: float | None = None) -> Routing:
        """Take the S * C best pairs in training, at inference every pair above the threshold."""
        scores_SE = self.scores(x_BTD)
        if not self.training:
            rows = row_count(row_bound, *scores_SE.shape)
            return Routing.from_mask(scores_SE > self.threshold, scores_SE, num_rows=rows)
        everywhere_SE = self.world.gather(scores_SE)  # of this process alone, unless `pool_scope: global`
        num_pairs = int(len(everywhere_SE) * self.capacity)
        mask, last_score = largest(everywhere_SE.flatten(), num_pairs)
        mask_SE = mask.view_as(everywhere_SE)[self.world.share(len(everywhere_SE))]
        rows = num_pairs if self.world.size == 1 else row_count(row_bound, *scores_SE.shape)
        routing = Routing.from_mask(mask_SE, scores_SE, num_rows=rows, observed=last_score[None])
        if self.similarity_loss_weight:
            routing.losses["similarity"] = self.similarity_loss_weight * self.similarity(scores_SE, mask_SE)
        return routing

    def similarity(self, scores_SE: Tensor, mask_SE: Tensor) -> Tensor:
        """Return the router similarity (Yuan et al. 2025, Eq. 9 to 11), a scalar: 1 without any preference.

        Two experts are as similar as their probabilities' inner product over the tokens. It is weighted by how many
        tokens took both, relative to the mean over pairs of experts, and an expert's own by its relative load: experts
        chosen together grow apart, and a crowded one loses probability. Gradient through the probabilities only.
        """
        num_experts, p_SE, taken_SE = self.num_experts, scores_SE.softmax(-1), mask_SE.to(scores_SE.dtype)
        both_EE = self.world.sum(taken_SE.T @ taken_SE)
        load_E = both_EE.diagonal()
        alone_EE, shared_EE = load_E.diag(), both_EE - load_E.diag()
        weight_EE = (num_experts * alone_EE / alone_EE.sum()
                     + num_experts * (num_experts - 1) * shared_EE / shared_EE.sum().clamp(min=1))
        return (weight_EE * (p_SE.T @ p_SE)).sum() / len(p_SE)

    def scores(self, x_BTD: Tensor) -> Tensor:
        """Return the logits: a softmax would hide which tokens need experts most."""
        return self.logits(x_BTD)

    def passes(self, x_BTD: Tensor) -> Tensor:
        """Return the pairs whose score is above the threshold, bool (S, E)."""
        return self.scores(x_BTD) > self.threshold

    def update(self, observed: Tensor, num_updates: int) -> None:
        """Follow the score of the last winner; the average starts at the first one seen."""
        self.threshold.lerp_(observed.to(self.threshold.dtype), 1 - THRESHOLD_DECAY if num_updates else 1.0)

    @classmethod
    def check(cls, model: ModelConfig, moe: MoEConfig) -> None:
        """Require no more pairs than there are, and a loss that is one."""
        require(moe.capacity <= moe.num_experts, "model.moe.capacity", moe.capacity,
                f"use at most num_experts={moe.num_experts}")
        weight = moe.router.similarity_loss_weight
        require(weight >= 0, "model.moe.router.similarity_loss_weight", weight, "use 0 or more")

    @classmethod
    def check_batch(cls, model: ModelConfig, moe: MoEConfig, batch_size: int) -> None:
        """Require a pair to win."""
        require(batch_size * model.num_tokens * moe.capacity >= 1, "model.moe.capacity", moe.capacity,
                "no pair of a batch would win: use more")
