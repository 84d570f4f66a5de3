"""Run cells in several processes of one machine, and follow them from here.

On a CPU one thread a process makes better use of a few cores than several threads of a small network do, and a result
then does not depend on the number of cores.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import connection
from types import FrameType
from typing import Any

import torch

from diffmoe.cells import Cell
from diffmoe.config import ConfigError
from diffmoe.records import Record
from diffmoe.training.run import Interrupted

TOLD_AGAIN_S = 1.0
"""Seconds until a worker that has not ended is told again."""
POLL_S = 0.2
"""Seconds between two looks at what the workers told, and between two messages of a worker."""

RunCell = Callable[..., Record]
"""`run(cell, progress=...)` runs one cell."""
Watch = Callable[[Cell, int, dict[str, float]], None]
"""Told the cell in training, its steps done and its latest losses."""


def run_cells(cells: Sequence[Cell], run: RunCell, jobs: int, watch: Watch, threads: int = 1,
              is_trained: Callable[[Cell], bool] = lambda cell: False) -> Iterator[Record]:
    """Run cells in their order, several at a time, and yield each record when it is written.

    A training run is in one process's hands; cells that measure what is trained run beside one another, and beside its
    further training. Where there are GPUs, each process has its own, in turn, and a cell goes to the GPU with the
    fewest at work.

    Args:
        run: goes to each process once, with all that it holds.
        jobs: processes; with 1 everything runs in this one.
        watch: called in this process.
        threads: of the CPU, for each process.
        is_trained: says whether the network that a cell measures is there.

    Raises:
        ConfigError: as the cells do, or when a process died; the others save themselves and stop first.
        Interrupted: after SIGINT, SIGTERM or the deadline, when every process has saved itself; after a second signal
            at once.
    """
    if jobs == 1:
        torch.set_num_threads(threads)
        for cell in cells:
            yield run(cell, progress=partial(watch, cell))
        return
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    processes = Counter(itertools.islice(itertools.cycle(visible_gpus() or [None]), jobs))
    waiting = list(cells)
    running: dict[Future[Record | int], tuple[Cell, str | None]] = {}
    with ExitStack() as stack:
        stack.enter_context(_raising_on_signals())
        pools = {gpu: stack.enter_context(ProcessPoolExecutor(size, context, _start_worker, (run, told, gpu, threads)))
                 for gpu, size in processes.items()}
        try:
            while waiting or running:
                while len(running) < jobs and (
                        cell := _next(waiting, [cell for cell, _ in running.values()], is_trained)):
                    waiting.remove(cell)
                    busy = Counter(gpu for _, gpu in running.values())
                    gpu = min((gpu for gpu in processes if busy[gpu] < processes[gpu]), key=busy.__getitem__)
                    running[pools[gpu].submit(_run_cell, cell)] = cell, gpu
                done, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                _pass_on(told, watch)
                for future in done:
                    del running[future]
                    result = future.result()
                    if isinstance(result, int):
                        raise Interrupted(result or None)
                    yield result
        except BaseException as error:
            _end_workers()
            if isinstance(error, (BrokenProcessPool, torch.OutOfMemoryError)):
                full = isinstance(error, torch.OutOfMemoryError)
                why = "a GPU's memory is full" if full else "a worker process died (out of memory?)"
                raise ConfigError(f"{why}; run fewer at once with --jobs. What was in training is "
                                  "saved, and the same command goes on") from None
            raise


def _end_workers() -> None:
    """End all workers; a run in training saves itself first, unless a signal comes meanwhile.

    One that has is told again: else it would wait for work, and the pool, broken by those that ended, for it.
    """
    try:
        while workers := multiprocessing.active_children():
            for worker in workers:
                worker.terminate()
            connection.wait([worker.sentinel for worker in workers], timeout=TOLD_AGAIN_S)
    except Interrupted:
        for worker in multiprocessing.active_children():
            worker.kill()
        raise


def _next(waiting: Sequence[Cell], running: Sequence[Cell], is_trained: Callable[[Cell], bool]) -> Cell | None:
    """Return the first cell that is trained, or whose training run no other has in hand."""
    taken = {cell.training for cell in running if not is_trained(cell)}
    return next((cell for cell in waiting if cell.training not in taken or is_trained(cell)), None)


def visible_gpus() -> list[str]:
    """Name the GPUs that this process may use, as CUDA_VISIBLE_DEVICES does."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(torch.cuda.device_count())] if chosen is None else chosen.split(",")


def cpu_count() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pass_on(told: Any, watch: Watch) -> None:
    while True:
        try:
            watch(*told.get_nowait())
        except queue.Empty:
            return


@contextmanager
def _raising_on_signals() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


_worker: dict[str, Any] = {}
"""What this worker process was started with."""


def _start_worker(run: RunCell, told: Any, gpu: str | None, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; outside training the parent decides
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # training has a handler of its own
    torch.set_num_threads(threads)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when CUDA starts, which it has not yet here
    _worker.update(run=run, told=told)


def _run_cell(cell: Cell) -> Record | int:
    """Run a cell in a worker; return its record, or the signal that interrupted it (0: the deadline)."""
    last = time.monotonic()

    def tell(step: int, losses: dict[str, float]) -> None:
        nonlocal last
        if time.monotonic() - last > POLL_S:
            last = time.monotonic()
            _worker["told"].put((cell, step, losses))

    try:
        return _worker["run"](cell, progress=tell)
    except Interrupted as stop:
        return stop.signum or 0
