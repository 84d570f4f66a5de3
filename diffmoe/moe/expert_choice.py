"""Expert choice over a pool of tokens: DiffMoE (pool `batch`) and EC-DiT (pool `sample`) are one class.

Training (DiffMoE section 3, Algorithm 1): the S tokens are laid out in P pools of n tokens; in each, every
expert takes its k = n/E * C highest-scoring tokens. A capacity predictor learns that selection from detached
tokens by binary cross-entropy, and an exponential average follows the k-th largest predicted probability.

Inference: `static` repeats the training rule. `dynamic` counts, for each expert and pool, the tokens whose
predicted probability is above the expert's threshold; with `selection: gate` (the authors' rule) that many
tokens are taken by gate score, with `selection: predictor` each token passes on its own.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from diffmoe.config import INFERENCE, ModelConfig, MoEConfig, PoolScope, RouterConfig, require
from diffmoe.models.kernels import HAS_TRITON, selection_kernels_apply
from diffmoe.moe.float32 import CapacityPredictor
from diffmoe.moe.routing import Router, Routing, largest, row_count, tokens_an_expert_takes
from diffmoe.training.distributed import ALONE

if HAS_TRITON:
    from diffmoe.moe.selection_kernels import take_largest


class Pool(enum.StrEnum):
    """Where an expert looks for its tokens: one image (EC, level L2) or the batch (DiffMoE, level L3)."""

    SAMPLE = "sample"
    BATCH = "batch"


class Inference(enum.StrEnum):
    """static: the training rule; dynamic: the predictor decides how many tokens an expert takes."""

    STATIC = "static"
    DYNAMIC = "dynamic"


class Selection(enum.StrEnum):
    """gate: the predictor says how many and the gate score which; predictor: each token for itself."""

    GATE = "gate"
    PREDICTOR = "predictor"


class GateNormalisation(enum.StrEnum):
    """What makes the gate's logits the weights of pairs; every choice but the softmax leaves a token's sum free."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    IDENTITY = "identity"


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceConfig(RouterConfig):
    """The axes of the paper's ablations."""

    pool: Pool = Pool.BATCH
    """The pool of a selection."""
    pool_images: int | None = None
    """Images a training pool of `batch`; null: the whole batch that the router is given."""
    predictor: bool = True
    """Train a capacity predictor; false saves its parameters and leaves static inference only."""
    predictor_loss_weight: float = 1.0
    """Weight of the predictor's cross-entropy, summed over layers (the released configuration: 1)."""
    threshold_decay: float = 0.95
    """Decay of the threshold's average, a step."""
    threshold_debias: bool = False
    """Correct the average for starting at zero; false is the authors' rule."""
    warmup_steps: int = 0
    """First optimiser steps, in which experts take tokens in turn, whatever the scores; 0 is the paper's rule."""
    gate_normalisation: GateNormalisation = GateNormalisation.SOFTMAX
    """softmax over experts (Algorithm 1, the released code); sigmoid; identity: Eq. 5 as it is printed."""
    inference: Inference = field(default=Inference.DYNAMIC, metadata=INFERENCE)
    """How many tokens an expert takes at inference."""
    selection: Selection = field(default=Selection.GATE, metadata=INFERENCE)
    """Which tokens an expert takes in dynamic inference."""
    global_threshold: float | None = field(default=None, metadata=INFERENCE)
    """One threshold for all experts and layers in place of the averages (the paper's interval search)."""
    calibration_batches: int = field(default=0, metadata=INFERENCE)
    """Training batches on which the averaged network's thresholds are measured anew; 0 keeps the training's (paper)."""


