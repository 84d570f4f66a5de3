"""Triton kernels of selection: the largest scores of each expert and pool, and the rows of the pairs selected.

How many are taken may lie on the device, where a library's top-k wants a number of the host, and nothing is sorted. In
a pool of few tokens each is compared with all others; in a larger one the k-th largest is found digit by digit (radix
select), where programs share a pool. Of equal scores the first tokens are taken, as by a stable sort. Integers alone
are added up, so the order of adding changes nothing.

Shapes: S tokens in P pools of n, E experts, R = E P rows of n scores, N pairs; C chunks of a row, each a program's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

FEW = 256
"""Tokens of a pool that are compared with one another; an image of ImageNet's latents has as many."""
TOKENS_A_WARP = 32
CHUNK = 2048
DIGITS = 4
"""Of 8 bits each."""


@triton_op("diffmoe::take_largest", mutates_args={})
def take_largest(score_ES: Tensor, count_EP: Tensor) -> tuple[Tensor, Tensor]:
    """Return which tokens are among the `count` with the largest scores, bool (E, S), and the least of these, (E, P).

    Args:
        score_ES: float32 scores, the S tokens pool by pool; NaN are the largest, or with a sign the smallest.
        count_EP: int32 tokens to take, 0 to n; the least score means nothing for 0.
    """
    score_ES, count_EP = score_ES.contiguous(), count_EP.contiguous()
    rows, size = count_EP.numel(), score_ES.shape[1] // count_EP.shape[1]
    taken_ES, least_EP = torch.empty_like(score_ES, dtype=torch.bool), torch.empty_like(count_EP, dtype=torch.float32)
    if size <= FEW:
        block = triton.next_power_of_2(size)
        wrap_triton(_take_of_few)[rows,](score_ES, count_EP, taken_ES, least_EP, size, block,
                                         num_warps=max(block // TOKENS_A_WARP, 4))
        return taken_ES, least_EP
    grid = rows, triton.cdiv(size, CHUNK)
    frequency = torch.zeros(DIGITS, rows, 256, dtype=torch.int32, device=score_ES.device)
    ties_RC = torch.empty(grid, dtype=torch.int32, device=score_ES.device)
    for digit in range(DIGITS):
        wrap_triton(_count_digit)[grid](score_ES, count_EP, frequency, size, rows, digit, CHUNK)
    wrap_triton(_count_ties)[grid](score_ES, count_EP, frequency, ties_RC, least_EP, size, rows, DIGITS, CHUNK)
    wrap_triton(_take)[grid](
        score_ES, count_EP, frequency, ties_RC, taken_ES, size, rows, triton.next_power_of_2(grid[1]), DIGITS, CHUNK)
    return taken_ES, least_EP


@triton_op("diffmoe::lay_out", mutates_args={})
def lay_out(taken_ES: Tensor, score_SE: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lay out the pairs of a selection by expert and then by token.

    Args:
        taken_ES: bool.
        score_SE: float32 weights, read at the pairs; differentiable.
        num_rows: N; pairs beyond it have no row.

    Returns:
        token_N, int64, gate_N, float32 (pads: token 0, weight 0), and row_SE, int32, the row of each pair, else -1.
    """
    taken_ES, score_SE = taken_ES.contiguous(), score_SE.contiguous()
    experts, tokens = taken_ES.shape
    token_N = torch.zeros(num_rows, dtype=torch.int64, device=taken_ES.device)
    gate_N = torch.zeros(num_rows, dtype=torch.float32, device=taken_ES.device)
    row_SE = torch.empty(tokens, experts, dtype=torch.int32, device=taken_ES.device)
    grid = experts, triton.cdiv(tokens, CHUNK)
    pairs_EC = torch.empty(grid, dtype=torch.int32, device=taken_ES.device)
    wrap_triton(_count_pairs)[grid](taken_ES, pairs_EC, tokens, CHUNK)
    wrap_triton(_lay_out)[grid](
        taken_ES, score_SE, pairs_EC, token_N, gate_N, row_SE, tokens, experts, num_rows,
        triton.next_power_of_2(grid[0] * grid[1]), CHUNK)
    return token_N, gate_N, row_SE


def _context(ctx, inputs, output) -> None:
    token_N, _, row_SE = output
    ctx.mark_non_differentiable(token_N, row_SE)
    ctx.save_for_backward(row_SE)


def _autograd(ctx, _, d_gate_N, __):
    row_SE, = ctx.saved_tensors
    return None, torch.where(row_SE < 0, 0, d_gate_N[row_SE.clamp(min=0)]), None


lay_out.register_autograd(_autograd, setup_context=_context)


@triton.jit
def _take_of_few(score, count, taken, least, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK)
    wanted = tl.load(count + row)
    key = _key(score + row * N, token, token < N)
    mine, other, others = key[:, None], key[None], token[None]
    before = (other > mine) | ((other == mine) & (others < token[:, None]))
    rank = tl.sum((before & (others < N)).to(tl.int32), 1)
    tl.store(taken + row * N + token, rank < wanted, mask=token < N)
    value = tl.load(score + row * N + token, mask=(rank == wanted - 1) & (token < N), other=0)
    tl.store(least + row, tl.sum(value, 0))


@triton.jit
def _key(score, place, mask):
    """Return unsigned integers in the order of scores."""
    value = tl.load(score + place, mask=mask, other=0)
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)  # -0 equals 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _chunk(score, N, CHUNK: tl.constexpr):
    """Return this program's keys, which of them are, and their places."""
    place = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    mask = place < N
    return _key(score + tl.program_id(0).to(tl.int64) * N, place, mask), mask, place


@triton.jit
def _digits(count, frequency, R, DIGITS: tl.constexpr):
    """Return the first digits of the least key that is taken, and how many with these digits are taken."""
    left, found = tl.load(count + tl.program_id(0)), tl.zeros((), tl.uint32)
    bins = tl.arange(0, 256)
    for digit in tl.static_range(DIGITS):
        with_digit = tl.load(frequency + (digit * R + tl.program_id(0)) * 256 + bins)
        above = tl.sum(with_digit, 0) - tl.cumsum(with_digit, 0)
        chosen = tl.sum((above >= left).to(tl.int32), 0)
        left -= tl.sum(tl.where(bins == chosen, above, 0), 0)
        found |= chosen.to(tl.uint32) << (24 - 8 * digit)
    return found, left


@triton.jit
def _count_digit(score, count, frequency, N, R, DIGIT: tl.constexpr, CHUNK: tl.constexpr):
    key, mask, _ = _chunk(score, N, CHUNK)
    if DIGIT > 0:
        found, _ = _digits(count, frequency, R, DIGIT)
        mask = mask & ((key >> (32 - 8 * DIGIT)) == (found >> (32 - 8 * DIGIT)))
    bin = tl.where(mask, ((key >> (24 - 8 * DIGIT)) & 255).to(tl.int32), 0)
    bins = tl.arange(0, 256)
    with_digit = tl.histogram(bin, 256) - tl.where(bins == 0, CHUNK - tl.sum(mask.to(tl.int32), 0), 0)
    tl.atomic_add(frequency + (DIGIT * R + tl.program_id(0)) * 256 + bins, with_digit, mask=with_digit > 0)


@triton.jit
def _count_ties(score, count, frequency, ties, least, N, R, DIGITS: tl.constexpr, CHUNK: tl.constexpr):
    key, mask, _ = _chunk(score, N, CHUNK)
    found, _ = _digits(count, frequency, R, DIGITS)
    tl.store(ties + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1),
             tl.sum(((key == found) & mask).to(tl.int32), 0))
    bits = (found ^ 0x80000000).to(tl.int32, bitcast=True)
    value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    tl.store(least + tl.program_id(0), value, mask=tl.program_id(1) == 0)


@triton.jit
def _take(score, count, frequency, ties, taken, N, R, CHUNKS: tl.constexpr, DIGITS: tl.constexpr, CHUNK: tl.constexpr):
    key, mask, place = _chunk(score, N, CHUNK)
    found, left = _digits(count, frequency, R, DIGITS)
    chunk = tl.arange(0, CHUNKS)
    before = tl.sum(tl.load(ties + tl.program_id(0) * tl.num_programs(1) + chunk, mask=chunk < tl.program_id(1),
                            other=0), 0)
    tie = ((key == found) & mask).to(tl.int32)
    first = (tie > 0) & (before + tl.cumsum(tie, 0) <= left)
    tl.store(taken + tl.program_id(0).to(tl.int64) * N + place,
             (tl.load(count + tl.program_id(0)) > 0) & ((key > found) | first), mask=mask)


@triton.jit
def _pairs(taken, S, CHUNK: tl.constexpr):
    """Return which tokens of this program's chunk its expert takes, 1 or 0, and their places."""
    place = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    pair = tl.load(taken + tl.program_id(0).to(tl.int64) * S + place, mask=place < S, other=0)
    return (pair != 0).to(tl.int32), place


@triton.jit
def _count_pairs(taken, pairs, S, CHUNK: tl.constexpr):
    is_pair, _ = _pairs(taken, S, CHUNK)
    tl.store(pairs + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(is_pair, 0))


@triton.jit
def _lay_out(taken, score, pairs, token, gate, row, S, E, N, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    is_pair, place = _pairs(taken, S, CHUNK)
    chunk = tl.arange(0, CHUNKS)
    earlier = chunk < tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    rows = tl.sum(tl.load(pairs + chunk, mask=earlier, other=0), 0) + tl.cumsum(is_pair, 0) - 1
    fits = (is_pair > 0) & (rows < N)
    pair = place.to(tl.int64) * E + tl.program_id(0)
    tl.store(token + rows, place.to(tl.int64), mask=fits)
    tl.store(gate + rows, tl.load(score + pair, mask=fits, other=0), mask=fits)
    tl.store(row + pair, tl.where(fits, rows, -1).to(tl.int32), mask=place < S)
