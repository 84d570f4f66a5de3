"""Start a module of this package in processes of their own: one, or several under torchrun."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from diffmoe.config import ConfigError, RunConfig
from diffmoe.training.distributed import LONG_S
from diffmoe.training.run import CONFIG_FILE, Interrupted, write_config
from diffmoe.training.signals import Signals


def command(*arguments: object, processes: int = 1) -> list[str]:
    """Return the command line of a module and its arguments, in so many processes of this machine."""
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return [sys.executable, "-m", *(several if processes > 1 else []), *map(str, arguments)]


def variables() -> dict[str, str]:
    """Return the variables of a process that may meet others on this machine, whose own name need not resolve.

    Told to stop, torchrun waits as long as a state may take to write (from torch 2.12 on; 30 s before).
    """
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    return ({"GLOO_SOCKET_IFNAME": loopback} if loopback else {}) | {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(LONG_S))} | dict(os.environ)


def run_module(log: Path, *arguments: object, processes: int = 1, timeout_s: float | None = None) -> int:
    """Run a module to its end and return its exit code; what it says goes to `log`.

    Raises:
        subprocess.TimeoutExpired: after `timeout_s`, when its processes have been ended.
    """
    with log.open("w") as file:
        job = subprocess.Popen(command(*arguments, processes=processes), stdout=file, stderr=file, env=variables())
        try:
            return job.wait(timeout_s)
        finally:
            job.terminate()  # torchrun ends its processes then; nothing where it has ended
            job.wait()


def train_together(config: RunConfig, seed: int, folder: Path, processes: int, deadline: float = math.inf) -> None:
    """Train a run by several processes of this machine, to where `train_run` finds it finished.

    Args:
        deadline: value of `time.monotonic()` at which they save themselves and stop.

    Raises:
        ConfigError: when they fail; what they say goes to this process's output.
        Interrupted: after SIGTERM, SIGINT or the deadline.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    run_together("diffmoe.train", "--config", folder / CONFIG_FILE, "--seed", seed, "--out", folder,
                 processes=processes, deadline=deadline)


def run_together(*arguments: object, processes: int, deadline: float = math.inf) -> None:
    """Run a module to its end in several processes of this machine; what they say goes to this process's output.

    Args:
        deadline: value of `time.monotonic()` at which they are told to stop.

    Raises:
        ConfigError: when they fail.
        Interrupted: after SIGTERM, SIGINT or the deadline, when they have stopped.
    """
    code = None
    with Signals() as signals, subprocess.Popen(command(*arguments, processes=processes), env=variables()) as job:
        with signals.ending_waits(), suppress(subprocess.TimeoutExpired):
            if signals.received is None:
                code = job.wait(None if math.isinf(deadline) else max(0.0, deadline - time.monotonic()))
        job.terminate()  # torchrun tells its processes, which save themselves; nothing where it has ended
    if code is None:
        raise Interrupted(signals.received)
    if code:
        raise ConfigError(f"{arguments[0]}: {processes} processes ended with exit code {code}; they say above why, and "
                          "the same command goes on")
