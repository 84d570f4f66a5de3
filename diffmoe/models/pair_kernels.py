"""Triton kernels between tokens and routed pairs: each token's pairs are added up in a fixed order, without atomics.

    rows_of_tokens    x[token of the pair]; its gradient adds up each token's pairs
    add_pairs         the sum over a token's pairs of weight * (row + bias of its expert)

A table says which row a token has with each expert, so that a sum reads its terms instead of being written by them:
the same run gives the same bits again, where atomic sums depend on which comes first.

Shapes: S tokens, N pairs (rows), E experts, D width. Arithmetic is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from diffmoe.models.tile_kernels import add_tiles, groups, num_tiles, place

ROWS, COLS = 32, 64
WIDTH_A_WARP = 256


def row_table(token_N: Tensor, expert_N: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    """Return the row of each token with each expert, int32 (S, E); -1 where they are no pair.

    Args:
        token_N: int64 token of each row.
        expert_N: int64 expert of each row; E for pads, which are in no table.
        num_tokens: S.
        num_experts: E.
    """
    table = torch.full((num_tokens, num_experts + 1), -1, dtype=torch.int32, device=token_N.device)
    table[token_N, expert_N] = torch.arange(len(token_N), dtype=torch.int32, device=token_N.device)
    return table[:, :num_experts].contiguous()


@triton_op("diffmoe::rows_of_tokens", mutates_args={})
def rows_of_tokens(x_SD: Tensor, token_N: Tensor, ends_E: Tensor, row_SE: Tensor) -> Tensor:
    """Return x[token_N], (N, D).

    Args:
        x_SD: tokens.
        token_N: int64 token of each row.
        ends_E: int32, the end of each expert's rows; those from the last end on are left unset.
        row_SE: `row_table`; rows that are not in it have no gradient.
    """
    x_SD = x_SD.contiguous()
    x_ND = x_SD.new_empty(len(token_N), x_SD.shape[1])
    wrap_triton(_rows_of_tokens)[triton.cdiv(len(token_N), ROWS) * triton.cdiv(x_SD.shape[1], COLS),](
        x_SD, token_N, ends_E, x_ND, x_SD.shape[1], len(ends_E), ROWS, COLS)
    return x_ND


@triton_op("diffmoe::add_pairs", mutates_args={})
def add_pairs(y_ND: Tensor, bias_ED: Tensor, gate_N: Tensor, token_N: Tensor, ends_E: Tensor, row_SE: Tensor,
              dtype: torch.dtype) -> Tensor:
    """Return each token's sum of gate * (row + bias) in `dtype`, (S, D); zeros for a token without a pair.

    Args:
        y_ND: rows.
        bias_ED: one bias an expert.
        gate_N: float32 weight of each row.
        token_N: int64 token of each row.
        ends_E: int32, the end of each expert's rows; those from the last end on are in no sum.
        row_SE: `row_table`; rows that are not in it are left out.
        dtype: of the result.
    """
    return _sum(y_ND, bias_ED, gate_N, row_SE, dtype)


def _sum(y_ND: Tensor, bias_ED: Tensor | None, gate_N: Tensor | None, row_SE: Tensor, dtype: torch.dtype) -> Tensor:
    y_ND = y_ND.contiguous()
    (num_tokens, num_experts), width = row_SE.shape, y_ND.shape[1]
    out_SD = y_ND.new_empty(num_tokens, width, dtype=dtype)
    block = triton.next_power_of_2(width)
    bias_ED, gate_N = (y_ND if value is None else value.contiguous() for value in (bias_ED, gate_N))
    wrap_triton(_add_rows)[num_tokens,](
        y_ND, bias_ED, gate_N, row_SE, out_SD, width, num_experts, gate_N is not y_ND, block,
        num_warps=max(1, min(block // WIDTH_A_WARP, 8)))
    return out_SD


@triton_op("diffmoe::add_rows", mutates_args={})
def add_rows(y_ND: Tensor, row_SE: Tensor) -> Tensor:
    """Return each token's sum of rows in their dtype, (S, D)."""
    return _sum(y_ND, None, None, row_SE, y_ND.dtype)


