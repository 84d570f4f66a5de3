"""Float32 products of bf16 tokens on a GPU's matrix units, for routers: the gate, and the capacity predictor as one.

A product of two bf16 numbers is exact in float32, and two bf16 numbers hold the first 16 bits of a float32 one, where
TF32 holds 11. So a product of tokens, which are bf16, with a float32 matrix is two bf16 products that add up in
float32, at half the matrix units' rate. On an H100 it is right to 2.6e-6 at a width of 384 and 3.3e-6 at 1,024. A third
product would hold all 24 bits, for 1.4e-6 and 3.5e-6: the units' own sums are no better (a library's float32, without
them: 6e-7; TF32: 2e-4).

    gate       y = x w^T                            d_x = d_y w,  d_w = d_y^T x
    predict    y = silu(a) v^T + c,  a = x w^T + b  d_a = (d_y v) silu'(a),  d_w = d_a^T x;  x gets no gradient

Without gradients nobody needs `a` again: `predict_only` keeps it on the chip, and the second layer, whose float32
operands are two bf16 numbers each as well, follows in the same program: right to 3.3e-6 at 384 and 4.2e-6 at 1,024,
where `predict` is to 1.7e-6 and 1.8e-6. That takes rows enough for all multiprocessors.

Shapes: S tokens, D width, H hidden width, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from diffmoe.models.tile_kernels import product_tile

TERMS = 2
"""bf16 numbers that stand for a float32 one, 8 bits each; a power of 2."""
TERMS_BLOCK = 1024
ROWS_GATE, DEPTH_GATE, MOST_EXPERTS_GATE = 128, 64, 64
ROWS_GATE_BACKWARD, COLS_GATE_BACKWARD = 64, 128
HEAD, HEAD_OF_FEW = (64, 32), (16, 64)
HIDDEN_OF_FEW = 64, 32, 64, 4, 4
"""Rows and columns; rows, columns, depth, warps and stages of a tile of the hidden layer."""
FEW_ROWS, MANY_ROWS = 1024, 16_384
"""Up to these, tiles are smaller, for more programs than one in 16 multiprocessors; from those on, a program of all
columns for some rows is enough work for every multiprocessor."""
ROWS_BACKWARD, COLS_BACKWARD = 16, 64
PARTS = 128
"""Programs that share the tokens of a column's sums backward."""


def _padded(columns: int) -> int:
    """Return the columns of a tile that holds these: matrix units take 16 or more."""
    return max(triton.next_power_of_2(columns), 16)


