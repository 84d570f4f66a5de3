"""One process or many under torchrun: who am I, and sums over all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Say whether this process writes files."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """Return this process's rows of a global batch."""
        local = batch_size // self.size
        return slice(self.rank * local, (self.rank + 1) * local)

    def mean(self, tensors: list[Tensor]) -> list[Tensor]:
        """Average tensors over all processes, in one all-reduce."""
        if self.size == 1 or not tensors:
            return tensors
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = (flat / self.size).split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def any(self, flag: bool, device: torch.device) -> bool:
        """Say whether `flag` is set in any process."""
        if self.size == 1:
            return flag
        total = torch.tensor(int(flag), device=device)
        dist.all_reduce(total)
        return bool(total)


ALONE = World()
"""The only process."""


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun started, over NCCL on GPUs and gloo else; alone without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
