"""The expert bank: packed weights of E feed-forward networks, and the ways to compute them.

    y[token] = sum over the token's pairs of gate * FFN_expert(x[token]),  FFN(x) = gelu(x w1 + b1) w2 + b2

Backends, all with the same result:
    loop      one expert after another; the oracle, and the only one for float64
    batched   two batched products; needs the same number of rows for every expert
    grouped   two grouped products with offsets on the device; for ragged rows
`auto` takes `batched` for equal rows, and for ragged ones `grouped` where the device has it, else `loop`.
Shapes: see the legend in routing.py; R rows of one expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.config import Backend
from diffmoe.models.kernels import HAS_TRITON, kernels_apply, product_dtype
from diffmoe.moe.routing import Routing, SeededGenerator, without_autocast

if HAS_TRITON:
    from diffmoe.models.bias_kernels import grouped_bias
    from diffmoe.models.pair_kernels import add_pairs, row_table, rows_of_tokens

# Public since torch 2.10; the underscored name is the same operator before.
grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
GROUPED_ALIGNMENT_BYTES = 16


class ExpertBank(nn.Module):
    """E feed-forward networks with GELU (tanh), packed along the first axis.

    Args:
        num_experts: E.
        width: D.
        hidden: F.
    """

    def __init__(self, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.b1 = nn.Parameter(torch.empty(num_experts, hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.b2 = nn.Parameter(torch.empty(num_experts, width))
        self.backend = Backend.AUTO

    def initialise(self, generator: SeededGenerator) -> None:
        """Set Xavier-uniform matrices with each expert's own fans, and zero biases."""
        for name in ("w1", "w2"):
            for index, matrix in enumerate(getattr(self, name)):
                nn.init.xavier_uniform_(matrix, generator=generator(f"{name}.{index}"))
        nn.init.zeros_(self.b1)
        nn.init.zeros_(self.b2)

    def forward(self, x_SD: Tensor, routing: Routing) -> Tensor:
        """Compute the routed pairs and add them up by token.

        Args:
            x_SD: tokens (S, D).
            routing: the pairs; their weights multiply the experts' outputs.

        Returns:
            (S, D) in the dtype of `x_SD`; zeros for tokens without an expert.

        Raises:
            ValueError: when the chosen backend cannot compute this routing.
        """
        dtype, given = product_dtype(x_SD), x_SD.dtype
        with without_autocast(x_SD.device):
            weights = [weight.to(dtype) for weight in (self.w1, self.b1, self.w2, self.b2)]
            x_SD, token_N, gate_N = x_SD.to(dtype), routing.token_N, routing.gate_N
            ends_E = routing.counts(len(self.w1)).cumsum(0).to(torch.int32)
            if kernels_apply(x_SD):
                row_SE = routing.row_SE
                if row_SE is None:
                    row_SE = row_table(token_N, routing.expert_of_pair(len(self.w1)), len(x_SD), len(self.w1))
                y_ND = self._compute(rows_of_tokens(x_SD, token_N, ends_E, row_SE), weights, routing, ends_E)
                return add_pairs(y_ND, gate_N, token_N, row_SE, given)
            y_ND = self._compute(x_SD[token_N], weights, routing, ends_E)
            weighted_ND = y_ND * gate_N[:, None].to(torch.promote_types(dtype, gate_N.dtype))
            return weighted_ND.new_zeros(x_SD.shape).index_add_(0, token_N, weighted_ND).to(given)

    def _compute(self, x_ND: Tensor, weights: list[Tensor], routing: Routing, ends_E: Tensor) -> Tensor:
        equal = isinstance(routing.tokens_per_expert, int)
        backend = self.backend
        if backend is Backend.AUTO:
            ragged = Backend.GROUPED if grouped_is_supported(x_ND.device, x_ND.dtype) else Backend.LOOP
            backend = Backend.BATCHED if equal else ragged
        if backend is Backend.LOOP:
            return _loop(x_ND, weights, routing)
        if backend is Backend.BATCHED:
            if not equal:
                raise ValueError("backend=batched: this router gives experts unequal rows; use grouped, loop or auto")
            return _batched(x_ND, weights, routing.tokens_per_expert, ends_E)
        if not grouped_is_supported(x_ND.device, x_ND.dtype):
            raise ValueError(f"backend=grouped: not available for {x_ND.dtype} on {x_ND.device.type}; use loop or auto")
        return _grouped(x_ND, weights, ends_E)


