"""What the command lines share: one clear line for a user's mistake with exit code 2, and the choice of a device."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from diffmoe.config import ConfigError


def run_command(main: Callable[[list[str]], int]) -> int:
    """Call `main` with the command line's arguments and return the exit code.

    A ConfigError (any input that cannot be used) becomes one line on stderr and exit code 2.
    """
    try:
        return main(sys.argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


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
