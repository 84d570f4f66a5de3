"""Real processes that train a tiny run, to be killed, stopped, starved and started again.

They are forked from a server that has imported everything, so that a start takes milliseconds.
"""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import torch

from diffmoe.cli import run_command
from diffmoe.config import RunConfig, load_config
from diffmoe.data import load_data
from diffmoe.evaluation.sampling import sample_images
from diffmoe.train import CONFIGS
from diffmoe.training import distributed, run
from diffmoe.training.checkpoint import load_weights, save_weights
from diffmoe.training.distributed import World
from diffmoe.training.log import read_lines

TINY = ["model.hidden_size=16", "model.depth=2", "model.num_heads=2", "model.moe.num_experts=4",
        "training.batch_size=4", "training.learning_rate=0.01"]
HANG_S = 4.0
LOG_EVERY = 5
CPU = torch.device("cpu")
LOOPBACK = {"GLOO_SOCKET_IFNAME": next(name for _, name in socket.if_nameindex() if name.startswith("lo"))}
"""Two processes meet by interface and address: a test machine's own name need not resolve."""
Fault = Callable[[int, Path], None]


@functools.cache
def server() -> multiprocessing.context.ForkServerContext:
    """Start the server, once in a test process, and return the context whose processes it forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["processes", "sklearn.datasets"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # it has no other way to this file
        multiprocessing.forkserver.ensure_running()
    return context


def run_together(target: Callable[[World, Path], None], folder: Path, count: int = 2) -> None:
    """Let processes do their part of some work in a folder, each to its end without an error."""
    port = free_port()
    processes = [server().Process(target=_be_one, args=(target, folder, as_torchrun(rank, count, port)))
                 for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count


def _be_one(target: Callable[[World, Path], None], folder: Path, environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ |= environment
    with distributed.join_world(CPU) as world:
        target(world, folder)


def as_torchrun(rank: int, count: int, port: int) -> dict[str, str]:
    """Return what torchrun tells a process about the others."""
    return LOOPBACK | {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}


def tiny_config(*overrides: str) -> RunConfig:
    return load_config([CONFIGS / "digits.yaml"], [*TINY, *overrides])


def images(steps: int) -> str:
    """Return the override that makes a run as many steps long."""
    return f"training.num_images={4 * steps}"


def start(folder: Path, *overrides: str, fault: Fault | None = None, rank: int | None = None, port: int = 0,
          seed: int = 0, sample: bool = False, save_every_s: float = 0.0) -> BaseProcess:
    """Start training in `folder`, alone or as one of two; what it says goes to `<folder>.<rank>.err`."""
    process = server().Process(target=train, args=(folder, overrides, fault, rank, port, seed, sample, save_every_s))
    process.start()
    return process


def said(folder: Path, rank: int | None = None) -> str:
    """Return what the processes of a folder have said on stderr."""
    return _errors(folder, rank).read_text()


def finish(process: BaseProcess, within_s: float = 120) -> int:
    """Wait for a process and return its exit code."""
    process.join(within_s)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def wait_for(condition: Callable[[], bool], within_s: float = 60) -> None:
    """Wait until something is the case."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.002)


def outcome(folder: Path) -> tuple[list[dict], list[dict], dict, dict, dict]:
    """Return all that a finished run is: its logs, the averaged network with its description, the last state."""
    logs = [read_lines(folder / name) for name in ("losses.jsonl", "events.jsonl")]
    average, description = load_weights(folder / "ema.safetensors")
    for line in (*logs[0], description):
        del line["seconds"]
        line.pop("images_per_second", None)
    return *logs, description, average, load_weights(folder / "state.safetensors")[0]


def assert_same_outcome(one: Path, other: Path) -> None:
    """Compare two finished runs bit for bit."""
    for mine, yours in zip(outcome(one), outcome(other), strict=True):
        if isinstance(mine, dict) and "config" not in mine:
            assert mine.keys() == yours.keys()
            assert [name for name, value in mine.items() if not torch.equal(value, yours[name])] == []
        else:
            assert mine == yours


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _errors(folder: Path, rank: int | None) -> Path:
    return folder.with_name(f"{folder.name}.{rank}.err")


def train(folder: Path, overrides: tuple[str, ...], fault: Fault | None, rank: int | None, port: int, seed: int,
          sample: bool, save_every_s: float) -> None:
    """Be such a process."""
    errors = os.open(_errors(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, which tests may be, ignores it
    torch.set_num_threads(1)
    if rank is not None:
        os.environ |= as_torchrun(rank, 2, port)
    run.LOG_EVERY, run.SAVE_EVERY_S, run.HANG_S = LOG_EVERY, save_every_s, HANG_S
    keep_averages = run._Run._keep_averages

    def show_the_state_too(under_way: run._Run, budget_images: int | None) -> dict:
        if under_way.world.is_main:
            with suppress(OSError):  # of a full disk: the run itself is to say so
                save_weights(folder / "state.safetensors", under_way.trainer.state(), {})
        return keep_averages(under_way, budget_images)

    run._Run._keep_averages = show_the_state_too

    def main(_: list[str]) -> int:
        config = tiny_config(*overrides)
        with distributed.join_world(CPU) as world:
            trained = run.train_run(config, seed, load_data(config.data, config.model), folder, CPU, world=world,
                          progress=lambda step, losses: fault(step, folder) if fault else None)
        if sample:
            sample_images(trained.load_average(config, CPU), config, range(4))
        return 0

    code = run_command(main)
    os._exit(code)
