"""Expert Race (Yuan et al. 2025, arXiv 2503.16057): one top-k over all token-expert pairs of the batch.

The S * C best pairs win, whichever token and expert they belong to, so both loads are ragged. At inference a
pair is computed when its score passes the threshold, an average of the last winner's score in training.
Scores are the logits themselves (the paper's identity gating). The paper's router-similarity loss and
per-layer regularisation are not part of the rule and not here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe.config import ModelConfig, MoEConfig, require
from diffmoe.moe.routing import Router, Routing, largest, row_count

THRESHOLD_DECAY = 0.95


class ExpertRace(Router):
    """All pairs of the batch compete."""

    def __init__(self, model: ModelConfig, moe: MoEConfig) -> None:
        super().__init__(model, moe)
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
        return Routing.from_mask(mask_SE, scores_SE, num_rows=rows, observed=last_score[None])

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
        """Require no more pairs than there are."""
        require(moe.capacity <= moe.num_experts, "model.moe.capacity", moe.capacity,
                f"use at most num_experts={moe.num_experts}")

    @classmethod
    def check_batch(cls, model: ModelConfig, moe: MoEConfig, batch_size: int) -> None:
        """Require a pair to win."""
        require(batch_size * model.num_tokens * moe.capacity >= 1, "model.moe.capacity", moe.capacity,
                "no pair of a batch would win: use more")
