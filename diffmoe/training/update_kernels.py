"""Clipping, AdamW, the moving averages and rounding in one pass over memory, for float32 tensors on a GPU.

    g = c * gradient,  c = min(1, clip / (norm + 1e-6)) where gradients are clipped, else 1
    m <- m + (1 - beta1) (g - m),   v <- beta2 v + (1 - beta2) g^2
    w <- (1 - rate * decay) w - rate / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    e <- e + share * (w - e)                                                                    each average

One kernel for each of these would read and write 28 (AdamW), 12 (an average) and 8 (clipping) bytes a parameter;
together they read 20 (w, gradient, m, v, e) and write 16. Of a weight that trains as a bf16 copy, the gradient is bf16,
and the copy is written too: 18 and 18. Arithmetic is float32; what depends on t and the rate is float64 and made once
a tensor. Where the step is broken nothing is written, t among it, and nobody waits to know.

A launch covers many tensors: a table (rows, N) of int64 holds what the kernels know of N tensors, addresses among it,
and each program works on one block of one tensor. Of what is shared out, a process moves its share; while it moves
the next tensors, copies that every process needs whole travel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe.data.images import send
from diffmoe.training.parallel import local, own_part, send_parts

BLOCK, NUM_WARPS = 1024, 8
"""Elements of a program, 4 of each tensor in a thread: of bf16 a thread would rather take 8, and 4 of float32; with
more than 4, elements would change threads on the way, and registers leave a multiprocessor to one program."""
LAUNCHES = 8
"""Of a pass whose copies travel: the last part of them travels alone."""
TENSORS = 128
"""Tensors of a program of `_prepare`."""
VECTOR_BYTES = tl.constexpr(16)
"""What a thread loads at once where the addresses of a tensor and of all that goes with it are multiples of it."""

CLIPPED, GROUP, ALIGNED, SIZE, STEP, WEIGHT, COPY, GRADIENT, MOMENT, SQUARE, AVERAGE = map(tl.constexpr, range(11))
"""Rows of the table: 1 or 0, the group's number, 1 or 0, elements, then addresses, those of the n averages last.
Address 0: the tensor has none."""
FACTOR, KEPT, RATE, CORRECTION = map(tl.constexpr, range(4))
"""Rows of the numbers (4, N): c, 1 - rate * decay, rate / (1 - beta1^t) and 1 / sqrt(1 - beta2^t)."""


@torch.no_grad()
def one_pass_applies(tensors: Sequence[Tensor]) -> bool:
    """Say whether all weights and averages, or what this process holds of them, are plain float32 on a GPU."""
    return all(type(tensor.data) is Tensor and tensor.is_cuda and tensor.dtype is torch.float32
               and tensor.is_contiguous() for tensor in local(tensors))


class OnePass:
    """Makes the steps of an AdamW and of averages of its parameters.

    Args:
        optimizer: holds rates, decay and state, which stay what its own steps would make them; groups differ in the
            rate alone.
        clipped: the parameters whose gradients are clipped.
        clip_norm: to this; None is no clipping.
        averages: the parameters of each averaged network, in the optimizer's order.
        trained: what has the gradients, in that order: the parameters themselves, or bf16 copies of them.
    """

    @torch.no_grad()
    def __init__(self, optimizer: torch.optim.AdamW, clipped: Sequence[Tensor], clip_norm: float | None,
                 averages: Sequence[Sequence[Tensor]], trained: Sequence[Tensor]) -> None:
        self.optimizer = optimizer
        groups = [group["params"] for group in optimizer.param_groups]
        self.parameters: list[Tensor] = [parameter for group in groups for parameter in group]
        self.groups = [index for index, group in enumerate(groups) for _ in group]
        self.clip_norm = float(clip_norm or 0)
        self.averages = averages
        self.trained = trained
        self.copies = [None if copied is parameter else own_part(copied, parameter)
                       for copied, parameter in zip(trained, self.parameters, strict=True)]
        self.device = self.parameters[0].device
        sizes = [parameter.numel() for parameter in local(self.parameters)]
        chosen = {id(parameter) for parameter in clipped} if clip_norm is not None else set()
        self.is_clipped, self.sizes = [int(id(parameter) in chosen) for parameter in self.parameters], sizes
        travelling = {index: (whole.detach().view(-1), copied)
                      for index, (whole, copied) in enumerate(zip(trained, self.copies, strict=True))
                      if copied is not None and copied.numel() < whole.numel()}
        self.launches = [(_blocks(sizes, tensors).to(self.device),
                          [travelling[index] for index in tensors if index in travelling])
                         for tensors in _divided(sizes, LAUNCHES if travelling else 1)]
        """The blocks of a launch, and what travels behind it: copies, and this process's part of each."""
        self.numbers = torch.empty(4, len(sizes), device=self.device)
        self.addresses: list[list[int]] = []
        self.table = torch.empty(0)

    @torch.no_grad()
    def step(self, norm: Tensor | None, broken: Tensor, shares: Sequence[float]) -> None:
        """Clip, move the weights, move each average by its share of the distance; the gradients stay as they are.

        Args:
            norm: float32 scalar, of all gradients to be clipped; None where there is no clipping.
            broken: bool scalar on the device that turns this into no step.
            shares: 1 - decay of each average.
        """
        assert len(shares) == len(self.averages)
        self._find_addresses()
        groups = self.optimizer.param_groups  # others after loading a state
        rates = [*shares, *(group["lr"] for group in groups)]
        rates = send(torch.tensor(rates, dtype=torch.float64), self.device)
        group = groups[0]
        beta1, beta2 = group["betas"]
        num_tensors = len(self.parameters)
        with torch.cuda.device_of(self.numbers):
            _prepare[(triton.cdiv(num_tensors, TENSORS),)](
                self.table, rates, self.numbers if norm is None else norm, broken, self.numbers, self.clip_norm,
                num_tensors, beta1, beta2, group["weight_decay"], len(self.averages), TENSORS)
            under_way = []
            for blocks, copies in self.launches:
                _move[(len(blocks),)](
                    self.table, blocks, self.numbers, rates, broken, num_tensors, beta1, beta2, group["eps"],
                    len(self.averages), BLOCK, num_warps=NUM_WARPS)
                under_way += send_parts(copies)
            for work in under_way:
                work.wait()

    def _find_addresses(self) -> None:
        """Make the state where there is none yet, and the table anew where an address has changed."""
        gradients = [None if copied.grad is None else own_part(copied.grad, parameter)
                     for copied, parameter in zip(self.trained, self.parameters, strict=True)]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None and parameter not in self.optimizer.state:  # as AdamW's first step does
                self.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=self.device),
                    "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        states = [self.optimizer.state.get(parameter, {}) for parameter in self.parameters]
        steps, *moments = ([state.get(name) for state in states] for name in ("step", "exp_avg", "exp_avg_sq"))
        addresses = [[0 if tensor is None else tensor.data_ptr() for tensor in local(tensors)]
                     for tensors in (steps, self.parameters, self.copies, gradients, *moments, *self.averages)]
        if addresses != self.addresses:  # always the same behind a CUDA graph
            assert all(gradient is None or gradient.is_contiguous() for gradient in gradients)
            assert all(copied is None or copied.dtype is torch.bfloat16 for copied in self.copies)
            aligned = [int(all(address % VECTOR_BYTES.value == 0 for address in each))
                       for each in zip(*addresses[1:], strict=True)]
            table = [self.is_clipped, self.groups, aligned, self.sizes, *addresses]
            self.addresses, self.table = addresses, send(torch.tensor(table, dtype=torch.int64), self.device)


