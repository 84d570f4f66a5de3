"""Triton kernels of attention on packed q, k, v: one program holds one head of one image.

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
def packed_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Return attention (B, T, D) of packed (B, T, 3 D); T and the width of a head are powers of 2 from 16 to 128."""
    batch, tokens, width = qkv.shape
    qkv = qkv.contiguous()
    out = qkv.new_empty(batch, tokens, width // 3)
    wrap_triton(_forward)[(batch * num_heads,)](
        qkv, out, (width // 3 // num_heads) ** -0.5, tokens, num_heads, width // 3 // num_heads)
    return out


@triton_op("diffmoe::packed_attention_backward", mutates_args={})
def packed_attention_backward(qkv: Tensor, grad: Tensor, num_heads: int) -> Tensor:
    """Return the gradient of packed q, k, v (B, T, 3 D) for that of the output (B, T, D)."""
    batch, tokens, width = qkv.shape
    qkv, grad = qkv.contiguous(), grad.contiguous()
    grad_qkv = torch.empty_like(qkv)
    wrap_triton(_backward)[(batch * num_heads,)](
        qkv, grad, grad_qkv, (width // 3 // num_heads) ** -0.5, tokens, num_heads, width // 3 // num_heads)
    return grad_qkv


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.num_heads = inputs[1]


def _autograd(ctx, grad):
    return packed_attention_backward(ctx.saved_tensors[0], grad, ctx.num_heads), None


packed_attention.register_autograd(_autograd, setup_context=_setup_context)


@triton.jit
def _forward(qkv, out, scale, T: tl.constexpr, H: tl.constexpr, K: tl.constexpr):
    image = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    t, k = tl.arange(0, T)[:, None], tl.arange(0, K)[None, :]
    place = (image * T + t) * (3 * H * K) + head * K + k
    q = tl.load(qkv + place)
    key = tl.load(qkv + place + H * K)
    value = tl.load(qkv + place + 2 * H * K)
    p = _probabilities(q, key, scale)
    o = tl.dot(p.to(value.dtype), value)
    tl.store(out + (image * T + t) * (H * K) + head * K + k, o.to(value.dtype))


@triton.jit
def _backward(qkv, grad, grad_qkv, scale, T: tl.constexpr, H: tl.constexpr, K: tl.constexpr):
    image = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    t, k = tl.arange(0, T)[:, None], tl.arange(0, K)[None, :]
    place = (image * T + t) * (3 * H * K) + head * K + k
    q = tl.load(qkv + place)
    key = tl.load(qkv + place + H * K)
    value = tl.load(qkv + place + 2 * H * K)
    do = tl.load(grad + (image * T + t) * (H * K) + head * K + k)
    p = _probabilities(q, key, scale)
    tl.store(grad_qkv + place + 2 * H * K, tl.dot(tl.trans(p.to(do.dtype)), do).to(q.dtype))
    dp = tl.dot(do, tl.trans(value))
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(q.dtype)
    tl.store(grad_qkv + place, tl.dot(ds, key).to(q.dtype))
    tl.store(grad_qkv + place + H * K, tl.dot(tl.trans(ds), q).to(q.dtype))


@triton.jit
def _probabilities(q, key, scale):
    s = tl.dot(q, tl.trans(key)) * scale
    e = tl.exp(s - tl.max(s, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]
