"""What every command line shares: one clear line for a user's mistake, exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

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