def terms(x: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
    """Return `TERMS` tensors of `dtype` (bf16), stacked along a new axis `dim`, 0 or 1, whose sum is nearest to `x`.

    A kernel, because torch.compile may leave rounding out, and with it all terms but the first. Call it in a triton_op.
    """
    x = x.contiguous()
    rows, columns = x.shape
    parts = x.new_empty([*x.shape[:dim], TERMS, *x.shape[dim:]], dtype=dtype)
    row_step, term_step = (columns, rows * columns) if dim == 0 else (TERMS * columns, columns)
    wrap_triton(_terms)[triton.cdiv(x.numel(), TERMS_BLOCK),](
        x, parts, x.numel(), columns, row_step, term_step, TERMS, TERMS_BLOCK)
    return parts


@triton_op("diffmoe::gate", mutates_args={})
def gate(x_SD: Tensor, weight_ED: Tensor) -> Tensor:
    """Return x w^T in float32, (S, E).

    Args:
        x_SD: bf16 tokens.
        weight_ED: float32.
    """
    x_SD, (rows, width), experts = x_SD.contiguous(), x_SD.shape, len(weight_ED)
    y_SE = x_SD.new_empty(rows, experts, dtype=torch.float32)
    block = min(_padded(experts), MOST_EXPERTS_GATE)
    wrap_triton(_gate_forward)[triton.cdiv(rows, ROWS_GATE), triton.cdiv(experts, block)](
        x_SD, terms(weight_ED, x_SD.dtype, 0), y_SE, rows, width, experts, block, TERMS, ROWS_GATE, DEPTH_GATE)
    return y_SE


@triton_op("diffmoe::gate_backward", mutates_args={})
def gate_backward(d_y_SE: Tensor, weight_ED: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the tokens for that of the result, in `dtype` (S, D)."""
    d_y_SE, (rows, experts), width = d_y_SE.contiguous(), d_y_SE.shape, weight_ED.shape[1]
    d_x_SD = d_y_SE.new_empty(rows, width, dtype=dtype)
    wrap_triton(_gate_backward)[triton.cdiv(rows, ROWS_GATE_BACKWARD), triton.cdiv(width, COLS_GATE_BACKWARD)](
        d_y_SE, weight_ED.contiguous(), d_x_SD, rows, width, experts, min(_padded(experts), MOST_EXPERTS_GATE),
        ROWS_GATE_BACKWARD, COLS_GATE_BACKWARD)
    return d_x_SD


@torch.library.custom_op("diffmoe::weight_gradient", mutates_args=(), device_types=("cpu", "cuda"))
def weight_gradient(terms_SN: Tensor, x_SD: Tensor) -> Tensor:
    """Return terms^T x of bf16 tensors in float32, (N, D): a library's product that torch.compile leaves alone."""
    if terms_SN.is_cuda:
        return torch.mm(terms_SN.t(), x_SD, out_dtype=torch.float32)
    return terms_SN.t().float() @ x_SD.float()


@weight_gradient.register_fake
def _(terms_SN: Tensor, x_SD: Tensor) -> Tensor:
    return x_SD.new_empty(terms_SN.shape[1], x_SD.shape[1], dtype=torch.float32)


def _sum_of_terms(terms_SN: Tensor, x_SD: Tensor) -> Tensor:
    """Return d^T x in float32 for the terms of d side by side: one product for all of them."""
    return weight_gradient(terms_SN, x_SD.contiguous()).unflatten(0, (TERMS, -1)).sum(0)


@triton_op("diffmoe::gate_weight_gradient", mutates_args={})
def gate_weight_gradient(d_y_SE: Tensor, x_SD: Tensor) -> Tensor:
    """Return the gradient of the weight for that of the result, float32 (E, D)."""
    return _sum_of_terms(terms(d_y_SE, x_SD.dtype, 1).flatten(1), x_SD)


def _gate_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gate_autograd(ctx, d_y_SE):
    x_SD, weight_ED = ctx.saved_tensors
    d_x_SD = gate_backward(d_y_SE, weight_ED, x_SD.dtype) if ctx.needs_input_grad[0] else None
    return d_x_SD, gate_weight_gradient(d_y_SE, x_SD)


gate.register_autograd(_gate_autograd, setup_context=_gate_context)


@triton_op("diffmoe::predict", mutates_args={})
def predict(x_SD: Tensor, w_HD: Tensor, b_H: Tensor, v_EH: Tensor, c_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of a capacity predictor (S, E) and what its backward needs, a (S, H), both float32.

    Args:
        x_SD: bf16 tokens; they get no gradient.
        w_HD, b_H, v_EH, c_E: float32 weights and biases of the two layers.
    """
    x_SD, (rows, width), (experts, hidden) = x_SD.contiguous(), x_SD.shape, v_EH.shape
    a_SH = x_SD.new_empty(rows, hidden, dtype=torch.float32)
    few = rows <= FEW_ROWS
    tile_rows, tile_cols, depth, warps, stages = HIDDEN_OF_FEW if few else product_tile(width)
    head_rows, head_cols = HEAD_OF_FEW if few else HEAD
    wrap_triton(_hidden_forward)[triton.cdiv(rows, tile_rows) * triton.cdiv(hidden, tile_cols),](
        x_SD, terms(w_HD, x_SD.dtype, 0), b_H.contiguous(), a_SH, rows, hidden, width, TERMS, tile_rows, tile_cols,
        depth, num_warps=warps, num_stages=stages)
    y_SE = a_SH.new_empty(rows, experts)
    wrap_triton(_head_forward)[triton.cdiv(rows, head_rows),](
        a_SH, v_EH.contiguous(), c_E.contiguous(), y_SE, rows, hidden, experts, _padded(experts), head_rows, head_cols)
    return y_SE, a_SH


@triton_op("diffmoe::predict_only", mutates_args={})
def predict_only(x_SD: Tensor, w_HD: Tensor, b_H: Tensor, v_EH: Tensor, c_E: Tensor) -> Tensor:
    """Return the logits of `predict` for `MANY_ROWS` or more, without what its backward needs."""
    x_SD, (rows, width), (experts, hidden) = x_SD.contiguous(), x_SD.shape, v_EH.shape
    y_SE = x_SD.new_empty(rows, experts, dtype=torch.float32)
    tile_rows, tile_cols, depth, warps, stages = product_tile(width)
    wrap_triton(_predict_only)[triton.cdiv(rows, tile_rows),](
        x_SD, terms(w_HD, x_SD.dtype, 0), b_H.contiguous(), terms(v_EH, x_SD.dtype, 0), c_E.contiguous(), y_SE, rows,
        hidden, experts, width, TERMS, _padded(experts), tile_rows, tile_cols, depth, num_warps=warps,
        num_stages=stages)
    return y_SE


@triton_op("diffmoe::predict_backward", mutates_args={})
def predict_backward(d_y_SE: Tensor, x_SD: Tensor, a_SH: Tensor, v_EH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of w (H, D), b (H,) and v (E, H) for that of the logits."""
    d_y_SE, a_SH = d_y_SE.contiguous(), a_SH.contiguous()
    (rows, hidden), experts = a_SH.shape, len(v_EH)
    terms_STH = x_SD.new_empty(rows, TERMS * hidden)
    sums = a_SH.new_empty(PARTS, experts + 1, hidden)
    wrap_triton(_head_backward)[triton.cdiv(hidden, COLS_BACKWARD), PARTS](
        d_y_SE, a_SH, v_EH.contiguous(), terms_STH, sums, rows, hidden, experts,
        _padded(experts), triton.cdiv(rows, PARTS * ROWS_BACKWARD), TERMS, ROWS_BACKWARD, COLS_BACKWARD)
    total = sums.sum(0)
    return _sum_of_terms(terms_STH, x_SD), total[experts].clone(), total[:experts].clone()


def _predict_context(ctx, inputs, output) -> None:
    x_SD, _, _, v_EH, _ = inputs
    ctx.save_for_backward(x_SD, output[1], v_EH)
    ctx.mark_non_differentiable(output[1])


def _predict_autograd(ctx, d_y_SE, _):
    return None, *predict_backward(d_y_SE, *ctx.saved_tensors), d_y_SE.sum(0)


predict.register_autograd(_predict_autograd, setup_context=_predict_context)


@triton.jit
def _terms(x, parts, N, COLUMNS, row_step, term_step, TERMS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(x + place, mask=place < N, other=0)
    first = parts + place // COLUMNS * row_step + place % COLUMNS
    for term in tl.static_range(TERMS):
        part = left.to(parts.dtype.element_ty)
        tl.store(first + term * term_step, part, mask=place < N)
        left -= part.to(tl.float32)


@triton.jit
def _gate_forward(x, w, y, S, D, E, EXPERTS: tl.constexpr, TERMS: tl.constexpr, ROWS: tl.constexpr,
                  DEPTH: tl.constexpr):
    rows, cols = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, TERMS * EXPERTS)
    first = tl.program_id(1) * EXPERTS
    expert = first + cols % EXPERTS
    total = tl.zeros((ROWS, TERMS * EXPERTS), tl.float32)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        tokens = tl.load(x + rows[:, None] * D + d, mask=(rows < S)[:, None] & (d < D), other=0)
        place = (cols // EXPERTS * E + expert) * D + d[:, None]
        total = tl.dot(tokens, tl.load(w + place, mask=(expert < E) & (d < D)[:, None], other=0), total)
    both = tl.sum(tl.reshape(total, (ROWS, TERMS, EXPERTS)), 1)
    experts = first + tl.arange(0, EXPERTS)
    tl.store(y + rows[:, None] * E + experts, both, mask=(rows < S)[:, None] & (experts < E))


@triton.jit
def _gate_backward(d_y, w, d_x, S, D, E: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for first in tl.static_range(0, E, EXPERTS):
        experts = first + tl.arange(0, EXPERTS)
        d = tl.load(d_y + rows[:, None] * E + experts, mask=(rows < S)[:, None] & (experts < E), other=0)
        weight = tl.load(w + experts[:, None] * D + cols, mask=(experts < E)[:, None] & (cols < D), other=0)
        total = tl.dot(d, weight, total, input_precision="tf32x3")
    tl.store(d_x + rows[:, None] * D + cols, total, mask=(rows < S)[:, None] & (cols < D))


@triton.jit
def _hidden(x, w, b, rows, cols, S, H, D: tl.constexpr, TERMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
            DEPTH: tl.constexpr):
    """Return a tile of x w^T + b; 0 in columns behind the last."""
    total = tl.zeros((ROWS, COLS), tl.float32)
    # One product a turn, and turns counted when it is compiled: else the units wait for one another.
    for step in range(TERMS * tl.cdiv(D, DEPTH)):
        d = step // TERMS * DEPTH + tl.arange(0, DEPTH)
        tokens = tl.load(x + rows[:, None] * D + d, mask=(rows < S)[:, None] & (d < D), other=0)
        term = tl.load(w + step % TERMS * H * D + cols * D + d[:, None], mask=(cols < H) & (d < D)[:, None], other=0)
        total = tl.dot(tokens, term, total)
    return total + tl.load(b + cols, mask=cols < H, other=0)


@triton.jit
def _hidden_forward(x, w, b, a, S, H, D: tl.constexpr, TERMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                    DEPTH: tl.constexpr):
    tiles = tl.cdiv(H, COLS)  # tiles of the same rows are neighbours, so that these are read once
    rows = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % tiles * COLS + tl.arange(0, COLS)
    total = _hidden(x, w, b, rows, cols, S, H, D, TERMS, ROWS, COLS, DEPTH)
    tl.store(a + rows[:, None] * H + cols, total, mask=(rows < S)[:, None] & (cols < H))


@triton.jit
def _predict_only(x, w, b, v, c, y, S, H, E, D: tl.constexpr, TERMS: tl.constexpr, EXPERTS: tl.constexpr,
                  ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr):
    rows, experts = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, EXPERTS)
    total = tl.zeros((ROWS, EXPERTS), tl.float32)
    for first in range(0, H, COLS):
        cols = first + tl.arange(0, COLS)
        u = _hidden(x, w, b, rows, cols, S, H, D, TERMS, ROWS, COLS, DEPTH)
        u *= tl.sigmoid(u)
        for _ in tl.static_range(TERMS):
            part = u.to(x.dtype.element_ty)
            u -= part.to(tl.float32)
            for term in tl.static_range(TERMS):
                place = v + term * E * H + experts * H + cols[:, None]
                weight = tl.load(place, mask=(experts < E) & (cols < H)[:, None], other=0)
                total = tl.dot(part, weight, total)
    total += tl.load(c + experts, mask=experts < E, other=0)
    tl.store(y + rows[:, None] * E + experts, total, mask=(rows < S)[:, None] & (experts < E))


@triton.jit
def _head_forward(a, v, c, y, S, H, E, EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows, experts = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, EXPERTS)
    total = tl.zeros((ROWS, EXPERTS), tl.float32)
    for start in range(0, H, COLS):
        cols = start + tl.arange(0, COLS)
        u = tl.load(a + rows[:, None] * H + cols, mask=(rows < S)[:, None] & (cols < H), other=0)
        weight = tl.load(v + experts * H + cols[:, None], mask=(experts < E) & (cols < H)[:, None], other=0)
        total = tl.dot(u * tl.sigmoid(u), weight, total, input_precision="tf32x3")
    total += tl.load(c + experts, mask=experts < E, other=0)
    tl.store(y + rows[:, None] * E + experts, total, mask=(rows < S)[:, None] & (experts < E))


@triton.jit
def _head_backward(d_y, a, v, terms, sums, S, H, E, EXPERTS: tl.constexpr, BLOCKS, TERMS: tl.constexpr,
                   ROWS: tl.constexpr, COLS: tl.constexpr):
    cols, experts = tl.program_id(0) * COLS + tl.arange(0, COLS), tl.arange(0, EXPERTS)
    weight = tl.load(v + experts[:, None] * H + cols, mask=(experts < E)[:, None] & (cols < H), other=0)
    sum_v = tl.zeros((EXPERTS, COLS), tl.float32)
    sum_b = tl.zeros((COLS,), tl.float32)
    for block in range(BLOCKS):
        rows = (tl.program_id(1).to(tl.int64) * BLOCKS + block) * ROWS + tl.arange(0, ROWS)
        mask = (rows < S)[:, None] & (cols < H)
        u = tl.load(a + rows[:, None] * H + cols, mask=mask, other=0)
        d = tl.load(d_y + rows[:, None] * E + experts, mask=(rows < S)[:, None] & (experts < E), other=0)
        s = tl.sigmoid(u)
        sum_v = tl.dot(tl.trans(d), u * s, sum_v, input_precision="tf32x3")
        d_a = tl.dot(d, weight, input_precision="tf32x3") * s * (1 + u * (1 - s))
        sum_b += tl.sum(d_a, 0)
        place = terms + rows[:, None] * (TERMS * H) + cols
        for term in tl.static_range(TERMS):
            part = d_a.to(terms.dtype.element_ty)
            tl.store(place + term * H, part, mask=mask)
            d_a -= part.to(tl.float32)
    sums += tl.program_id(1).to(tl.int64) * (E + 1) * H
    tl.store(sums + experts[:, None] * H + cols, sum_v, mask=(experts < E)[:, None] & (cols < H))
    tl.store(sums + E * H + cols, sum_b, mask=cols < H)
