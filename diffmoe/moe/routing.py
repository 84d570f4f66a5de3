"""The contract between routers and experts (design: a system is a router).

A `Router` decides which expert works on which token; a `Routing` is that decision as plain data, and the
only thing that passes from router to experts.

Shape legend, here and in every file of this package:
    B samples, T tokens a sample, S = B*T tokens, D width, E experts, F expert hidden width,
    N routed pairs (rows, pads included), P pools, k tokens an expert takes
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch._functorch.config
from torch import Tensor, nn

from diffmoe.config import ModelConfig, MoEConfig, RouterConfig, require
from diffmoe.models.kernels import HAS_TRITON, selection_kernels_apply
from diffmoe.moe.float32 import Float32Linear
from diffmoe.training.distributed import ALONE, World

if HAS_TRITON:
    from diffmoe.moe.selection_kernels import lay_out, take_largest

# torch.compile would trace a backward pass under the autocast around the call, also the part that the forward pass left
# out of it: routers' gradients would be bf16. Off, a gradient has the dtype of its forward product, as without compile.
torch._functorch.config.backward_pass_autocast = "off"

SeededGenerator = Callable[[str], torch.Generator]
"""Gives the generator of a named parameter, so that its initial value depends on (seed, name) alone."""


@dataclass(kw_only=True)
class Routing:
    """Token-expert pairs grouped by expert, with what the router reports.

    The row count N is known without asking the device, so that nothing waits for the host. With an int
    `tokens_per_expert` every expert has that many rows; with a tensor the rows are ragged, and rows behind
    the last pair are pads: they name token 0 with weight 0 and are neither computed nor combined.
    """

    token_N: Tensor
    """int64 token of each pair."""
    gate_N: Tensor
    """float32 weight of each pair; differentiable."""
    tokens_per_expert: int | Tensor
    """Rows of each expert: an int for all, or int32 (E,)."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Scalar auxiliary losses, weighted; the trainer adds them to the diffusion loss."""
    observed: Tensor | None = None
    """What `Router.update` needs once an optimiser step, for example each expert's quantile (E,)."""
    overflow: Tensor | None = None
    """bool scalar: more pairs were selected than there were rows; the call must be repeated with more."""
    row_SE: Tensor | None = None
    """int32 (S, E): the row of each token with each expert, -1 without one; only where a kernel laid out the rows."""

    def counts(self, num_experts: int) -> Tensor:
        """Return the pairs of each expert, int64 (E,)."""
        if isinstance(self.tokens_per_expert, int):
            return torch.full((num_experts,), self.tokens_per_expert, device=self.token_N.device)
        return self.tokens_per_expert.long()

    def expert_of_pair(self, num_experts: int) -> Tensor:
        """Return the expert of each row, int64 (N,); E for pads."""
        ends_E = self.counts(num_experts).cumsum(0)
        rows_N = torch.arange(self.token_N.numel(), device=self.token_N.device)
        return torch.searchsorted(ends_E, rows_N, right=True)

    def mask(self, num_tokens: int, num_experts: int) -> Tensor:
        """Return the pairs as bool (S, E)."""
        if self.row_SE is not None:
            return self.row_SE >= 0
        mask_SE = self.token_N.new_zeros(num_tokens, num_experts + 1, dtype=torch.bool)
        mask_SE[self.token_N, self.expert_of_pair(num_experts)] = True
        return mask_SE[:, :num_experts]

    def pairs_per_token(self, num_tokens: int, num_experts: int) -> Tensor:
        """Return the pairs of each token, int64 (S,)."""
        return self.mask(num_tokens, num_experts).sum(1)

    @classmethod
    def from_mask(cls, mask_SE: Tensor, scores_SE: Tensor, *, num_rows: int | None, equal: bool = False,
                  **reported: object) -> Routing:
        """Collect the pairs of a bool mask (S, E), by expert and then by token.

        Args:
            mask_SE: pairs to compute.
            scores_SE: float32 weights, read at the pairs.
            num_rows: rows to lay out. None counts them, which waits for the device. Selected pairs beyond
                `num_rows` set `overflow`: that result is not to be used.
            equal: each expert has its share of `num_rows`, no more and no less.
            reported: other fields of the Routing.
        """
        mask_ES = mask_SE.t()
        if equal:
            reported |= {"tokens_per_expert": num_rows // len(mask_ES)}
        else:
            counts_E = mask_ES.sum(1, dtype=torch.int32)
            if num_rows is None:
                expert_N, token_N = mask_ES.nonzero(as_tuple=True)
                return cls(token_N=token_N, gate_N=scores_SE[token_N, expert_N], tokens_per_expert=counts_E, **reported)
            # In an overflow the last experts lose rows, so that no backend reads behind the end.
            laid_out_E = counts_E.cumsum(0).clamp(max=num_rows).diff(prepend=counts_E.new_zeros(1)).to(torch.int32)
            reported |= {"tokens_per_expert": laid_out_E, "overflow": counts_E.sum() > num_rows}
        if selection_kernels_apply(scores_SE):
            token_N, gate_N, row_SE = lay_out(mask_ES, scores_SE, num_rows)
            return cls(token_N=token_N, gate_N=gate_N, row_SE=row_SE, **reported)
        flat = mask_ES.flatten()
        row = torch.where(flat, flat.cumsum(0) - 1, num_rows).clamp_(max=num_rows)
        # pair_N[r] is the flat (expert, token) index of row r; the extra last entry swallows everything unselected.
        pair_N = row.new_zeros(num_rows + 1).scatter_(0, row, torch.arange(flat.numel(), device=flat.device))[:num_rows]
        valid_N = torch.arange(num_rows, device=flat.device) < flat.sum()
        token_N = torch.where(valid_N, pair_N % mask_SE.shape[0], 0)
        gate_N = scores_SE.t().flatten()[torch.where(valid_N, pair_N, 0)] * valid_N
        return cls(token_N=token_N, gate_N=gate_N, **reported)


class Router(nn.Module, abc.ABC):
    """Decides which expert works on which token.

    A subclass implements `forward`, and if it needs them `update`, `initialise` and the two checks; options
    go into a dataclass `Config(RouterConfig)`. It never sees the experts. `logits` and all behind it are float32.

    Args:
        model: the backbone's configuration (width, tokens a sample).
        moe: this layer's configuration.
    """

    Config: type[RouterConfig] = RouterConfig
    backbone_parameters: tuple[str, ...] = ("gate",)
    """Name prefixes of the parameters that the diffusion loss trains; others stay out of the clipping norm."""

    def __init__(self, model: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.options = moe.router  # read at each call: inference options may change after training
        self.num_experts = moe.num_experts
        self.capacity = moe.capacity
        self.pool_scope = moe.pool_scope
        self.world: World = ALONE
        """The processes whose tokens a training selection spans; more than this one for `pool_scope: global` alone."""
        self.gate = Float32Linear(model.hidden_size, moe.num_experts)

    @property
    def equal_rows(self) -> bool:
        """Whether experts get equally many rows whatever the tokens, in the present mode. Default: no."""
        return False

    @abc.abstractmethod
    def forward(self, x_BTD: Tensor, row_bound: float | None = None) -> Routing:
        """Route the tokens of a batch.

        Args:
            x_BTD: tokens as the experts will see them, bf16 under autocast.
            row_bound: rows to lay out for a dynamic selection, in units of S; None counts them on the host.
        """

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Return the float32 affinity of each token to each expert, (S, E), before any softmax."""
        return self.gate(x_BTD.flatten(0, 1))

    def scores(self, x_BTD: Tensor) -> Tensor:
        """Return the weight that each pair would get, float32 (S, E). Default: softmax over experts."""
        return self.logits(x_BTD).softmax(-1)

    def passes(self, x_BTD: Tensor) -> Tensor | None:
        """Return the pairs above the router's threshold, bool (S, E), each for itself. Default: None, it has none."""
        return None

    def update(self, observed: Tensor, num_updates: int) -> None:
        """Move this router's buffers; called once an optimiser step with `Routing.observed`.

        Args:
            observed: mean of `Routing.observed` over the step's micro-batches and processes.
            num_updates: how often it was called before.
        """

    def initialise(self, generator: SeededGenerator) -> None:
        """Set the gate to N(0, 0.006), the released code's rule; other linear layers are Xavier-uniform already."""
        nn.init.normal_(self.gate.weight, std=0.006, generator=generator("gate.weight"))

    @classmethod
    def pool_images(cls, moe: MoEConfig, batch_size: int) -> int:
        """Return how many images the training rule must see together. Default: the whole batch."""
        return batch_size

    @classmethod
    def check(cls, model: ModelConfig, moe: MoEConfig) -> None:
        """Raise ConfigError if this router cannot run in this model."""

    @classmethod
    def check_batch(cls, model: ModelConfig, moe: MoEConfig, batch_size: int) -> None:
        """Raise ConfigError if this router cannot train on batches of `batch_size` images."""


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k largest entries along the last axis; of equal ones the first. No gradient flows through.

    Returns:
        a bool mask with k entries set in each row, and the k-th largest score of each row.
    """
    scores = scores.detach()
    if selection_kernels_apply(scores):
        rows = scores.reshape(-1, scores.shape[-1])
        taken, kth = take_largest(rows, torch.full((len(rows), 1), k, dtype=torch.int32, device=scores.device))
        return taken.view(scores.shape), kth.view(scores.shape[:-1])
    kth = scores.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above, tied = scores > kth, scores == kth
    wanted = k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= wanted)), kth.squeeze(-1)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which tensors keep the dtype that they are given."""
    if device.type == "meta":  # where models are counted; it has no autocast
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def row_count(row_bound: float | None, num_tokens: int, num_experts: int) -> int | None:
    """Return the rows of a dynamic selection: `row_bound` times S, at most all pairs; None stays None."""
    return None if row_bound is None else min(int(row_bound * num_tokens), num_tokens * num_experts)


def tokens_an_expert_takes(num_tokens: int, num_experts: int, capacity: float, where: str) -> int:
    """Return k = floor(S / E * C), DiffMoE's Algorithm 1 and EC alike.

    Raises:
        ConfigError: when an expert would take no token, or more than there are.
    """
    k = int(num_tokens / num_experts * capacity)
    require(k >= 1, "model.moe.capacity", capacity,
            f"{num_experts} experts would take {capacity * num_tokens / num_experts:.3g} tokens each of the "
            f"{num_tokens} in {where}: use fewer experts or more capacity")
    require(k <= num_tokens, "model.moe.capacity", capacity, f"use at most num_experts={num_experts}")
    return k