@triton_op("diffmoe::add_pairs_backward", mutates_args={})
def add_pairs_backward(d_out_SD: Tensor, y_ND: Tensor, bias_ED: Tensor, gate_N: Tensor, token_N: Tensor,
                       ends_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of rows (N, D), biases (E, D) and weights (N,) for that of the sums.

    Rows behind the last expert's are left unset, their weights get 0: who made the weights may still read those.
    """
    d_out_SD, y_ND, bias_ED = d_out_SD.contiguous(), y_ND.contiguous(), bias_ED.contiguous()
    d_y_ND, d_gate_N = torch.empty_like(y_ND), torch.zeros_like(gate_N)
    tiles = num_tiles(len(y_ND), ends_E, ROWS)
    sums = y_ND.new_empty(tiles, y_ND.shape[1], dtype=torch.float32)
    wrap_triton(_add_pairs_backward)[tiles,](
        d_out_SD, y_ND, bias_ED, gate_N.contiguous(), token_N, ends_E, d_y_ND, d_gate_N, sums, y_ND.shape[1],
        *groups(ends_E), ROWS, COLS)
    return d_y_ND, add_tiles(sums, ends_E, ROWS, bias_ED.dtype), d_gate_N


def _rows_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[3])


def _rows_autograd(ctx, d_y_ND):
    return add_rows(d_y_ND, *ctx.saved_tensors), None, None, None


def _pairs_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])


def _pairs_autograd(ctx, d_out_SD):
    return *add_pairs_backward(d_out_SD, *ctx.saved_tensors), None, None, None, None


rows_of_tokens.register_autograd(_rows_autograd, setup_context=_rows_context)
add_pairs.register_autograd(_pairs_autograd, setup_context=_pairs_context)


@triton.jit
def _rows_of_tokens(x, token, ends, y, D, E, ROWS: tl.constexpr, COLS: tl.constexpr):
    tiles = tl.cdiv(D, COLS)
    rows = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % tiles * COLS + tl.arange(0, COLS))[None]
    is_pair = rows < tl.load(ends + E - 1)
    mask = is_pair[:, None] & (cols < D)
    source = tl.load(token + rows, mask=is_pair, other=0)[:, None] * D
    tl.store(y + rows.to(tl.int64)[:, None] * D + cols, tl.load(x + source + cols, mask=mask), mask=mask)


@triton.jit
def _add_rows(y, bias, gate, table, out, D, E, WEIGHTED: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)  # one a program: most of its entries are empty, and cost a branch
    cols = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for expert in range(E):
        row = tl.load(table + token * E + expert).to(tl.int64)
        if row >= 0:
            value = tl.load(y + row * D + cols, mask=cols < D, other=0).to(tl.float32)
            if WEIGHTED:
                value += tl.load(bias + expert * D + cols, mask=cols < D, other=0).to(tl.float32)
                value *= tl.load(gate + row)
            total += value
    tl.store(out + token * D + cols, total, mask=cols < D)


@triton.jit
def _add_pairs_backward(d_out, y, bias, gate, token, ends, d_y, d_gate, sums, D, E: tl.constexpr, GROUPS: tl.constexpr,
                        ROWS: tl.constexpr, COLS: tl.constexpr):
    expert, rows, end = place(tl.program_id(0), ends, E, GROUPS, ROWS)
    is_pair = rows < end
    to = rows[:, None] * D
    weight = tl.load(gate + rows, mask=is_pair, other=0)[:, None]
    source = tl.load(token + rows, mask=is_pair, other=0)[:, None] * D
    product = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, COLS):
        cols = start + tl.arange(0, COLS)
        mask = is_pair[:, None] & (cols < D)
        d = tl.load(d_out + source + cols, mask=mask, other=0).to(tl.float32)
        row = tl.load(y + to + cols, mask=mask, other=0).to(tl.float32)
        row += tl.load(bias + expert * D + cols, mask=(cols < D) & (expert < E), other=0).to(tl.float32)
        product += tl.sum(d * row, 1)
        d *= weight
        tl.store(d_y + to + cols, d, mask=mask)
        tl.store(sums + tl.program_id(0).to(tl.int64) * D + cols, tl.sum(d, 0), mask=cols < D)
    tl.store(d_gate + rows, product, mask=is_pair)
