"""What a run notices of itself: steps that changed nothing, spikes of the loss, experts without tokens."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

WINDOW = 200
"""Steps that say what a usual loss is."""
SPIKE = 10.0
"""Spreads above the window's median; a spread is 1.48 times the median distance from it, a normal distribution's sd."""
SPIKE_PAUSE = 100
"""Steps after a spike in which no other is told."""
IDLE_STEPS = 1000
"""Steps without a token after which an expert is told."""


class Watch:
    """Turns the objectives of steps and the experts' idle times into events, plain data for a log.

    Args:
        state: what `state` returned in the run that is gone on with.
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.skipped: int = state.get("skipped", 0)
        """Steps that changed nothing."""
        self.recent: list[float] = state.get("recent", [])
        self.last_spike: int = state.get("last_spike", -SPIKE_PAUSE)
        self.idle: list[list[int]] = state.get("idle", [])

    def state(self) -> dict[str, Any]:
        """Return plain data to go on from."""
        return {"skipped": self.skipped, "recent": list(self.recent), "last_spike": self.last_spike, "idle": self.idle}

    def steps(self, first: int, objectives: Sequence[float]) -> list[dict[str, Any]]:
        """Look at the objectives of step `first` and those after it."""
        events = []
        for step, value in enumerate(objectives, first):
            if not math.isfinite(value):
                self.skipped += 1
                events.append({"step": step, "event": "not finite", "skipped": self.skipped})
                continue
            if step - self.last_spike >= SPIKE_PAUSE and len(self.recent) == WINDOW:
                median = statistics.median(self.recent)
                spread = 1.4826 * statistics.median(abs(other - median) for other in self.recent)
                if value > median + SPIKE * spread:
                    self.last_spike = step
                    events.append({"step": step, "event": "loss spike", "loss": value, "median": median})
            self.recent = [*self.recent[-WINDOW + 1:], value]
        return events

    def experts(self, step: int, idle_LE: list[list[int]]) -> list[dict[str, Any]]:
        """Look at the steps that each expert has been without a token; each is told once until it has one again."""
        idle = [[layer, expert] for layer, row in enumerate(idle_LE) for expert, steps in enumerate(row)
                if steps >= IDLE_STEPS]
        events = [{"step": step, "event": "expert without tokens", "layer": layer, "expert": expert,
                   "steps": idle_LE[layer][expert]} for layer, expert in idle if [layer, expert] not in self.idle]
        self.idle = idle
        return events
