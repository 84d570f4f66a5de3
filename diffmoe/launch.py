"""Start a module of this package in processes of their own: one, or several under torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def command(*arguments: object, processes: int = 1) -> list[str]:
    """Return the command line of a module and its arguments, in so many processes of this machine."""
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return [sys.executable, "-m", *(several if processes > 1 else []), *map(str, arguments)]


def variables() -> dict[str, str]:
    """Return the variables of a process that may meet others on this machine, whose own name need not resolve."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    return {"GLOO_SOCKET_IFNAME": loopback} | dict(os.environ) if loopback else dict(os.environ)


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
