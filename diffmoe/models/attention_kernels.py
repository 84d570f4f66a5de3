"""Triton kernels of attention on packed q, k, v: rows are read where the projection left them, gradients written there.

Scores, probabilities and outputs of a head of an image, and their gradients:

    S = (Q + bq) K^T / sqrt(K),  P = softmax(S),  O = P V + bv
    dV = P^T dO,  dP = dO V^T,  dS = P (dP - rowsum(P dP)),  dQ = dS K / sqrt(K),  dK = dS^T (Q + bq) / sqrt(K)

The bias of the projection to q, k and v is added here, so that its gradient is summed where the gradients are at hand.
A row of P adds up to 1 and a row of dS to 0, so only the bias of queries is added to a factor: that of keys moves a
row's scores alike, changes nothing and has gradient 0; that of values is added to O, and its gradient is the sum of dO.

Up to WHOLE tokens one program holds a head whole and needs one pass backward. Beyond it programs hold blocks of
queries or keys (FlashAttention-2, arXiv:2307.08691): backward once by queries for rowsum(P dP) and dQ, once by keys
for dK and dV. Scores are then computed twice, but nothing is added up between programs save the bias's gradient, whose
parts are summed in a fixed order. Products take the operands' dtype and add up in float32; softmax is float32.
Shapes: B images, T tokens, H heads, K their width, D = H K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

WHOLE = 128
"""Tokens up to which one program holds a head of an image."""
FORWARD = {"M": 64, "N": 64, "num_warps": 4, "num_stages": 3}
BACKWARD_QUERIES = {"M": 64, "N": 64, "num_warps": 4, "num_stages": 2}
BACKWARD_KEYS = {"M": 32, "N": 64, "num_warps": 4, "num_stages": 3}
"""Blocks of M queries and N keys beyond that, the fastest of 18 on an H100 (256 tokens, 16 heads of width 64)."""
LOG2E = tl.constexpr(1.4426950408889634)
"""The hardware's exponential is of base 2."""