def grouped_is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether grouped products exist for `dtype` on `device` without a hidden host synchronisation."""
    if grouped_mm is None:
        return False
    if device.type == "cuda":
        return dtype is torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


def _feed_forward(x_RD: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.gelu(x_RD @ w1 + b1, approximate="tanh") @ w2 + b2


def _loop(x_ND: Tensor, weights: list[Tensor], routing: Routing) -> Tensor:
    num_experts = weights[0].shape[0]
    counts = routing.counts(num_experts).tolist()
    *rows, pads = x_ND.split([*counts, x_ND.shape[0] - sum(counts)])
    outputs = [_feed_forward(x_RD, *(weight[expert] for weight in weights)) for expert, x_RD in enumerate(rows)]
    return torch.cat([*outputs, torch.zeros_like(pads)])


def _batched(x_ND: Tensor, weights: list[Tensor], rows: int, ends_E: Tensor) -> Tensor:
    w1, b1, w2, b2 = weights
    x_ERD = x_ND.unflatten(0, (w1.shape[0], rows))
    # Not baddbmm: it first writes the bias to every row of its output and then reads that back.
    hidden_ERF = torch.bmm(x_ERD, w1)
    if kernels_apply(x_ND):
        hidden_ERF = grouped_bias(hidden_ERF.flatten(0, 1), b1, ends_E, gelu=True).view_as(hidden_ERF)
    else:
        hidden_ERF = F.gelu(hidden_ERF + b1[:, None], approximate="tanh")
    return (torch.bmm(hidden_ERF, w2) + b2[:, None]).flatten(0, 1)


def _grouped(x_ND: Tensor, weights: list[Tensor], ends_E: Tensor) -> Tensor:
    w1, b1, w2, b2 = weights
    has_kernels = kernels_apply(x_ND)
    add_bias = grouped_bias if has_kernels else _grouped_bias
    if not has_kernels:  # they neither read nor write pads
        # The product leaves rows behind the last end unset, forward and backward. This mask stands before the one
        # product, add_bias behind both: it gives zeros there, in the result and in the gradient.
        x_ND = torch.where(_is_pair(x_ND, ends_E), x_ND, 0)
    hidden_NF = add_bias(_grouped_product(x_ND, w1, ends_E), b1, ends_E, gelu=True)
    return add_bias(_grouped_product(hidden_NF, w2, ends_E), b2, ends_E, gelu=False)


def _grouped_bias(x_NO: Tensor, bias_EO: Tensor, ends_E: Tensor, gelu: bool) -> Tensor:
    """Do what the kernel of this name does, with each row's bias in float32, and give zeros for pads.

    The gradient of a bias adds up thousands of rows, too many for bf16.
    """
    valid_N1 = _is_pair(x_NO, ends_E)
    expert_N = torch.searchsorted(ends_E, torch.arange(len(x_NO), device=x_NO.device), right=True)
    expert_N = expert_N.clamp(max=len(ends_E) - 1)  # pads borrow the last expert's bias and are zeroed below
    y_NO = (torch.where(valid_N1, x_NO, 0).float() + bias_EO.float()[expert_N]).to(x_NO.dtype)
    return torch.where(valid_N1, F.gelu(y_NO, approximate="tanh") if gelu else y_NO, 0)


def _is_pair(x_ND: Tensor, ends_E: Tensor) -> Tensor:
    return (torch.arange(len(x_ND), device=x_ND.device) < ends_E[-1])[:, None]


def _grouped_product(x_NI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply each expert's rows by its matrix; rows behind the last end stay unset, as their gradient does."""
    in_size, out_size = weight_EIO.shape[1:]
    step = GROUPED_ALIGNMENT_BYTES // x_NI.element_size()
    in_pad, out_pad = -in_size % step, -out_size % step
    if in_pad or out_pad:  # the operator wants row strides of 16 bytes; zeros change nothing
        x_NI, weight_EIO = F.pad(x_NI, (0, in_pad)), F.pad(weight_EIO, (0, out_pad, 0, in_pad))
    return grouped_mm(x_NI, weight_EIO, offs=ends_E)[:, :out_size]
