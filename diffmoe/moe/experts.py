"""The expert bank: packed weights of E feed-forward networks, and the ways to compute them.

    y[token] = sum over the token's pairs of gate * FFN_expert(x[token]),  FFN(x) = gelu(x w1 + b1) w2 + b2

Backends, all with the same result:
    loop      one expert after another; the oracle, and for ragged rows the only one in float64
    batched   two batched products; needs the same number of rows for every expert
    grouped   two grouped products with offsets on the device; for ragged rows
`auto` takes `batched` for equal rows, and for ragged ones `grouped` where the device has it, else `loop`.
Shapes: see the legend in routing.py; R rows of one expert.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from diffmoe.config import Backend
from diffmoe.models.kernels import HAS_TRITON, kernels_apply, product_dtype
from diffmoe.moe.float32 import at_least_float32
from diffmoe.moe.routing import Routing, SeededGenerator, without_autocast

if HAS_TRITON:
    from diffmoe.models.bias_kernels import bias_gelu
    from diffmoe.models.pair_kernels import add_pairs, row_table, rows_of_tokens
    from diffmoe.moe.hidden_kernels import hidden_rows

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
        matrices = [(f"{name}.{index}", matrix) for name in ("w1", "w2")
                    for index, matrix in enumerate(getattr(self, name))]
        with ThreadPoolExecutor() as threads:  # a core draws 200 million numbers a second; L-E16 has two billion
            list(threads.map(lambda each: nn.init.xavier_uniform_(each[1], generator=generator(each[0])), matrices))
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
            w1, b1, w2, b2 = (weight.to(dtype) for weight in (self.w1, self.b1, self.w2, self.b2))
            x_SD, token_N, gate_N = x_SD.to(dtype), routing.token_N, routing.gate_N
            ends_E = routing.counts(len(w1)).cumsum(0).to(torch.int32)
            backend = self.choose(x_SD.device, dtype, equal_rows=isinstance(routing.tokens_per_expert, int))
            if not kernels_apply(x_SD):
                y_ND = _add_bias(_feed_forward(x_SD[token_N], w1, b1, w2, ends_E, backend), b2, ends_E, backend)
                weighted_ND = y_ND * gate_N[:, None].to(torch.promote_types(dtype, gate_N.dtype))
                return weighted_ND.new_zeros(x_SD.shape).index_add_(0, token_N, weighted_ND).to(given)
            row_SE = routing.row_SE
            if row_SE is None:
                row_SE = row_table(token_N, routing.expert_of_pair(len(w1)), len(x_SD), len(w1))
            if torch.is_grad_enabled() or backend is Backend.LOOP:
                x_ND = rows_of_tokens(x_SD, token_N, ends_E, row_SE)
                y_ND = _feed_forward(x_ND, w1, b1, w2, ends_E, backend)
            else:
                y_ND = _product(hidden_rows(x_SD, token_N, w1, b1, ends_E), w2, ends_E, backend)
            return add_pairs(y_ND, b2, gate_N, token_N, ends_E, row_SE, given)

    def choose(self, device: torch.device, dtype: torch.dtype, *, equal_rows: bool) -> Backend:
        """Return what computes products of `dtype` on a device; `loop` alone waits for the device, to count rows.

        Raises:
            ValueError: when the chosen backend cannot.
        """
        has_grouped = grouped_is_supported(device, dtype)
        if self.backend is Backend.AUTO:
            return Backend.BATCHED if equal_rows else Backend.GROUPED if has_grouped else Backend.LOOP
        if self.backend is Backend.BATCHED and not equal_rows:
            raise ValueError("backend=batched: this router gives experts unequal rows; use grouped, loop or auto")
        if self.backend is Backend.GROUPED and not has_grouped:
            raise ValueError(f"backend=grouped: not available for {dtype} on {device.type}; use loop or auto")
        return self.backend


def grouped_is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether grouped products exist for `dtype` on `device` without a hidden host synchronisation."""
    if grouped_mm is None:
        return False
    if device.type == "cuda":
        return dtype is torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)
    # the compiler's own check of shapes refuses float32, which the CPU computes
    return device.type == "cpu" and (dtype is torch.bfloat16 or (dtype is torch.float32 and not is_compiling()))


