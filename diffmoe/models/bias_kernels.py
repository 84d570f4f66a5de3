"""Triton kernels of y = gelu(x + bias), each row with the bias of its expert.

    gelu(u) = u sigmoid(2 v),  v = sqrt(2/pi) (u + 0.044715 u^3)                                  (tanh form)
    gelu'(u) = s + 2 u s (1 - s) v',  s = sigmoid(2 v),  v' = sqrt(2/pi) (1 + 3 * 0.044715 u^2)

Rows behind the last expert's (pads) are left unset in the result and in the gradient.
Shapes: N rows, E experts, F width. Arithmetic is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from diffmoe.models.tile_kernels import add_tiles, groups, num_tiles, place

ROWS, COLS = 64, 64


@triton_op("diffmoe::bias_gelu", mutates_args={})
def bias_gelu(x_NF: Tensor, bias_EF: Tensor, ends_E: Tensor) -> Tensor:
    """Return gelu(x + bias), tanh form, in the dtype of x (N, F).

    Args:
        x_NF: rows, expert by expert.
        bias_EF: one bias an expert.
        ends_E: int32, the end of each expert's rows; rows from the last end on give nothing.
    """
    x_NF = x_NF.contiguous()
    y_NF = torch.empty_like(x_NF)
    wrap_triton(_forward)[_grid(x_NF, ends_E)](
        x_NF, bias_EF.contiguous(), ends_E, y_NF, x_NF.shape[1], *groups(ends_E), ROWS, COLS)
    return y_NF


@triton_op("diffmoe::bias_gelu_backward", mutates_args={})
def bias_gelu_backward(d_y_NF: Tensor, x_NF: Tensor, bias_EF: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (N, F) and bias (E, F) for that of the result."""
    d_y_NF, x_NF, bias_EF = d_y_NF.contiguous(), x_NF.contiguous(), bias_EF.contiguous()
    d_x_NF = torch.empty_like(x_NF)
    grid = _grid(x_NF, ends_E)
    sums = x_NF.new_empty(grid[1], x_NF.shape[1], dtype=torch.float32)
    wrap_triton(_backward)[grid](
        d_y_NF, x_NF, bias_EF, ends_E, d_x_NF, sums, x_NF.shape[1], *groups(ends_E), ROWS, COLS)
    return d_x_NF, add_tiles(sums, ends_E, ROWS, bias_EF.dtype)


def _grid(x_NF: Tensor, ends_E: Tensor) -> tuple[int, int]:
    return triton.cdiv(x_NF.shape[1], COLS), num_tiles(len(x_NF), ends_E, ROWS)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, d_y_NF):
    return *bias_gelu_backward(d_y_NF, *ctx.saved_tensors), None


bias_gelu.register_autograd(_autograd, setup_context=_setup_context)


@triton.jit
def _forward(x, bias, ends, y, F, E: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    group, rows, end = place(tl.program_id(1), ends, E, GROUPS, ROWS)
    rows, cols = rows[:, None], tl.program_id(0) * COLS + tl.arange(0, COLS)
    mask = (rows < end) & (cols < F)
    u = tl.load(x + rows * F + cols, mask=mask, other=0).to(tl.float32)
    u += tl.load(bias + group * F + cols, mask=(cols < F) & (group < E), other=0).to(tl.float32)
    tl.store(y + rows * F + cols, u * sigmoid_2v(u), mask=mask)


@triton.jit
def _backward(d_y, x, bias, ends, d_x, sums, F, E: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
              COLS: tl.constexpr):
    group, rows, end = place(tl.program_id(1), ends, E, GROUPS, ROWS)
    rows, cols = rows[:, None], tl.program_id(0) * COLS + tl.arange(0, COLS)
    mask = (rows < end) & (cols < F)
    d = tl.load(d_y + rows * F + cols, mask=mask, other=0).to(tl.float32)
    u = tl.load(x + rows * F + cols, mask=mask, other=0).to(tl.float32)
    u += tl.load(bias + group * F + cols, mask=(cols < F) & (group < E), other=0).to(tl.float32)
    s = sigmoid_2v(u)
    d *= s + u * s * (1 - s) * (1.5957691216057308 + 0.21406444881780076 * u * u)  # 2 v'
    tl.store(d_x + rows * F + cols, d, mask=mask)
    tl.store(sums + tl.program_id(1).to(tl.int64) * F + cols, tl.sum(d, 0), mask=cols < F)


@triton.jit
def sigmoid_2v(u):
    """Return what GELU multiplies u by."""
    return tl.sigmoid(1.5957691216057308 * u * (1 + 0.044715 * u * u))  # 2 sqrt(2/pi)
