"""SIGTERM and SIGINT during training: remembered, so that the loop saves itself and stops."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)


class _Woken(Exception):
    """Ends a wait."""


class Signals:
    """Remembers SIGTERM and the first SIGINT for the loop to act on; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.waiting = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        try:
            self.previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: whoever started the thread handles signals
            log.debug("signals are left to the main thread")
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def ending_waits(self) -> Iterator[None]:
        """Leave what waits inside when a signal comes; one that came before is the caller's to see."""
        self.waiting = True
        try:
            yield
        except _Woken:
            pass
        finally:
            self.waiting = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if self.waiting:
            raise _Woken
