"""Triton kernels of attention on packed q, k, v: one program holds one head of one image.

The bias of the projection to q, k and v is added here, so that its gradient is summed where the gradients of q, k
and v are at hand: over an image's tokens by a program, over images behind it.

    S = Q K^T / sqrt(K),  P = softmax(S),  O = P V
    dV = P^T dO,  dP = dO V^T,  dS = P (dP - rowsum(P dP)),  dQ = dS K / sqrt(K),  dK = dS^T Q / sqrt(K)

Products take the operands' dtype and add up in float32; softmax is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton


@triton_op("diffmoe::packed_attention", mutates_args={})
def packed_attention(qkv: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    """Return attention (B, T, D) of packed q, k, v (B, T, 3 D) plus their bias (3 D,).

    T and the width of a head are powers of 2 from 16 to 128.
    """
    batch, tokens, width = qkv.shape
    qkv, bias = qkv.contiguous(), bias.contiguous()
    out = qkv.new_empty(batch, tokens, width // 3)
    wrap_triton(_forward)[(batch * num_heads,)](
        qkv, bias, out, (width // 3 // num_heads) ** -0.5, tokens, num_heads, width // 3 // num_heads)
    return out


@triton_op("diffmoe::packed_attention_backward", mutates_args={})
def packed_attention_backward(qkv: Tensor, bias: Tensor, grad: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of packed q, k, v (B, T, 3 D) and of their bias for that of the output (B, T, D)."""
    batch, tokens, width = qkv.shape
    qkv, bias, grad = qkv.contiguous(), bias.contiguous(), grad.contiguous()
    grad_qkv, sums = torch.empty_like(qkv), qkv.new_empty(batch, width, dtype=torch.float32)
    wrap_triton(_backward)[(batch * num_heads,)](
        qkv, bias, grad, grad_qkv, sums, (width // 3 // num_heads) ** -0.5, tokens, num_heads, width // 3 // num_heads)
    return grad_qkv, sums.sum(0).to(bias.dtype)


def _setup_context(ctx, inputs, output) -> None:
    *saved, ctx.num_heads = inputs
    ctx.save_for_backward(*saved)


def _autograd(ctx, grad):
    return *packed_attention_backward(*ctx.saved_tensors, grad, ctx.num_heads), None


packed_attention.register_autograd(_autograd, setup_context=_setup_context)


@triton.jit
def _load(qkv, bias, place, column):
    value = tl.load(qkv + place + column)
    return (value + tl.load(bias + column)).to(value.dtype)


@triton.jit
def _forward(qkv, bias, out, scale, T: tl.constexpr, H: tl.constexpr, K: tl.constexpr):
    image = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    t, k = tl.arange(0, T)[:, None], tl.arange(0, K)[None, :]
    row, column = (image * T + t) * (3 * H * K), head * K + k
    q = _load(qkv, bias, row, column)
    key = _load(qkv, bias, row, column + H * K)
    value = _load(qkv, bias, row, column + 2 * H * K)
    p = _probabilities(q, key, scale)
    o = tl.dot(p.to(value.dtype), value)
    tl.store(out + (image * T + t) * (H * K) + column, o.to(value.dtype))


@triton.jit
def _backward(qkv, bias, grad, grad_qkv, sums, scale, T: tl.constexpr, H: tl.constexpr, K: tl.constexpr):
    image = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    t, k = tl.arange(0, T)[:, None], tl.arange(0, K)[None, :]
    row, column = (image * T + t) * (3 * H * K), head * K + k
    q = _load(qkv, bias, row, column)
    key = _load(qkv, bias, row, column + H * K)
    value = _load(qkv, bias, row, column + 2 * H * K)
    do = tl.load(grad + (image * T + t) * (H * K) + column)
    p = _probabilities(q, key, scale)
    sums += image * (3 * H * K) + head * K + tl.arange(0, K)
    dv = tl.dot(tl.trans(p.to(do.dtype)), do)
    tl.store(grad_qkv + row + column + 2 * H * K, dv.to(q.dtype))
    tl.store(sums + 2 * H * K, tl.sum(dv, 0))
    dp = tl.dot(do, tl.trans(value))
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(q.dtype)
    dq = tl.dot(ds, key)
    tl.store(grad_qkv + row + column, dq.to(q.dtype))
    tl.store(sums, tl.sum(dq, 0))
    dk = tl.dot(tl.trans(ds), q)
    tl.store(grad_qkv + row + column + H * K, dk.to(q.dtype))
    tl.store(sums + H * K, tl.sum(dk, 0))


@triton.jit
def _probabilities(q, key, scale):
    s = tl.dot(q, tl.trans(key)) * scale
    e = tl.exp(s - tl.max(s, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]