@triton_op("diffmoe::packed_attention", mutates_args={})
def packed_attention(qkv: Tensor, bias: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Return attention (B, T, D) of packed q, k, v (B, T, 3 D) plus their bias (3 D,), and log2 sum exp S (B, H, T).

    T is a power of 2 from 16, the width of a head one from 16 to 128. The second output is for the backward pass: no
    gradient flows through it.
    """
    batch, tokens, width = qkv.shape
    qkv, bias = qkv.contiguous(), bias.contiguous()
    out = qkv.new_empty(batch, tokens, width // 3)
    lse = qkv.new_empty(batch, num_heads, tokens, dtype=torch.float32)
    blocks = FORWARD if tokens > WHOLE else {"M": tokens, "N": tokens, **_whole_options(tokens)}
    wrap_triton(_forward)[(tokens // blocks["M"] * batch * num_heads,)](
        qkv, bias, out, lse, tokens, num_heads, width // 3 // num_heads, **blocks)
    return out, lse


@triton_op("diffmoe::packed_attention_backward", mutates_args={})
def packed_attention_backward(qkv: Tensor, bias: Tensor, out: Tensor, lse: Tensor, grad: Tensor,
                              num_heads: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of packed q, k, v (B, T, 3 D) and of their bias for that of the output (B, T, D)."""
    batch, tokens, width = qkv.shape
    qkv, bias, out, grad = qkv.contiguous(), bias.contiguous(), out.contiguous(), grad.contiguous()
    sizes = tokens, num_heads, width // 3 // num_heads
    parts = tokens // BACKWARD_QUERIES["M"] if tokens > WHOLE else 1
    grad_qkv, sums = torch.empty_like(qkv), qkv.new_empty(batch * parts, 2, width // 3, dtype=torch.float32)
    if tokens > WHOLE:
        delta = torch.empty_like(lse)
        wrap_triton(_backward_queries)[(batch * num_heads * parts,)](
            qkv, bias, out, lse, grad, grad_qkv, delta, sums, *sizes, **BACKWARD_QUERIES)
        wrap_triton(_backward_keys)[(batch * num_heads * (tokens // BACKWARD_KEYS["N"]),)](
            qkv, bias, lse, grad, grad_qkv, delta, *sizes, **BACKWARD_KEYS)
    else:
        wrap_triton(_backward_whole)[(batch * num_heads,)](
            qkv, bias, lse, grad, grad_qkv, sums, *sizes, **_whole_options(tokens))
    of_queries, of_values = sums.sum(0)
    return grad_qkv, torch.cat((of_queries, torch.zeros_like(of_queries), of_values)).to(bias.dtype)


def _whole_options(tokens: int) -> dict[str, int]:
    """Return a warp for 16 tokens, the rows of a tensor core's tile; more rows a warp would not fit its registers."""
    return {"num_warps": tokens // 16, "num_stages": 1}


def _setup_context(ctx, inputs, output) -> None:
    qkv, bias, ctx.num_heads = inputs
    ctx.save_for_backward(qkv, bias, *output)


def _autograd(ctx, grad, _):
    return *packed_attention_backward(*ctx.saved_tensors, grad, ctx.num_heads), None


packed_attention.register_autograd(_autograd, setup_context=_setup_context)


@triton.jit
def _forward(qkv, bias, out, lse, T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Write M queries' outputs and log2 sum exp S; S is kept before its scale, which the exponent takes with log2 e."""
    SCALE: tl.constexpr = LOG2E * K ** -0.5
    row = tl.program_id(0) // (T // M)  # an image's head
    image, head = (row // H).to(tl.int64), row % H
    m, n, k = tl.program_id(0) % (T // M) * M + tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    qkv += image * (T * 3 * H * K) + head * K
    bias += head * K + k
    q_at, key_at = m[:, None] * (3 * H * K) + k, H * K + n[:, None] * (3 * H * K) + k
    if N < T:
        q, q_bias = tl.load(qkv + q_at), tl.load(bias)
    top, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
    o = tl.zeros((M, K), tl.float32)
    for start in range(0, T, N):
        key = tl.load(qkv + start * (3 * H * K) + key_at)
        value = tl.load(qkv + start * (3 * H * K) + H * K + key_at)
        if N == T:  # Queries last: what takes them to registers waits for them, and all loads should be under way.
            q, q_bias = tl.load(qkv + q_at), tl.load(bias)
        s = tl.dot((q + q_bias).to(q.dtype), tl.trans(key))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s * SCALE - (new_top * SCALE)[:, None])
        shrink = tl.exp2((top - new_top) * SCALE)
        total = total * shrink + tl.sum(p, 1)
        o = tl.dot(p.to(value.dtype), value, o * shrink[:, None])
        top = new_top
    o = o / total[:, None] + tl.load(bias + 2 * H * K)
    tl.store(out + image * (T * H * K) + head * K + m[:, None] * (H * K) + k, o)
    tl.store(lse + row * T + m, top * SCALE + tl.log2(total))


@triton.jit
def _backward_whole(qkv, bias, lse, grad, grad_qkv, sums, T: tl.constexpr, H: tl.constexpr, K: tl.constexpr):
    """Write a head's gradients of q, k and v, and their part of the bias's."""
    SCALE: tl.constexpr = K ** -0.5
    row = tl.program_id(0)
    image, head = (row // H).to(tl.int64), row % H
    t, k = tl.arange(0, T), tl.arange(0, K)
    qkv += image * (T * 3 * H * K) + head * K
    grad_qkv += image * (T * 3 * H * K) + head * K
    sums += image * (2 * H * K) + head * K + k
    at = t[:, None] * (3 * H * K) + k
    key = tl.load(qkv + H * K + at)
    value = tl.load(qkv + 2 * H * K + at)
    do = tl.load(grad + image * (T * H * K) + head * K + t[:, None] * (H * K) + k)
    level = tl.load(lse + row * T + t)
    q = tl.load(qkv + at)  # last, as forward
    q = (q + tl.load(bias + head * K + k)).to(key.dtype)
    p = tl.exp2(tl.dot(q, tl.trans(key)) * (SCALE * LOG2E) - level[:, None])
    dp = tl.dot(do, tl.trans(value))
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * SCALE).to(key.dtype)
    dv = tl.dot(tl.trans(p.to(do.dtype)), do)  # after dS: P and dP have left their registers, and 5 programs fit
    tl.store(grad_qkv + 2 * H * K + at, dv)
    tl.store(sums + H * K, tl.sum(dv, 0))
    dq = tl.dot(ds, key)
    tl.store(grad_qkv + at, dq)
    tl.store(sums, tl.sum(dq, 0))
    dk = tl.dot(tl.trans(ds), q)
    tl.store(grad_qkv + H * K + at, dk)


@triton.jit
def _backward_queries(qkv, bias, out, lse, grad, grad_qkv, delta, sums, T: tl.constexpr, H: tl.constexpr,
                      K: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Write M queries' dQ, delta = rowsum(dO (O - bv)), which is rowsum(P dP), and their part of the bias's."""
    SCALE: tl.constexpr = K ** -0.5
    row, block = tl.program_id(0) // (T // M), tl.program_id(0) % (T // M)
    image, head = (row // H).to(tl.int64), row % H
    m, n, k = block * M + tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    qkv += image * (T * 3 * H * K) + head * K
    at = image * (T * H * K) + head * K + m[:, None] * (H * K) + k
    q_at, key_at = m[:, None] * (3 * H * K) + k, H * K + n[:, None] * (3 * H * K) + k
    bias += head * K + k
    sums += (image * (T // M) + block) * (2 * H * K) + head * K + k
    do, o = tl.load(grad + at), tl.load(out + at)
    level = tl.load(lse + row * T + m)
    q = (tl.load(qkv + q_at) + tl.load(bias)).to(do.dtype)
    d = tl.sum(do.to(tl.float32) * (o.to(tl.float32) - tl.load(bias + 2 * H * K).to(tl.float32)), 1)
    tl.store(delta + row * T + m, d)
    tl.store(sums + H * K, tl.sum(do.to(tl.float32), 0))
    dq = tl.zeros((M, K), tl.float32)
    for start in range(0, T, N):
        key = tl.load(qkv + start * (3 * H * K) + key_at)
        value = tl.load(qkv + start * (3 * H * K) + H * K + key_at)
        p = tl.exp2(tl.dot(q, tl.trans(key)) * (SCALE * LOG2E) - level[:, None])
        ds = p * (tl.dot(do, tl.trans(value)) - d[:, None])
        dq = tl.dot(ds.to(key.dtype), key, dq)
    dq *= SCALE
    tl.store(grad_qkv + image * (T * 3 * H * K) + head * K + q_at, dq)
    tl.store(sums, tl.sum(dq, 0))


@triton.jit
def _backward_keys(qkv, bias, lse, grad, grad_qkv, delta, T: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
                   M: tl.constexpr, N: tl.constexpr):
    """Write N keys' dK and dV, from transposed scores (N, M), so that P^T and dS^T need not be turned."""
    SCALE: tl.constexpr = K ** -0.5
    row, block = tl.program_id(0) // (T // N), tl.program_id(0) % (T // N)
    image, head = (row // H).to(tl.int64), row % H
    m, n, k = tl.arange(0, M), block * N + tl.arange(0, N), tl.arange(0, K)
    at = image * (T * 3 * H * K) + head * K + H * K + n[:, None] * (3 * H * K) + k
    key, value = tl.load(qkv + at), tl.load(qkv + at + H * K)
    qkv += image * (T * 3 * H * K) + head * K
    grad += image * (T * H * K) + head * K
    q_bias = tl.load(bias + head * K + k)
    dk, dv = tl.zeros((N, K), tl.float32), tl.zeros((N, K), tl.float32)
    for start in range(0, T, M):
        q = tl.load(qkv + start * (3 * H * K) + m[:, None] * (3 * H * K) + k)
        do = tl.load(grad + start * (H * K) + m[:, None] * (H * K) + k)
        level = tl.load(lse + row * T + start + m)
        d = tl.load(delta + row * T + start + m)
        q = (q + q_bias).to(key.dtype)
        p = tl.exp2(tl.dot(key, tl.trans(q)) * (SCALE * LOG2E) - level)
        dv = tl.dot(p.to(do.dtype), do, dv)
        ds = p * (tl.dot(value, tl.trans(do)) - d)
        dk = tl.dot(ds.to(q.dtype), q, dk)
    tl.store(grad_qkv + at, dk * SCALE)
    tl.store(grad_qkv + at + H * K, dv)