def _feed_forward(x_ND: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, ends_E: Tensor, backend: Backend) -> Tensor:
    """Return gelu(x w1 + b1) w2, each row with its expert's weights; the last bias is added with the gate's weight."""
    if backend is Backend.LOOP:
        return _loop(x_ND, w1, b1, w2, ends_E)
    if kernels_apply(x_ND):  # they neither read nor write pads
        return _product(bias_gelu(_product(x_ND, w1, ends_E, backend), b1, ends_E), w2, ends_E, backend)
    if backend is Backend.GROUPED:
        # The product leaves rows behind the last end unset, forward and backward. This mask stands before the one
        # product, the sum behind both: it gives zeros there, in the result and in the gradient.
        x_ND = torch.where(_is_pair(x_ND, ends_E), x_ND, 0)
    hidden_NF = F.gelu(_add_bias(_product(x_ND, w1, ends_E, backend), b1, ends_E, backend), approximate="tanh")
    return _product(hidden_NF, w2, ends_E, backend)


@torch.compiler.disable  # it would compile anew for each step's numbers of rows
def _loop(x_ND: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, ends_E: Tensor) -> Tensor:
    counts = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    *rows, pads = x_ND.split([*counts, len(x_ND) - sum(counts)])
    outputs = [F.gelu(x_RD @ w1[expert] + b1[expert], approximate="tanh") @ w2[expert]
               for expert, x_RD in enumerate(rows)]
    return torch.cat([*outputs, torch.zeros_like(pads)])


def _add_bias(x_NO: Tensor, bias_EO: Tensor, ends_E: Tensor, backend: Backend) -> Tensor:
    """Add each row's bias; zeros for pads.

    The gradient of a ragged bias adds up thousands of rows, too many for bf16: it is added in float32.
    """
    if backend is Backend.BATCHED:
        return (x_NO.unflatten(0, (len(bias_EO), -1)) + bias_EO[:, None]).flatten(0, 1)
    valid_N1 = _is_pair(x_NO, ends_E)
    expert_N = torch.searchsorted(ends_E, torch.arange(len(x_NO), device=x_NO.device), right=True)
    expert_N = expert_N.clamp(max=len(ends_E) - 1)  # pads borrow the last expert's bias and are zeroed below
    y_NO = at_least_float32(torch.where(valid_N1, x_NO, 0)) + at_least_float32(bias_EO)[expert_N]
    return torch.where(valid_N1, y_NO.to(x_NO.dtype), 0)


def _is_pair(x_ND: Tensor, ends_E: Tensor) -> Tensor:
    return (torch.arange(len(x_ND), device=x_ND.device) < ends_E[-1])[:, None]


def _product(x_NI: Tensor, weight_EIO: Tensor, ends_E: Tensor, backend: Backend) -> Tensor:
    """Multiply each expert's rows by its matrix; rows behind the last end stay unset, as their gradient does."""
    if backend is Backend.BATCHED:  # not baddbmm: it first writes the bias to every row, and then reads that back
        return torch.bmm(x_NI.unflatten(0, (len(weight_EIO), -1)), weight_EIO).flatten(0, 1)
    in_size, out_size = weight_EIO.shape[1:]
    step = GROUPED_ALIGNMENT_BYTES // x_NI.element_size()
    in_pad, out_pad = -in_size % step, -out_size % step
    if in_pad or out_pad:  # the operator wants row strides of 16 bytes; zeros change nothing
        x_NI, weight_EIO = F.pad(x_NI, (0, in_pad)), F.pad(weight_EIO, (0, out_pad, 0, in_pad))
    return grouped_mm(x_NI, weight_EIO, offs=ends_E)[:, :out_size]
