"""Float32 products of bf16 tokens on a GPU's matrix units, for routers: the gate, and the capacity predictor as one.

A float32 number is the sum of three bf16 numbers, and a product of two bf16 numbers is exact in float32. So a product
of tokens, which are bf16, with a float32 matrix is three bf16 products that add up in float32, at a third of the matrix
units' rate, where a float32 product has none. On an H100 the sum is right to 1e-6 (a library's float32: 2.5e-7, TF32:
2e-4).

    product    y = x w^T                            d_x = d_y w,  d_w = d_y^T x
    predict    y = silu(a) v^T + c,  a = x w^T + b  d_a = (d_y v) silu'(a),  d_w = d_a^T x;  x gets no gradient

Shapes: S tokens, D width, H hidden width, E experts; O columns of a result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

TERMS = 3
"""bf16 numbers that make a float32 one, 8 bits of 24 each."""
TILE = 128, 128, 64, 8, 3
"""Rows, columns and depth of a product's tile, warps and stages."""
ROWS_FORWARD, COLS_FORWARD = 64, 32
ROWS_BACKWARD, COLS_BACKWARD = 16, 64
PARTS = 128
"""Programs that share the tokens of a column's sums backward."""


def _padded(columns: int) -> int:
    """Return the columns of a tile that holds these: matrix units take 16 or more."""
    return max(triton.next_power_of_2(columns), 16)


def terms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return three tensors of `dtype` (bf16), stacked along a new first axis, whose sum is the float32 `x` exactly."""
    high = x.to(dtype)
    rest = x - high.float()
    middle = rest.to(dtype)
    return torch.stack([high, middle, (rest - middle.float()).to(dtype)])


@triton_op("diffmoe::product", mutates_args={})
def product(x_SD: Tensor, weight_OD: Tensor) -> Tensor:
    """Return x w^T in float32, (S, O).

    Args:
        x_SD: bf16 tokens.
        weight_OD: float32.
    """
    return _product(x_SD, weight_OD, None)


def _product(x_SD: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    x_SD, terms_3OD = x_SD.contiguous(), terms(weight_OD, x_SD.dtype)
    rows, width = x_SD.shape
    cols = len(weight_OD)
    y_SO = x_SD.new_empty(rows, cols, dtype=torch.float32)
    tile_rows, tile_cols, depth, warps, stages = TILE if cols > 64 else (128, _padded(cols), 64, 4, 3)
    wrap_triton(_product_kernel)[triton.cdiv(rows, tile_rows) * triton.cdiv(cols, tile_cols),](
        x_SD, terms_3OD, terms_3OD if bias_O is None else bias_O.contiguous(), y_SO, rows, cols, width,
        bias_O is not None, tile_rows, tile_cols, depth, num_warps=warps, num_stages=stages)
    return y_SO


@torch.library.custom_op("diffmoe::weight_gradient", mutates_args=(), device_types=("cpu", "cuda"))
def weight_gradient(terms_SN: Tensor, x_SD: Tensor) -> Tensor:
    """Return terms^T x of bf16 tensors in float32, (N, D): a library's product that torch.compile leaves alone."""
    if terms_SN.is_cuda:
        return torch.mm(terms_SN.t(), x_SD, out_dtype=torch.float32)
    return terms_SN.t().float() @ x_SD.float()


@weight_gradient.register_fake
def _(terms_SN: Tensor, x_SD: Tensor) -> Tensor:
    return x_SD.new_empty(terms_SN.shape[1], x_SD.shape[1], dtype=torch.float32)


def _product_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _product_autograd(ctx, d_y_SO):
    x_SD, weight_OD = ctx.saved_tensors
    d_x_SD = (d_y_SO @ weight_OD).to(x_SD.dtype) if ctx.needs_input_grad[0] else None
    terms_SN = terms(d_y_SO, x_SD.dtype).permute(1, 0, 2).flatten(1)  # one product for the three terms
    return d_x_SD, weight_gradient(terms_SN, x_SD).unflatten(0, (TERMS, -1)).sum(0)


product.register_autograd(_product_autograd, setup_context=_product_context)


