"""What the command lines share: one clear line for a user's mistake with exit code 2, and the choice of a device."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable

import torch
from tqdm import tqdm

from diffmoe.config import ConfigError, require
from diffmoe.training.run import Interrupted

LOGGED_EVERY_S = 30.0
"""Seconds between two lines of progress where nobody watches a terminal."""


def run_command(main: Callable[[list[str]], int]) -> int:
    """Call `main` with the command line's arguments and return the exit code.

    A ConfigError (any input that cannot be used) becomes one line on stderr and exit code 2; a signal that a run
    answered by saving itself, 128 and its number.
    """
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        return code
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print("stopped, with the state saved; the same command goes on", file=sys.stderr)
        return 0 if stop.signum is None else 128 + stop.signum
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        return 128 + signal.SIGPIPE


def _nobody_reads() -> bool:
    """Say whether the output goes to a pipe whose reader has ended, as `head` does when it has enough."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


class TrainingBar:
    """A progress bar: the run's name, step, losses and time left; none for a run that has nothing to do."""

    def __init__(self, name: str, num_steps: int, *, enabled: bool = True, leave: bool = True) -> None:
        self.options = {"desc": name, "total": num_steps, "disable": not enabled, "leave": leave}
        self.bar: tqdm | None = None

    def __enter__(self) -> TrainingBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away, or leave its last state."""
        if self.bar is not None:
            self.bar.close()

    def update(self, step: int, losses: dict[str, float]) -> None:
        """Show a run that has made `step` steps; the speed is that of this process."""
        if self.bar is None:
            interval = 1.0 if sys.stderr.isatty() else LOGGED_EVERY_S
            self.bar = tqdm(initial=step - 1, unit="step", mininterval=interval, dynamic_ncols=True, **self.options)
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()}, refresh=False)


def choose_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device that is there.

    Raises:
        ConfigError: when it is not.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    there = torch.cuda.device_count() if kind == "cuda" else int(name == "cpu")
    if not (index or "0").isdigit() or int(index or 0) >= there:
        raise ConfigError(f"device {name}: not here; use auto, cpu, or cuda below {torch.cuda.device_count()}")
    return torch.device(name)


def require_places(processes: int, device: torch.device) -> None:
    """Require a GPU of its own for each of several processes; on a CPU they share it.

    Raises:
        ConfigError: when there are too few.
    """
    require(processes >= 1, "--processes", processes, "use 1 or more")
    if processes > 1 and device.type == "cuda":
        require(device.index is None, "runtime.device", device, "with --processes, use cuda: each takes one of its own")
        require(processes <= torch.cuda.device_count(), "--processes", processes,
                f"there are {torch.cuda.device_count()} GPUs here")
