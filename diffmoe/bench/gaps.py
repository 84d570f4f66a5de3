"""What keeps an unmet target from being met: the parts of the call that it is about, beside the machine's ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffmoe.bench.parts import WHOLE, WHOLE_CALL
from diffmoe.bench.record import BenchRecord, Result
from diffmoe.bench.targets import NAMES, Target, format_value, judge, part_ms
from diffmoe.records import commit_name
from diffmoe.report.style import SYSTEMS
from diffmoe.report.table1 import format_table

OF_DENSE = ("dense", "gradients", "latency")
"""Measures relative to dense, whose parts are as fast as they are."""
NOT_NETWORK = ("optimiser and average", "optimiser", "average", "data")
NOTHING = 0.0, 0.0
"""The times of a part that a call does not have."""
ACCOUNTED = 0.9, 1.1
"""Shares of a call between which its parts must add up, to be an account of it."""
ATTEMPTS = 2
"""Changes with a prediction behind which a target is still unmet; so many close it, if the account is there, too."""
TEXT = """# What is missing to the targets of speed

Made from the records beside it by `python -m diffmoe.bench --report`. A target is closed when a record that is not
older than its value, and from the same kind of GPU, takes the call apart, the parts add up to {low:.0%} to
{high:.0%} of it, and it is out of reach at the ceilings, or {attempts} changes, each with a prediction, left it unmet:
the messages of the commits that are named, or of the next record, say what was predicted and measured. At the ceilings
of that run's machine (matrix product and copy) stands each part; where the target is relative to dense, what is done
more than by dense stands there, and the rest is as measured. Milliseconds of a call, whose batch may be another than
the target's."""


@dataclass(frozen=True)
class PartLine:
    """A part in the call of a target's system and in that of dense, milliseconds of a whole call."""

    name: str
    ms: float
    least_ms: float
    """At the ceilings of the record; never more than was measured."""
    dense_ms: float
    dense_least_ms: float

    @property
    def more_ms(self) -> float:
        """Return what is done more than by dense, at the ceilings; or less, as measured."""
        more = self.least_ms - self.dense_least_ms
        return more if more >= 0 else min(self.ms - self.dense_ms, 0.0)


@dataclass(frozen=True, kw_only=True)
class Gap:
    """An unmet target and the account of it, where a record has one."""

    target: Target
    value: float
    is_older: bool = False
    """The record that takes it apart is older than the one with the value."""
    is_elsewhere: bool = False
    """The record that takes it apart has no value of its own and comes from another kind of GPU than the value."""
    record: BenchRecord | None = None
    result: Result | None = None
    has_ms: float = 0.0
    """Of the call, or of its forward and backward where the target is about them."""
    needs_ms: float = 0.0
    """With which the target would be met, all else unchanged."""
    dense_ms: float | None = None
    """Of dense, where the target is relative to it."""
    lines: tuple[PartLine, ...] = ()

    @property
    def least_ms(self) -> float:
        """Return the time with each part at its ceiling, what is in no part as it is; or dense's and what is more."""
        if self.dense_ms is not None:
            return self.dense_ms + sum(line.more_ms for line in self.lines)
        return self.has_ms - sum(line.ms - line.least_ms for line in self.lines)

    @property
    def accounted(self) -> float:
        """Return the parts' share of the time."""
        return sum(line.ms for line in self.lines) / self.has_ms

    @property
    def status(self) -> str:
        """Say why the target is closed, or what is missing for that."""
        if self.result is None:
            return "open: not taken apart"
        if self.is_older:
            return "open: taken apart before that"
        if self.is_elsewhere:
            return "open: taken apart on another GPU"
        if not ACCOUNTED[0] <= self.accounted <= ACCOUNTED[1]:
            return "open: parts do not add up"
        if self.least_ms > self.needs_ms:
            return "closed: out of reach"
        missing = ATTEMPTS - len(self.target.attempts)
        return "closed: attempts left it unmet" if missing <= 0 else f"open: {missing} more to attempt"

    def cells(self) -> list[str]:
        """Return the target's line of the table."""
        measured = [self.target.name, f"{self.target.limit} {NAMES[self.target.against]}", format_value(self.value)]
        times = ["-"] * 4
        if self.result is not None:
            times = [*(f"{ms:.4g}" for ms in (self.has_ms, self.needs_ms, self.least_ms)), f"{self.accounted:.0%}"]
        return [*measured, *times, ", ".join(self.target.attempts) or "-", self.status]