@triton_op("diffmoe::predict", mutates_args={})
def predict(x_SD: Tensor, w_HD: Tensor, b_H: Tensor, v_EH: Tensor, c_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of a capacity predictor (S, E) and what its backward needs, a (S, H), both float32.

    Args:
        x_SD: bf16 tokens; they get no gradient.
        w_HD, b_H, v_EH, c_E: float32 weights and biases of the two layers.
    """
    a_SH = _product(x_SD, w_HD, b_H)
    (rows, hidden), experts = a_SH.shape, len(v_EH)
    y_SE = a_SH.new_empty(rows, experts)
    wrap_triton(_head_forward)[triton.cdiv(rows, ROWS_FORWARD),](
        a_SH, v_EH.contiguous(), c_E.contiguous(), y_SE, rows, hidden, experts, _padded(experts),
        ROWS_FORWARD, COLS_FORWARD)
    return y_SE, a_SH


@triton_op("diffmoe::predict_backward", mutates_args={})
def predict_backward(d_y_SE: Tensor, x_SD: Tensor, a_SH: Tensor, v_EH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of w (H, D), b (H,) and v (E, H) for that of the logits."""
    d_y_SE, a_SH = d_y_SE.contiguous(), a_SH.contiguous()
    (rows, hidden), experts = a_SH.shape, len(v_EH)
    terms_S3H = x_SD.new_empty(rows, TERMS * hidden)
    sums = a_SH.new_empty(PARTS, experts + 1, hidden)
    wrap_triton(_head_backward)[triton.cdiv(hidden, COLS_BACKWARD), PARTS](
        d_y_SE, a_SH, v_EH.contiguous(), terms_S3H, sums, rows, hidden, experts,
        _padded(experts), triton.cdiv(rows, PARTS * ROWS_BACKWARD), ROWS_BACKWARD, COLS_BACKWARD)
    total = sums.sum(0)
    d_w_HD = weight_gradient(terms_S3H, x_SD.contiguous()).unflatten(0, (TERMS, -1)).sum(0)
    return d_w_HD, total[experts].clone(), total[:experts].clone()


def _predict_context(ctx, inputs, output) -> None:
    x_SD, _, _, v_EH, _ = inputs
    ctx.save_for_backward(x_SD, output[1], v_EH)
    ctx.mark_non_differentiable(output[1])


def _predict_autograd(ctx, d_y_SE, _):
    return None, *predict_backward(d_y_SE, *ctx.saved_tensors), d_y_SE.sum(0)


predict.register_autograd(_predict_autograd, setup_context=_predict_context)


@triton.jit
def _product_kernel(x, w, bias, y, S, C, D, BIASED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                    DEPTH: tl.constexpr):
    tiles = tl.cdiv(C, COLS)  # tiles of the same rows are neighbours, so that these are read once
    rows = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % tiles * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(3 * tl.cdiv(D, DEPTH)):  # one product a turn: three wait for one another
        d = step // 3 * DEPTH + tl.arange(0, DEPTH)
        tokens = tl.load(x + rows[:, None] * D + d, mask=(rows < S)[:, None] & (d < D), other=0)
        term = tl.load(w + step % 3 * C * D + cols * D + d[:, None], mask=(cols < C) & (d < D)[:, None], other=0)
        total = tl.dot(tokens, term, total)
    if BIASED:
        total += tl.load(bias + cols, mask=cols < C, other=0)
    tl.store(y + rows[:, None] * C + cols, total, mask=(rows < S)[:, None] & (cols < C))


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
def _head_backward(d_y, a, v, terms, sums, S, H, E, EXPERTS: tl.constexpr, BLOCKS, ROWS: tl.constexpr,
                   COLS: tl.constexpr):
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
        place = terms + rows[:, None] * (3 * H) + cols
        for term in tl.static_range(3):
            part = d_a.to(terms.dtype.element_ty)
            tl.store(place + term * H, part, mask=mask)
            d_a -= part.to(tl.float32)
    sums += tl.program_id(1).to(tl.int64) * (E + 1) * H
    tl.store(sums + experts[:, None] * H + cols, sum_v, mask=(experts < E)[:, None] & (cols < H))
    tl.store(sums + E * H + cols, sum_b, mask=cols < H)
