"""Triton kernels of y = x + bias or y = gelu(x + bias), each row with the bias of its expert.

Rows lie expert by expert. A tile is ROWS rows of one expert; tiles are numbered expert by expert, so that the
gradient of a bias is the sum of consecutive tiles' column sums: one pass over the rows, no atomics, a fixed order.
Rows behind the last expert's (pads) are left unset in the result and in the gradient.

    gelu(u) = u sigmoid(2 v),  v = sqrt(2/pi) (u + 0.044715 u^3)                                  (tanh form)
    gelu'(u) = s + 2 u s (1 - s) v',  s = sigmoid(2 v),  v' = sqrt(2/pi) (1 + 3 * 0.044715 u^2)

Shapes: N rows, E experts, F width. Arithmetic is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

ROWS, COLS = 64, 64
TILES_AT_ONCE = 16


@triton_op("diffmoe::grouped_bias", mutates_args={})
def grouped_bias(x_NF: Tensor, bias_EF: Tensor, ends_E: Tensor, gelu: bool) -> Tensor:
    """Return x + bias, through GELU (tanh) on demand, in the dtype of x (N, F).

    Args:
        x_NF: rows, expert by expert.
        bias_EF: one bias an expert.
        ends_E: int32, the end of each expert's rows; rows from the last end on give nothing.
        gelu: apply GELU to the sum.
    """
    x_NF = x_NF.contiguous()
    y_NF = torch.empty_like(x_NF)
    wrap_triton(_bias_forward)[_grid(x_NF, ends_E)](
        x_NF, bias_EF.contiguous(), ends_E, y_NF, x_NF.shape[1], *_groups(ends_E), gelu, ROWS, COLS)
    return y_NF


@triton_op("diffmoe::grouped_bias_backward", mutates_args={})
def grouped_bias_backward(d_y_NF: Tensor, x_NF: Tensor, bias_EF: Tensor, ends_E: Tensor,
                          gelu: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (N, F) and bias (E, F) for that of the result."""
    d_y_NF, x_NF, bias_EF = d_y_NF.contiguous(), x_NF.contiguous(), bias_EF.contiguous()
    d_x_NF = torch.empty_like(x_NF)
    grid = _grid(x_NF, ends_E)
    sums = x_NF.new_empty(grid[1], x_NF.shape[1], dtype=torch.float32)
    wrap_triton(_bias_backward)[grid](
        d_y_NF, x_NF, bias_EF, ends_E, d_x_NF, sums, x_NF.shape[1], *_groups(ends_E), gelu, ROWS, COLS)
    if len(ends_E) == 1:  # too few sums for a program each
        return d_x_NF, sums.sum(0, keepdim=True).to(bias_EF.dtype)
    d_bias_EF = torch.empty_like(bias_EF)
    wrap_triton(_add_tiles)[(grid[0], len(ends_E))](
        sums, ends_E, d_bias_EF, x_NF.shape[1], *_groups(ends_E), ROWS, COLS, TILES_AT_ONCE)
    return d_x_NF, d_bias_EF


def _grid(x_NF: Tensor, ends_E: Tensor) -> tuple[int, int]:
    """Return blocks of columns, and as many tiles as there can be when each expert ends in a part of one."""
    return triton.cdiv(x_NF.shape[1], COLS), triton.cdiv(x_NF.shape[0], ROWS) + len(ends_E)


def _groups(ends_E: Tensor) -> tuple[int, int]:
    return len(ends_E), triton.next_power_of_2(len(ends_E) + 1)


def _setup_context(ctx, inputs, output) -> None:
    *saved, ctx.gelu = inputs
    ctx.save_for_backward(*saved)


def _autograd(ctx, d_y_NF):
    return *grouped_bias_backward(d_y_NF, *ctx.saved_tensors, ctx.gelu), None, None


grouped_bias.register_autograd(_autograd, setup_context=_setup_context)