def find_gaps(records: Sequence[BenchRecord]) -> list[Gap]:
    """Return the targets that are measured and not met, each with the latest account of it."""
    return [_account(target, value, source, records) for target, value, source in judge(records)
            if value is not None and not target.is_met(value)]


def gaps_markdown(records: Sequence[BenchRecord]) -> str:
    """Return the page: a line a target, then a table a call that was taken apart."""
    gaps = find_gaps(records)
    head = ["what", "target", "measured", "ms", "needs", "at ceilings", "in parts", "attempts", "status"]
    closed = sum(gap.status.startswith("closed") for gap in gaps)
    sections = [TEXT.format(low=ACCOUNTED[0], high=ACCOUNTED[1], attempts=ATTEMPTS),
                f"{closed} of {len(gaps)} unmet targets are closed.",
                format_table([head, *(gap.cells() for gap in gaps)])]
    calls = {(gap.record.id, gap.result.case): gap for gap in gaps
             if gap.result is not None and gap.target.against != "gradients"}
    for (record, case), gap in calls.items():
        own = SYSTEMS.get(case.system, case.system)
        rows = [[line.name, *(f"{ms:.4g}" for ms in (line.ms, line.least_ms, line.dense_ms, line.dense_least_ms)),
                 f"{line.ms - line.dense_ms:.2f}"] for line in gap.lines]
        head = ["ms a call", own, "at ceilings", SYSTEMS["dense"], "at ceilings", "more"]
        sections += [f"## {case.name}\n\n{record}, {gap.record.environment['hardware']}, commit "
                     f"{commit_name(gap.record.environment)}", format_table([head, *rows])]
    return "\n\n".join(sections) + "\n"


def _account(target: Target, value: float, source: str, records: Sequence[BenchRecord]) -> Gap:
    record, result, dense = _taken_apart(target, records)
    has_ms, dense_ms = _call_ms(result, target), _call_ms(dense, target)
    if has_ms is None:
        return Gap(target=target, value=value)
    mine, other = _times(record, result, target), _times(record, dense, target)
    own = target.measured(record)
    here = value if own is None else own
    ratio = here / target.at_least if target.at_most is None else target.at_most / here
    order = [each.id for each in records]
    hardware = records[order.index(source)].environment["hardware"]
    return Gap(target=target, value=value, is_older=order.index(record.id) < order.index(source),
               is_elsewhere=own is None and record.environment["hardware"] != hardware, record=record,
               result=result, has_ms=has_ms, needs_ms=has_ms * ratio,
               dense_ms=dense_ms if target.against in OF_DENSE else None,
               lines=tuple(PartLine(name, *mine.get(name, NOTHING), *other.get(name, NOTHING))
                           for name in dict.fromkeys([*other, *mine])))


def _taken_apart(target: Target,
                 records: Sequence[BenchRecord]) -> tuple[BenchRecord, Result, Result | None] | tuple[None] * 3:
    """Return the latest record with the parts of a target's work, their result and dense's, if it has parts, too."""
    wanted = {name: getattr(target, name) for name in ("workload", "size", "work")}
    for record in () if target.against == "startup" else reversed(records):
        apart = [result for result in record.find(**wanted, implementation="ours")
                 if any(part["flops"] and "ms" in part for part in result.parts)]
        for result in apart:
            if result.case.system == target.system and target.load in (None, result.case.load):
                dense = [other for other in apart if other.case.system == "dense" and result.case.system != "dense"
                         and other.case.batch == result.case.batch]
                return record, result, dense[0] if dense else None
    return None, None, None


def _call_ms(result: Result | None, target: Target) -> float | None:
    """Return the time that a target is about: of the call, or of its forward and backward."""
    if result is None:
        return None
    return part_ms(result, WHOLE) if target.against == "gradients" else result.quartiles_ms[1]


def _times(record: BenchRecord, result: Result | None, target: Target) -> dict[str, tuple[float, float]]:
    """Return milliseconds of a whole call by part, as measured and at the ceilings."""
    left_out = (WHOLE, WHOLE_CALL, *(NOT_NETWORK if target.against == "gradients" else ()))
    found = {}
    for part in result.parts if result else ():
        if "ms" in part and part["name"] not in left_out:
            found[part["name"]] = (part["count"] * part["ms"],
                                   part["count"] * min(part["ms"], record.least_ms(part)))
    return found