def _divided(sizes: Sequence[int], number: int) -> list[range]:
    """Divide tensors, in their order, over at most so many launches of about a size."""
    starts, behind = [0], 0
    for index, size in enumerate(sizes):
        if behind >= sum(sizes) / number:
            starts, behind = [*starts, index], 0
        behind += size
    return [range(*ends) for ends in itertools.pairwise([*starts, len(sizes)])]


def _blocks(sizes: Sequence[int], tensors: range) -> Tensor:
    """Return each block of some of the tensors, int32 (blocks, 2): the tensor, and which of its blocks."""
    counts = torch.tensor([triton.cdiv(sizes[tensor], BLOCK) for tensor in tensors])
    which = torch.repeat_interleave(counts)
    return torch.stack([which + tensors.start, torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]], 1).int()


@triton.jit
def _power(BASE: tl.constexpr, exponent):
    """Return a float64 power by squaring; float32 would leave 1 - 0.999^t five digits."""
    power = tl.full(exponent.shape, 1.0, tl.float64)
    square = tl.full(exponent.shape, BASE, tl.float64)
    for _ in range(32):
        power = tl.where((exponent & 1) == 1, power * square, power)
        square *= square
        exponent >>= 1
    return power


@triton.jit
def _prepare(table, rates, norm, broken, numbers, clip, N: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr,
             DECAY: tl.constexpr, AVERAGES: tl.constexpr, TENSORS: tl.constexpr):
    """Count the step of each tensor that has a gradient, and make the numbers of all its elements."""
    tensor = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    mine = tensor < N
    moves = mine & (tl.load(table + GRADIENT * N + tensor, mask=mine, other=0) != 0)
    place = tl.load(table + STEP * N + tensor, mask=mine, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(place, mask=moves, other=0) + 1
    tl.store(place, step, mask=moves & (tl.load(broken) == 0))
    rate = tl.load(rates + AVERAGES + tl.load(table + GROUP * N + tensor, mask=mine, other=0))
    clipped = tl.load(table + CLIPPED * N + tensor, mask=mine, other=0) != 0
    factor = tl.where(clipped, tl.minimum(clip / (tl.load(norm) + 1e-6), 1.0), 1.0)
    exponent = step.to(tl.int32)
    numbers += tensor
    tl.store(numbers + FACTOR * N, factor, mask=mine)
    tl.store(numbers + KEPT * N, (1 - rate * DECAY).to(tl.float32), mask=mine)
    tl.store(numbers + RATE * N, (rate / (1 - _power(BETA1, exponent))).to(tl.float32), mask=mine)
    tl.store(numbers + CORRECTION * N, (1 / tl.sqrt(1 - _power(BETA2, exponent))).to(tl.float32), mask=mine)


@triton.jit
def _move(table, blocks, numbers, rates, broken, N: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr,
          EPS: tl.constexpr, AVERAGES: tl.constexpr, BLOCK: tl.constexpr):
    if tl.load(broken) == 0:
        blocks += 2 * tl.program_id(0)
        tensor = tl.load(blocks)
        start = tl.load(blocks + 1).to(tl.int64) * BLOCK
        size = tl.load(table + SIZE * N + tensor)
        is_copied = tl.load(table + COPY * N + tensor) != 0
        # all branches are here: one between loads would make the later wait for the earlier
        if (start + BLOCK <= size) & (tl.load(table + ALIGNED * N + tensor) != 0):
            if is_copied:
                _move_block(table + tensor, numbers + tensor, rates, start, size, True, True,
                            N, BETA1, BETA2, EPS, AVERAGES, BLOCK)
            else:
                _move_block(table + tensor, numbers + tensor, rates, start, size, True, False,
                            N, BETA1, BETA2, EPS, AVERAGES, BLOCK)
        elif is_copied:
            _move_block(table + tensor, numbers + tensor, rates, start, size, False, True,
                        N, BETA1, BETA2, EPS, AVERAGES, BLOCK)
        else:
            _move_block(table + tensor, numbers + tensor, rates, start, size, False, False,
                        N, BETA1, BETA2, EPS, AVERAGES, BLOCK)


@triton.jit
def _move_block(table, numbers, rates, start, size, WHOLE: tl.constexpr, COPIED: tl.constexpr, N: tl.constexpr,
                BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, AVERAGES: tl.constexpr,
                BLOCK: tl.constexpr):
    """Move the elements of a block; a whole, aligned one needs no mask, which would split loads of 16 bytes."""
    TRAINED: tl.constexpr = tl.bfloat16 if COPIED else tl.float32
    ALIGNMENT: tl.constexpr = VECTOR_BYTES if WHOLE else 1
    place = start + tl.arange(0, BLOCK)
    mask = None if WHOLE else place < size
    weight = _elements(table, WEIGHT, N, ALIGNMENT) + place
    w = tl.load(weight, mask=mask)
    if tl.load(table + GRADIENT * N) != 0:
        moment = _elements(table, MOMENT, N, ALIGNMENT) + place
        square = _elements(table, SQUARE, N, ALIGNMENT) + place
        g = tl.load(_elements(table, GRADIENT, N, ALIGNMENT, TRAINED) + place, mask=mask).to(tl.float32)
        g *= tl.load(numbers + FACTOR * N)
        m = tl.load(moment, mask=mask)
        v = tl.load(square, mask=mask)
        m += (1 - BETA1) * (g - m)
        v = tl.fma(v, BETA2, (1 - BETA2) * g * g)  # else the compiler picks what to round, for each gradient's dtype
        d = tl.sqrt_rn(v) * tl.load(numbers + CORRECTION * N) + EPS
        w = tl.fma(-tl.load(numbers + RATE * N), tl.div_rn(m, d), w * tl.load(numbers + KEPT * N))
        tl.store(moment, m, mask=mask)
        tl.store(square, v, mask=mask)
        tl.store(weight, w, mask=mask)
        if COPIED:
            tl.store(_elements(table, COPY, N, ALIGNMENT, tl.bfloat16) + place, w.to(tl.bfloat16), mask=mask)
    for index in tl.static_range(AVERAGES):
        average = _elements(table, AVERAGE + index, N, ALIGNMENT) + place
        e = tl.load(average, mask=mask)
        e += tl.load(rates + index).to(tl.float32) * (w - e)
        tl.store(average, e, mask=mask)


@triton.jit
def _elements(table, ROW: tl.constexpr, N: tl.constexpr, ALIGNMENT: tl.constexpr, DTYPE: tl.constexpr = tl.float32):
    """Return the pointer to a tensor's first element; `table` points to the tensor's column."""
    return tl.multiple_of(tl.load(table + ROW * N).to(tl.pointer_type(DTYPE)), ALIGNMENT)