@triton.jit
def _tiles(ends, E: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Return for each group its first row, end, first tile and the tile behind its last; groups from E on are empty."""
    group = tl.arange(0, GROUPS)
    start = tl.load(ends + group - 1, mask=(group > 0) & (group < E), other=0)
    end = tl.load(ends + group, mask=group < E, other=0)
    tiles = (end - start + ROWS - 1) // ROWS
    behind = tl.cumsum(tiles, 0)
    return start, end, behind - tiles, behind


@triton.jit
def _place(ends, E: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return this program's group, rows, the end of the rows that are the group's, and columns."""
    start, end, first_tile, behind = _tiles(ends, E, GROUPS, ROWS)
    tile = tl.program_id(1)
    mine = tl.sum((behind <= tile).to(tl.int32), 0)  # GROUPS behind the last tile: no rows
    is_mine = tl.arange(0, GROUPS) == mine
    first = tl.sum(tl.where(is_mine, start + (tile - first_tile) * ROWS, 0), 0)
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)
    return mine, rows[:, None], tl.sum(tl.where(is_mine, end, 0), 0), tl.program_id(0) * COLS + tl.arange(0, COLS)


@triton.jit
def _bias_forward(x, bias, ends, y, F, E: tl.constexpr, GROUPS: tl.constexpr, GELU: tl.constexpr,
                  ROWS: tl.constexpr, COLS: tl.constexpr):
    group, rows, end, cols = _place(ends, E, GROUPS, ROWS, COLS)
    mask = (rows < end) & (cols < F)
    u = tl.load(x + rows * F + cols, mask=mask, other=0).to(tl.float32)
    u += tl.load(bias + group * F + cols, mask=(cols < F) & (group < E), other=0).to(tl.float32)
    if GELU:
        u *= _sigmoid_2v(u)
    tl.store(y + rows * F + cols, u, mask=mask)


@triton.jit
def _bias_backward(d_y, x, bias, ends, d_x, sums, F, E: tl.constexpr, GROUPS: tl.constexpr, GELU: tl.constexpr,
                   ROWS: tl.constexpr, COLS: tl.constexpr):
    group, rows, end, cols = _place(ends, E, GROUPS, ROWS, COLS)
    mask = (rows < end) & (cols < F)
    d = tl.load(d_y + rows * F + cols, mask=mask, other=0).to(tl.float32)
    if GELU:
        u = tl.load(x + rows * F + cols, mask=mask, other=0).to(tl.float32)
        u += tl.load(bias + group * F + cols, mask=(cols < F) & (group < E), other=0).to(tl.float32)
        s = _sigmoid_2v(u)
        d *= s + u * s * (1 - s) * (1.5957691216057308 + 0.21406444881780076 * u * u)  # 2 v'
    tl.store(d_x + rows * F + cols, d, mask=mask)
    tl.store(sums + tl.program_id(1).to(tl.int64) * F + cols, tl.sum(d, 0), mask=cols < F)


@triton.jit
def _sigmoid_2v(u):
    return tl.sigmoid(1.5957691216057308 * u * (1 + 0.044715 * u * u))  # 2 sqrt(2/pi)


@triton.jit
def _add_tiles(sums, ends, d_bias, F, E: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
               COLS: tl.constexpr, AT_ONCE: tl.constexpr):
    _, _, first_tile, behind = _tiles(ends, E, GROUPS, ROWS)
    expert = tl.program_id(1)
    is_mine = tl.arange(0, GROUPS) == expert
    last = tl.sum(tl.where(is_mine, behind, 0), 0)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros((COLS,), tl.float32)
    for tile in range(tl.sum(tl.where(is_mine, first_tile, 0), 0), last, AT_ONCE):
        tiles = (tile + tl.arange(0, AT_ONCE)).to(tl.int64)[:, None]
        total += tl.sum(tl.load(sums + tiles * F + cols, mask=(tiles < last) & (cols < F), other=0), 0)
    tl.store(d_bias + expert * F + cols, total, mask=cols < F)
