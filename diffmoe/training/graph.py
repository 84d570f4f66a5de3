"""A function of tensors of fixed shapes as one CUDA graph, so that the GPU never waits for launches.

At 64 tokens an image a training step is about 1,500 kernels of 15 microseconds, which the host launches slower than
they run; so is a call of the network.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
import torch._inductor.config  # torch loads it late
from torch import Tensor, nn

EAGER_CALLS = 3
"""Calls before the capture; they compile and choose algorithms."""
MOST_COMPILED = 64
"""Versions of a block's code that one process compiles (torch's default, 8, is fewer than a table's systems, with and
without gradients); after those it would run uncompiled."""

Outputs = TypeVar("Outputs")
captured: weakref.WeakSet[Graphed] = weakref.WeakSet()


def compile_blocks(blocks: nn.ModuleList) -> None:
    """Compile block by block: blocks of a kind share their code, so that few are compiled.

    Where the compiler would time several orders of a sum and keep the fastest, it always takes the same one: else the
    bits of a run depend on what happened to be fastest.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_COMPILED)
    torch._inductor.config.deterministic = True
    for block in blocks:
        block.compile(dynamic=False)


def release_memory(device: torch.device) -> None:
    """Give back what no tensor needs to a GPU's other processes."""
    if device.type == "cuda":
        gc.collect()  # a graph and the function that it has captured hold each other
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def forget_captures() -> None:
    """Give up all graphs: NCCL does not end before those that hold its collectives, whoever still holds them."""
    for graphed in captured:
        graphed.graph.reset()


class Graphed(Generic[Outputs]):
    """Calls a function a few times as it is, then captures it and replays the capture.

    Args:
        function: never waits for the device, and what it reads besides its inputs stays where it is in memory.
            Gradients that it sets (anew: `zero_grad(set_to_none=True)` first) stay where the capture put them.
    """

    def __init__(self, function: Callable[..., Outputs]) -> None:
        self.function = function
        self.calls = 0
        self.stream = torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Do what the function does; shapes and dtypes must not change. The next call overwrites the outputs."""
        self.calls += 1
        if self.calls == 1:  # always of the same strides, as those of a capture must be
            self.inputs = [torch.empty(value.shape, dtype=value.dtype, device=value.device) for value in inputs]
        for mine, value in zip(self.inputs, inputs, strict=True):
            mine.copy_(value)
        if self.calls <= EAGER_CALLS:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # autograd remembers streams: those of the capture
                self.outputs = self.function(*self.inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return self.outputs
        if self.calls == EAGER_CALLS + 1:
            # Other threads may call CUDA meanwhile: the one that watches NCCL's collectives does.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.outputs = self.function(*self.inputs)
            captured.add(self)
        self.graph.replay()
        return self.outputs
