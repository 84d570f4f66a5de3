"""One process or many under torchrun: who am I, sums over all, and an end when one of them is gone.

A process that dies or hangs leaves the others waiting in a collective. They end themselves after `HANG_S`, torchrun
ends what is left within another 30 seconds, and starts all again when told to (`--max-restarts`); the run then goes on
from its checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe.config import ConfigError
from diffmoe.training.graph import forget_captures

START_TIMEOUT = timedelta(minutes=10)
"""Longest wait for another process before training: data are read and networks compiled meanwhile."""
HANG_S = 25.0
"""Longest time without a step in training; torchrun's own 30 seconds for stopping the rest are within a minute then."""
LONG_S = 540.0
"""As much where a state is collected or written, or networks are compiled anew: less than collectives wait."""


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

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all processes."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, which have as many each, by rank; no gradient flows through."""
        if self.size == 1:
            return rows.detach()
        rows = rows.detach().contiguous()
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    def least(self, tensor: Tensor) -> Tensor:
        """Return the smallest value of each entry over all processes."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor

    def largest(self, values: list[float], device: torch.device) -> list[float]:
        """Return the largest of each number over all processes."""
        if self.size == 1:
            return values
        return (-self.least(torch.tensor([-value for value in values], dtype=torch.float64, device=device))).tolist()

    def from_main(self, value: Any) -> Any:
        """Return what the main process has for plain data `value`."""
        if self.size == 1:
            return value
        holder = [json.dumps(value)]
        dist.broadcast_object_list(holder)
        return json.loads(holder[0])

    def require_agreement(self, settings: dict[str, Any]) -> None:
        """Compare plain data that must be the same everywhere.

        Raises:
            ConfigError: in every process, for the first key whose values differ.
        """
        if self.size == 1:
            return
        texts: list[str] = [""] * self.size
        dist.all_gather_object(texts, json.dumps(settings))
        main, *others = map(json.loads, texts)
        for rank, other in enumerate(others, 1):
            for key in sorted(main.keys() | other.keys()):
                if main.get(key) != other.get(key):
                    raise ConfigError(f"{key}={other.get(key)} in process {rank} of {self.size}, but {main.get(key)} "
                                      "in process 0; start all of them with one command on the same data")


ALONE = World()
"""The only process."""


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun started, over NCCL on GPUs and gloo else; alone without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    if device.type == "cuda" and device.index is None:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    store, rank, size = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
    # torchrun (2.14) keeps one store over its restarts, in which the dead processes' addresses still stand
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")  # else transfers wait for the last block of kernels beside
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=START_TIMEOUT, store=store, rank=rank,
                            world_size=size)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
        dist.barrier()  # gloo has been seen to abort a process that leaves while another is in the last call
    finally:
        forget_captures()
        dist.destroy_process_group()


class Heartbeat:
    """Ends a process of several that has made no step for `limit_s`: it waits for one that died or hangs."""

    def __init__(self, world: World, limit_s: float) -> None:
        self.world = world
        self.usual_s = self.limit_s = limit_s
        self.beats = threading.Event()
        self.stopped = False
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopped = True
        self.beats.set()

    def start(self) -> None:
        """Start the watch, unless it is under way; the first steps compile, and may take longer."""
        if self.world.size > 1 and not self.thread.is_alive():
            self.thread.start()

    def beat(self, within_s: float | None = None) -> None:
        """Say that this process has made a step, and will make the next one within so many seconds, or as usual."""
        self.limit_s = within_s or self.usual_s
        self.beats.set()

    def _watch(self) -> None:
        while self.beats.wait(self.limit_s):
            self.beats.clear()
            if self.stopped:
                return
        print(f"error: process {self.world.rank} of {self.world.size} has made no step for {self.limit_s:.0f} s: "
              "another one hangs or died; the same command goes on from its checkpoint", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread is in a collective that does not end