class ExpertChoice(Router):
    """Experts choose tokens; see the file's docstring."""

    Config = ExpertChoiceConfig
    options: ExpertChoiceConfig

    def __init__(self, model: ModelConfig, moe: MoEConfig) -> None:
        super().__init__(model, moe)
        if self.options.predictor:
            self.predictor = CapacityPredictor(model.hidden_size, moe.num_experts)
            self.register_buffer("threshold", torch.zeros(moe.num_experts))
        if self.options.warmup_steps:
            self.register_buffer("warming", torch.ones(()))  # on the device: a graph holds both rules

    @property
    def equal_rows(self) -> bool:
        """Whether the training rule is at work, on the tokens of this process alone."""
        if not self.training:
            return self.options.inference is Inference.STATIC
        return self.world.size == 1 or self.pool_scope is PoolScope.PROCESS or self.options.pool is Pool.SAMPLE

    def forward(self, x_BTD: Tensor, row_bound: float | None = None) -> Routing:
        """Select by the training rule in training mode or static inference, else by the predictor."""
        scores_SE = self.scores(x_BTD)
        if self.training:
            return self._train(x_BTD, scores_SE, row_bound)
        if self.options.inference is Inference.STATIC:
            return self._static(scores_SE, scores_SE, None, self._num_pools(x_BTD))
        return self._dynamic(x_BTD, scores_SE, row_bound)

    def update(self, observed: Tensor, num_updates: int) -> None:
        """Move the thresholds: decay * threshold + (1 - decay) * quantile (DiffMoE section 3.3)."""
        decay = self.options.threshold_decay
        share = 1 - decay
        if self.options.threshold_debias:  # the weight that makes the average of n terms sum to one
            share /= 1 - decay ** (num_updates + 1)
        self.threshold.lerp_(observed.to(self.threshold.dtype), share)
        if self.options.warmup_steps:
            self.warming.fill_(num_updates + 1 < self.options.warmup_steps)

    def scores(self, x_BTD: Tensor) -> Tensor:
        """Return the weight that each pair would get, float32 (S, E)."""
        logits_SE = self.logits(x_BTD)
        match self.options.gate_normalisation:
            case GateNormalisation.SOFTMAX:
                return logits_SE.softmax(-1)
            case GateNormalisation.SIGMOID:
                return logits_SE.sigmoid()
            case GateNormalisation.IDENTITY:
                return logits_SE

    def probabilities(self, x_BTD: Tensor) -> Tensor:
        """Return the predicted probability that each expert takes each token, float32 (S, E)."""
        return self.predictor(x_BTD.flatten(0, 1)).sigmoid()

    def passes(self, x_BTD: Tensor) -> Tensor | None:
        """Return the pairs whose predicted probability is above the expert's threshold, bool (S, E)."""
        if not self.options.predictor:
            return None
        threshold = self.threshold if self.options.global_threshold is None else self.options.global_threshold
        return self.probabilities(x_BTD) > threshold

    def _num_pools(self, x_BTD: Tensor) -> int:
        num_samples = x_BTD.shape[0]
        if self.options.pool is Pool.SAMPLE:
            return num_samples
        if not self.training or self.options.pool_images is None:
            return 1
        require(num_samples % self.options.pool_images == 0, "model.moe.router.pool_images", self.options.pool_images,
                f"make the batch of {num_samples} images a whole number of pools")
        return num_samples // self.options.pool_images

    def _ranks(self, x_BTD: Tensor, scores_SE: Tensor) -> Tensor:
        """Return what experts choose by in training, (S, E): the scores, once tokens are no longer taken in turn.

        In turn, position t of image b is first choice of expert (b + t) mod E, then of the one before. Images lie in
        random order, so that an expert sees a fair share of all positions, classes and times.
        """
        if not self.options.warmup_steps:
            return scores_SE
        num_samples, num_tokens = x_BTD.shape[:2]
        image_B1 = torch.arange(num_samples, device=x_BTD.device)[:, None] + self.world.rank * num_samples
        token_S1 = (image_B1 + torch.arange(num_tokens, device=x_BTD.device)).view(-1, 1)
        turn_SE = (torch.arange(self.num_experts, device=x_BTD.device) - token_S1) % -self.num_experts
        return torch.where(self.warming > 0, turn_SE.to(scores_SE.dtype), scores_SE)

    def _static(self, ranks_SE: Tensor, scores_SE: Tensor, logits_SE: Tensor | None, num_pools: int) -> Routing:
        """Take the k highest ranks of each expert and pool; of a predictor's logits, observe the k-th highest."""
        pool_tokens = scores_SE.shape[0] // num_pools
        k = tokens_an_expert_takes(pool_tokens, self.num_experts, self.capacity, "a pool")
        if selection_kernels_apply(scores_SE):
            seen_SE = _beside(ranks_SE, logits_SE)
            counts = torch.full((seen_SE.shape[1], num_pools), k, dtype=torch.int32, device=scores_SE.device)
            taken, least = take_largest(seen_SE.t(), counts)
            routing = Routing.from_mask(taken[:self.num_experts].t(), scores_SE,
                                        num_rows=num_pools * k * self.num_experts, equal=True)
            observed_EP = least[self.num_experts:]
        else:
            ranks_EPn, scores_EPn = (rearrange(each, "(p n) e -> e p n", p=num_pools) for each in (ranks_SE, scores_SE))
            index_EPk = ranks_EPn.topk(k, sorted=False).indices
            gate_EPk = scores_EPn.gather(2, index_EPk)
            first_P1 = torch.arange(num_pools, device=scores_SE.device)[:, None] * pool_tokens
            routing = Routing(token_N=(index_EPk + first_P1).flatten(), gate_N=gate_EPk.flatten(),
                              tokens_per_expert=num_pools * k)
            if logits_SE is not None:
                observed_EP = _least(rearrange(logits_SE.detach(), "(p n) e -> e p n", p=num_pools), k)
        if logits_SE is not None:
            routing.observed = observed_EP.sigmoid().mean(1)
        return routing

    def _train(self, x_BTD: Tensor, scores_SE: Tensor, row_bound: float | None) -> Routing:
        logits_SE = self.predictor(x_BTD.flatten(0, 1)) if self.options.predictor else None
        ranks_SE = self._ranks(x_BTD, scores_SE)
        if self.pool_scope is PoolScope.GLOBAL and self.options.pool is Pool.BATCH:
            routing = self._static_of_all(len(x_BTD), ranks_SE, scores_SE, logits_SE, row_bound)
        else:
            routing = self._static(ranks_SE, scores_SE, logits_SE, self._num_pools(x_BTD))
        if logits_SE is not None:
            chosen_SE = routing.mask(*scores_SE.shape)
            bce = F.binary_cross_entropy_with_logits(logits_SE, chosen_SE.to(logits_SE.dtype))
            routing.losses["predictor"] = self.options.predictor_loss_weight * bce
        return routing

    def _static_of_all(self, num_samples: int, ranks_SE: Tensor, scores_SE: Tensor, logits_SE: Tensor | None,
                       row_bound: float | None) -> Routing:
        """Take this process's pairs of the pools of all processes, with the quantile of those pools."""
        pool_images = self.options.pool_images or num_samples * self.world.size
        world = ALONE if num_samples % pool_images == 0 else self.world  # pools that end here need nobody else
        num_pools = num_samples * world.size // pool_images
        seen_EPn = rearrange(world.gather(_beside(ranks_SE, logits_SE)), "(p n) e -> e p n", p=num_pools)
        k = tokens_an_expert_takes(seen_EPn.shape[-1], self.num_experts, self.capacity, "a pool")
        taken_EPn, least_EP = largest(seen_EPn, k)
        taken_SE = rearrange(taken_EPn[:self.num_experts], "e p n -> (p n) e")
        taken_SE = taken_SE[world.share(len(taken_SE))]
        alone = world.size == 1
        rows = num_pools * k * self.num_experts if alone else row_count(row_bound, *scores_SE.shape)
        routing = Routing.from_mask(taken_SE, scores_SE, num_rows=rows, equal=alone)
        if logits_SE is not None:
            routing.observed = least_EP[self.num_experts:].sigmoid().mean(1)
        return routing

    def _dynamic(self, x_BTD: Tensor, scores_SE: Tensor, row_bound: float | None) -> Routing:
        passes_SE = self.passes(x_BTD)
        if self.options.selection is Selection.GATE:
            passes_SE = self._take_by_score(passes_SE, scores_SE, self._num_pools(x_BTD))
        return Routing.from_mask(passes_SE, scores_SE, num_rows=row_count(row_bound, *scores_SE.shape))

    @staticmethod
    def _take_by_score(passes_SE: Tensor, scores_SE: Tensor, num_pools: int) -> Tensor:
        """Replace the tokens that pass by as many with the highest scores, for each expert and pool."""
        count_PE = rearrange(passes_SE, "(p n) e -> p n e", p=num_pools).sum(1)
        if selection_kernels_apply(scores_SE):
            return take_largest(scores_SE.detach().t(), count_PE.t().int())[0].t()
        order_PnE = rearrange(scores_SE, "(p n) e -> p n e", p=num_pools).argsort(dim=1, descending=True, stable=True)
        rank_n = torch.arange(order_PnE.shape[1], device=scores_SE.device)
        taken_PnE = rank_n[None, :, None] < count_PE[:, None, :]
        return torch.zeros_like(taken_PnE).scatter_(1, order_PnE, taken_PnE).flatten(0, 1)

    @classmethod
    def pool_images(cls, moe: MoEConfig, batch_size: int) -> int:
        """Return the images of a training pool."""
        return 1 if moe.router.pool is Pool.SAMPLE else moe.router.pool_images or batch_size

    @classmethod
    def check(cls, model: ModelConfig, moe: MoEConfig) -> None:
        """Require a predictor for dynamic inference, sane numbers, and a token for each expert of an image's pool."""
        options: ExpertChoiceConfig = moe.router
        require(options.predictor or options.inference is Inference.STATIC, "model.moe.router.inference",
                options.inference.value, "dynamic inference needs predictor: true")
        require(options.pool is Pool.BATCH or options.pool_images is None, "model.moe.router.pool_images",
                options.pool_images, "pool: sample has one image a pool; leave it out")
        require(options.pool_images is None or options.pool_images >= 1, "model.moe.router.pool_images",
                options.pool_images, "use 1 or more")
        require(0 <= options.threshold_decay < 1, "model.moe.router.threshold_decay", options.threshold_decay,
                "use a number in [0, 1)")
        require(options.predictor_loss_weight >= 0, "model.moe.router.predictor_loss_weight",
                options.predictor_loss_weight, "use 0 or more")
        require(options.warmup_steps == 0 or (options.warmup_steps > 0 and options.predictor),
                "model.moe.router.warmup_steps", options.warmup_steps,
                "use 0, or with predictor: true a number above it")
        require(options.global_threshold is None or math.isfinite(options.global_threshold),
                "model.moe.router.global_threshold", options.global_threshold,
                "use a probability, or null for the averages")
        require(options.calibration_batches == 0 or (options.calibration_batches > 0 and options.predictor),
                "model.moe.router.calibration_batches", options.calibration_batches,
                "use 0, or with predictor: true a number above it")
        if options.pool is Pool.SAMPLE:
            tokens_an_expert_takes(model.num_tokens, moe.num_experts, moe.capacity, "an image")

    @classmethod
    def check_batch(cls, model: ModelConfig, moe: MoEConfig, batch_size: int) -> None:
        """Require whole pools with a token for each expert."""
        options: ExpertChoiceConfig = moe.router
        if options.pool is Pool.BATCH:
            images = cls.pool_images(moe, batch_size)
            require(batch_size % images == 0, "model.moe.router.pool_images", images,
                    f"make training.batch_size={batch_size} a multiple of it")
            tokens_an_expert_takes(images * model.num_tokens, moe.num_experts, moe.capacity, "a pool")


def _beside(ranks_SE: Tensor, logits_SE: Tensor | None) -> Tensor:
    """Return what a selection looks at: the ranks and, behind them, a predictor's logits, (S, E or 2 E)."""
    return (ranks_SE if logits_SE is None else torch.cat([ranks_SE, logits_SE], 1)).detach()


def _least(values_EPn: Tensor, k: int) -> Tensor:
    """Return the k-th largest value of each expert and pool, (E, P)."""
    return values_EPn.topk(k, sorted=False).values.amin(-1)
