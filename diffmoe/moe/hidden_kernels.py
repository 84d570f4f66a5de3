"""A Triton kernel of experts' hidden rows without gradients: gather, product, bias and GELU in one.

With gradients the gathered tokens and what goes into GELU are needed again, so that nothing would be saved there.
Shapes: S tokens, N rows, E experts, D width, F hidden width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from diffmoe.models.bias_kernels import sigmoid_2v
from diffmoe.models.tile_kernels import groups, num_tiles, place, product_tile


@triton_op("diffmoe::hidden_rows", mutates_args={})
def hidden_rows(x_SD: Tensor, token_N: Tensor, w1_EDF: Tensor, b1_EF: Tensor, ends_E: Tensor) -> Tensor:
    """Return gelu(x[token] w1 + b1), each row with its expert's weights, in their dtype (N, F).

    Args:
        x_SD: tokens, in the dtype of the weights.
        token_N: int64 token of each row.
        w1_EDF, b1_EF: each expert's weights.
        ends_E: int32, the end of each expert's rows; those from the last end on are left unset.
    """
    num_rows, (_, width, hidden) = len(token_N), w1_EDF.shape
    h_NF = x_SD.new_empty(num_rows, hidden)
    rows, cols, depth, warps, stages = product_tile(width)
    wrap_triton(_hidden_rows)[triton.cdiv(hidden, cols), num_tiles(num_rows, ends_E, rows)](
        x_SD.contiguous(), token_N, ends_E, w1_EDF.contiguous(), b1_EF.contiguous(), h_NF, width, hidden,
        *groups(ends_E), rows, cols, depth, num_warps=warps, num_stages=stages)
    return h_NF


@triton.jit
def _hidden_rows(x, token, ends, w1, b1, h, D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, GROUPS: tl.constexpr,
                 ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr):
    # programs of the same rows are neighbours: these are read once, and an expert's weights stay in the cache
    expert, rows, end = place(tl.program_id(1), ends, E, GROUPS, ROWS)
    is_pair = rows < end
    if expert < E:
        cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
        source = tl.load(token + rows, mask=is_pair, other=0)[:, None] * D
        w1 += expert.to(tl.int64) * D * F
        u = tl.zeros((ROWS, COLS), tl.float32)
        for start in range(0, D, DEPTH):
            d = start + tl.arange(0, DEPTH)
            if (D % DEPTH == 0) & (F % COLS == 0):  # known when it is compiled
                tokens = tl.load(x + source + d)
                weight = tl.load(w1 + d[:, None] * F + cols)
            else:
                tokens = tl.load(x + source + d, mask=d < D, other=0)
                weight = tl.load(w1 + d[:, None] * F + cols, mask=(d < D)[:, None] & (cols < F), other=0)
            u = tl.dot(tokens, weight, u)
        u += tl.load(b1 + expert * F + cols, mask=cols < F, other=0).to(tl.float32)
        u *= sigmoid_2v(u)
        tl.store(h + rows[:, None] * F + cols, u, mask=is_pair[:, None] & (cols < F))
