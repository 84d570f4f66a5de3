"""Triton kernels of the residual sum, the norm behind it and its modulation by the condition, in one pass each way.

    x' = x + gate * y,   n = (x' - mean) / std,   h = (1 + scale) * n + shift

    d_n = (1 + scale) * d_h,   d_x = d_x' + (d_n - mean(d_n) - n * mean(n * d_n)) / std,   d_y = gate * d_x
    d_shift = sum_t d_h,   d_scale = sum_t n * d_h,   d_gate = sum_t y * d_x

A sample's shift, scale and gate belong to all its tokens, so backward a program walks over a sample's tokens and
keeps the three sums. Arithmetic is float32; norm and sums are computed again backward from the x' that is kept.
Shapes: B samples, T tokens, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

ROWS = 4
"""Tokens of a program forward."""
TOKENS, ROWS_BACKWARD = 64, 2
"""Tokens of a program backward, and how many it holds at a time."""
STAGES_BACKWARD = 3
"""Turns in flight: each waits for its sums, while the next ones load. Of 13 choices on an H100 the best for the widths
384, 768 and 1024 together."""


@triton_op("diffmoe::residual_norm", mutates_args={})
def residual_norm(x_BTD: Tensor, gate_BD: Tensor, y_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor,
                  eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x + gate * y in the dtype of x, and its modulated norm in `dtype`, both (B, T, D)."""
    x_BTD, y_BTD, gate_BD, shift_BD, scale_BD = (
        value.contiguous() for value in (x_BTD, y_BTD, gate_BD, shift_BD, scale_BD))
    batch, tokens, width = x_BTD.shape
    sum_BTD, h_BTD = torch.empty_like(x_BTD), torch.empty_like(x_BTD, dtype=dtype)
    wrap_triton(_norm_forward)[(triton.cdiv(tokens, ROWS), batch)](
        x_BTD, y_BTD, gate_BD, shift_BD, scale_BD, sum_BTD, h_BTD, eps, tokens, width,
        triton.next_power_of_2(width), ROWS)
    return sum_BTD, h_BTD


@triton_op("diffmoe::residual_norm_backward", mutates_args={})
def residual_norm_backward(d_sum_BTD: Tensor, d_h_BTD: Tensor, sum_BTD: Tensor, y_BTD: Tensor, gate_BD: Tensor,
                           scale_BD: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x and y, and those of gate, shift and scale as one (3, B, D)."""
    d_sum_BTD, d_h_BTD, sum_BTD, y_BTD, gate_BD, scale_BD = (
        value.contiguous() for value in (d_sum_BTD, d_h_BTD, sum_BTD, y_BTD, gate_BD, scale_BD))
    batch, tokens, width = sum_BTD.shape
    parts = triton.cdiv(tokens, TOKENS)
    d_x_BTD, d_y_BTD = torch.empty_like(sum_BTD), torch.empty_like(y_BTD)
    sums = sum_BTD.new_empty(3, parts, batch, width, dtype=torch.float32)
    wrap_triton(_norm_backward)[(parts, batch)](
        d_sum_BTD, d_h_BTD, sum_BTD, y_BTD, gate_BD, scale_BD, d_x_BTD, d_y_BTD, sums, eps, tokens, width, batch,
        triton.next_power_of_2(width), ROWS_BACKWARD, TOKENS, STAGES_BACKWARD)
    return d_x_BTD, d_y_BTD, sums.sum(1).to(gate_BD.dtype)


def _setup_context(ctx, inputs, output) -> None:
    _, gate_BD, y_BTD, _, scale_BD, ctx.eps, _ = inputs
    ctx.save_for_backward(output[0], y_BTD, gate_BD, scale_BD)


def _autograd(ctx, d_sum_BTD, d_h_BTD):
    d_x_BTD, d_y_BTD, d_modulation = residual_norm_backward(d_sum_BTD, d_h_BTD, *ctx.saved_tensors, ctx.eps)
    d_gate_BD, d_shift_BD, d_scale_BD = d_modulation.unbind()
    return d_x_BTD, d_gate_BD, d_y_BTD, d_shift_BD, d_scale_BD, None, None


residual_norm.register_autograd(_autograd, setup_context=_setup_context)


@triton.jit
def _norm(x, EPS: tl.constexpr, mask, D):
    """Return the norm of rows whose masked entries are 0, and 1 / std."""
    centred = tl.where(mask, x - tl.sum(x, 1)[:, None] / D, 0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / D + EPS)
    return centred * rstd, rstd


@triton.jit
def _norm_forward(x, y, gate, shift, scale, total, h, EPS: tl.constexpr, T, D, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    image = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, WIDTH)[None, :]
    mask, place, vector = (t < T) & (d < D), (image * T + t) * D + d, image * D + d
    value = tl.load(x + place, mask=mask, other=0).to(tl.float32)
    value += (tl.load(gate + vector, mask=d < D, other=0).to(tl.float32)
              * tl.load(y + place, mask=mask, other=0).to(tl.float32))
    tl.store(total + place, value, mask=mask)
    n, _ = _norm(value, EPS, mask, D)
    n = n * (1 + tl.load(scale + vector, mask=d < D, other=0).to(tl.float32))
    tl.store(h + place, n + tl.load(shift + vector, mask=d < D, other=0).to(tl.float32), mask=mask)


@triton.jit
def _norm_backward(d_total, d_h, total, y, gate, scale, d_x, d_y, sums, EPS: tl.constexpr, T, D, B, WIDTH: tl.constexpr,
                   ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr):
    image = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, WIDTH)[None, :]
    vector = image * D + d
    g = tl.load(gate + vector, mask=d < D, other=0).to(tl.float32)
    factor = 1 + tl.load(scale + vector, mask=d < D, other=0).to(tl.float32)
    sum_gate = tl.zeros((ROWS, WIDTH), tl.float32)
    sum_shift = tl.zeros((ROWS, WIDTH), tl.float32)
    sum_scale = tl.zeros((ROWS, WIDTH), tl.float32)
    first = tl.program_id(0) * TOKENS
    for start in tl.range(first, first + TOKENS, ROWS, num_stages=STAGES):
        t = start + tl.arange(0, ROWS)[:, None]
        mask, place = (t < T) & (d < D), (image * T + t) * D + d
        value = tl.load(total + place, mask=mask, other=0).to(tl.float32)
        grad = tl.load(d_h + place, mask=mask, other=0).to(tl.float32)
        passed_on = tl.load(d_total + place, mask=mask, other=0).to(tl.float32)
        branch = tl.load(y + place, mask=mask, other=0).to(tl.float32)
        n, rstd = _norm(value, EPS, mask, D)
        sum_shift += grad
        sum_scale += grad * n
        grad *= factor
        grad = (grad - tl.sum(grad, 1)[:, None] / D - n * (tl.sum(grad * n, 1)[:, None] / D)) * rstd
        grad += passed_on
        tl.store(d_x + place, grad, mask=mask)
        tl.store(d_y + place, grad * g, mask=mask)
        sum_gate += branch * grad
    d = tl.arange(0, WIDTH)
    to = sums + (tl.program_id(0) * B + image) * D + d
    of_kind = tl.num_programs(0).to(tl.int64) * B * D
    tl.store(to, tl.sum(sum_gate, 0), mask=d < D)
    tl.store(to + of_kind, tl.sum(sum_shift, 0), mask=d < D)
    tl.store(to + 2 * of_kind, tl.sum(sum_scale, 0), mask=d < D)
