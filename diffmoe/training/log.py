"""Logs of one JSON object a line, each with the `step` that it was written after."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from diffmoe.training.checkpoint import reason, write_whole

log = logging.getLogger(__name__)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a log; what a killed process left half-written is passed over. Missing: no lines."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:  # UnicodeDecodeError is one, too
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


class JsonLines:
    """A log that is cut back to a step when it is opened; what cannot be written waits in memory.

    Args:
        path: of the file; None writes nothing.
        step: lines after it are of a state that was lost, and will be written again.

    Raises:
        OSError: when the file cannot be opened.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self.path = path
        self.pending = b""
        if path is None:
            return
        kept = b"".join(_encode(line) for line in read_lines(path) if line["step"] <= step)
        write_whole(path, lambda aside: aside.write_bytes(kept))
        self.size = len(kept)
        self.file = path.open("ab", buffering=0)

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.path is not None:
            self.flush()
            self.file.close()

    def write(self, values: dict[str, Any]) -> None:
        """Append a line, now or, where that fails, as soon as it can be."""
        if self.path is not None:
            waiting = bool(self.pending)
            self.pending += _encode(values)
            error = self.flush()
            if error is not None and not waiting:
                log.warning("%s: cannot be written (%s); its lines wait in memory", self.path, reason(error))

    def flush(self, *, sync: bool = False) -> OSError | None:
        """Write what waits, whole lines or nothing; return what was in the way."""
        if self.path is None:
            return None
        try:
            rest = memoryview(self.pending)
            while rest:  # where the disk ends within a line, the second call tells why
                rest = rest[self.file.write(rest):]
            self.size += len(self.pending)
            self.pending = b""
            if sync:
                os.fsync(self.file.fileno())
        except OSError as error:
            os.ftruncate(self.file.fileno(), self.size)
            return error
        return None


def _encode(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"
