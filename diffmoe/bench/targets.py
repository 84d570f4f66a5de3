"""The targets and what the records say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from diffmoe.bench.parts import WHOLE
from diffmoe.bench.record import BenchRecord, Result

LOOKUP = ("workload", "size", "system", "work", "batch", "load")
NAMES = {"images_per_second": "images/s", "seconds_per_10000": "s for 10,000 images", "startup": "s to start",
         "mfu": "MFU", "dense": "of dense", "reference": "times the authors' code", "gradients":
         "of dense, forward and backward", "latency": "times dense's latency"}


@dataclass(frozen=True, kw_only=True)
class Target:
    """One line of targets.yaml, described there."""

    workload: str
    size: str
    system: str
    work: str
    against: str
    batch: int | None = None
    load: str | None = None
    largest: bool = False
    cache: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    attempts: Sequence[str] = ()

    @property
    def name(self) -> str:
        """Return what is to be reached."""
        parts = (self.workload, self.size, self.system, self.work, self.load, self.cache and f"{self.cache} cache",
                 self.batch and f"batch {self.batch}", "largest batch" if self.largest else None)
        return " ".join(part for part in parts if part)

    @property
    def limit(self) -> str:
        """Return the number to reach, with its direction."""
        if self.at_least == 0:
            return "runs"
        return f"≥ {self.at_least:g}" if self.at_most is None else f"≤ {self.at_most:g}"

    def is_met(self, value: float) -> bool:
        """Compare."""
        return value >= self.at_least if self.at_most is None else value <= self.at_most

    def measured(self, record: BenchRecord) -> float | None:
        """Return a record's value, or None when it has none."""
        if self.against == "startup":
            same = [line["total"] for line in record.startup
                    if all(line[name] == getattr(self, name) for name in ("workload", "size", "system", "cache"))]
            return same[0] if same else None
        if self.largest and not record.settings.get("largest"):
            return None
        wanted = {name: getattr(self, name) for name in LOOKUP if getattr(self, name) is not None}
        values = [self._value(record, result) for result in record.find(**wanted, implementation="ours")]
        return next((value for value in values if value is not None), None)

    def _value(self, record: BenchRecord, result: Result) -> float | None:
        if self.against == "images_per_second":
            return result.images_per_second
        if self.against == "seconds_per_10000":
            return 10_000 / result.images_per_second
        if self.against == "mfu":
            return record.mfu(result)
        if self.against == "reference":
            return record.ratio(result, implementation="reference-tf32")
        dense = record.ratio(result, system="dense")
        if self.against == "gradients":
            return _gradients_ratio(record, result)
        return None if dense is None else 1 / dense if self.against == "latency" else dense


def read_targets() -> list[Target]:
    """Return the targets."""
    return [Target(**line) for line in yaml.safe_load((Path(__file__).parent / "targets.yaml").read_text())]


def judge(records: Sequence[BenchRecord]) -> list[tuple[Target, float | None, str]]:
    """Return each target with the value of the latest record that has one, and that record's id."""
    found = []
    for target in read_targets():
        values = [(target.measured(record), record.id) for record in records]
        values = [(value, name) for value, name in values if value is not None]
        found.append((target, *(values[-1] if values else (None, ""))))
    return found


def format_value(value: float) -> str:
    """Return a measured value in four digits, or more before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _gradients_ratio(record: BenchRecord, result: Result) -> float | None:
    times = [part_ms(result, WHOLE)]
    dense = record.find(workload=result.case.workload, size=result.case.size, system="dense", work="train",
                        batch=result.case.batch, implementation="ours")
    times += [part_ms(other, WHOLE) for other in dense]
    return None if len(times) < 2 or None in times else times[1] / times[0]


def part_ms(result: Result, name: str) -> float | None:
    """Return the milliseconds of a part, or None for one that was not timed."""
    return next((part.get("ms") for part in result.parts if part["name"] == name), None)
