"""What keeps an unmet target from being met: the parts of the call that it is about, beside the machine's ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffmoe.bench.parts import WHOLE, WHOLE_CALL
from diffmoe.bench.record import BenchRecord, Result
from diffmoe.bench.targets import NAMES, Target, format_value, judge, part_ms
from diffmoe.report.style import SYSTEMS
from diffmoe.report.table1 import format_table

NOT_NETWORK = ("optimiser and average", "optimiser", "average", "data")
ACCOUNTED = 0.9
"""Share of a call that its parts must add up to, to be an account of it."""
ATTEMPTS = 2
"""Changes with a prediction behind which a target is still unmet; so many close it, if the account is there, too."""
TEXT = """# What is missing to the targets of speed

Made from the records beside it by `python -m diffmoe.bench --report`. A target is closed when the parts add up to
{accounted:.0%} of the call, and it is out of reach even with each of them at the ceilings of that run's machine (matrix
product and copy; what is in no part stays), or {attempts} changes, each with a prediction, left it unmet: the messages
of the commits that are named say what was predicted and measured. Milliseconds of a call, from the latest record that
takes such a call apart: its batch may be another than the target's."""


@dataclass(frozen=True, kw_only=True)
class PartLine:
    """A part in the call of a target's system and in that of dense, milliseconds of a whole call."""

    name: str
    ms: float = 0.0
    least_ms: float = 0.0
    """At the ceilings of the record; never more than was measured."""
    dense_ms: float = 0.0
    dense_least_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Gap:
    """An unmet target and the account of it, where a record has one."""

    target: Target
    value: float
    record: BenchRecord | None = None
    result: Result | None = None
    has_ms: float = 0.0
    """Of the call, or of its forward and backward where the target is about them."""
    needs_ms: float = 0.0
    """With which the target would be met, all else unchanged."""
    lines: tuple[PartLine, ...] = ()

    @property
    def least_ms(self) -> float:
        """Return the time with each part at its ceiling; what is in no part stays."""
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
        if self.accounted < ACCOUNTED:
            return "open: not accounted for"
        if self.least_ms > self.needs_ms:
            return "closed: out of reach"
        missing = ATTEMPTS - len(self.target.attempts)
        return "closed: attempts missed" if missing <= 0 else f"open: {missing} more to attempt"

    def cells(self) -> list[str]:
        """Return the target's line of the table."""
        measured = [self.target.name, f"{self.target.limit} {NAMES[self.target.against]}", format_value(self.value)]
        times = ["-"] * 4
        if self.result is not None:
            times = [*(f"{ms:.4g}" for ms in (self.has_ms, self.needs_ms, self.least_ms)), f"{self.accounted:.0%}"]
        return [*measured, *times, ", ".join(self.target.attempts) or "-", self.status]


def find_gaps(records: Sequence[BenchRecord]) -> list[Gap]:
    """Return the targets that are measured and not met, each with the latest account of it."""
    return [_account(target, value, records) for target, value, _ in judge(records)
            if value is not None and not target.is_met(value)]


def gaps_markdown(records: Sequence[BenchRecord]) -> str:
    """Return the page: a line a target, then a table a call that was taken apart."""
    gaps = find_gaps(records)
    head = ["what", "target", "measured", "ms", "needs", "at ceilings", "in parts", "attempts", "status"]
    closed = sum(gap.status.startswith("closed") for gap in gaps)
    sections = [TEXT.format(accounted=ACCOUNTED, attempts=ATTEMPTS),
                f"{closed} of {len(gaps)} unmet targets are closed.",
                format_table([head, *(gap.cells() for gap in gaps)])]
    calls = {(gap.record.id, gap.result.case): gap for gap in gaps
             if gap.result is not None and gap.target.against != "gradients"}
    for (record, case), gap in calls.items():
        own = SYSTEMS.get(case.system, case.system)
        rows = [[line.name, *(f"{ms:.4g}" for ms in (line.ms, line.least_ms, line.dense_ms, line.dense_least_ms)),
                 f"{line.ms - line.dense_ms:.2f}"] for line in gap.lines]
        head = ["ms a call", own, "at ceilings", SYSTEMS["dense"], "at ceilings", "more"]
        sections += [f"## {case.name}\n\n{record}, {gap.record.environment['hardware']}", format_table([head, *rows])]
    return "\n\n".join(sections) + "\n"


def _account(target: Target, value: float, records: Sequence[BenchRecord]) -> Gap:
    wanted = {name: getattr(target, name) for name in ("workload", "size", "work", "load")
              if getattr(target, name) is not None}
    for record in () if target.against == "startup" else reversed(records):
        for result in record.find(**wanted, system=target.system, implementation="ours"):
            if not any(part["flops"] and "ms" in part for part in result.parts):
                continue
            dense = record.find(**wanted | {"load": ""}, system="dense", batch=result.case.batch,
                                implementation="ours") if target.system != "dense" else []
            mine, other = _times(record, result), _times(record, dense[0]) if dense else {}
            has_ms = result.quartiles_ms[1]
            if target.against == "gradients":
                has_ms = part_ms(result, WHOLE)
                mine, other = ({name: times for name, times in each.items() if name not in NOT_NETWORK}
                               for each in (mine, other))
            here = target.measured(record) or value
            ratio = here / target.at_least if target.at_most is None else target.at_most / here
            lines = [PartLine(name=name, ms=ms, least_ms=least, dense_ms=dense_ms, dense_least_ms=dense_least)
                     for name in dict.fromkeys([*other, *mine]) for ms, least in [mine.get(name, (0.0, 0.0))]
                     for dense_ms, dense_least in [other.get(name, (0.0, 0.0))]]
            return Gap(target=target, value=value, record=record, result=result, has_ms=has_ms,
                       needs_ms=has_ms * ratio, lines=tuple(lines))
    return Gap(target=target, value=value)


def _times(record: BenchRecord, result: Result) -> dict[str, tuple[float, float]]:
    """Return milliseconds of a whole call by part, as measured and at the ceilings."""
    found = {}
    for part in result.parts:
        if "ms" in part and part["name"] not in (WHOLE, WHOLE_CALL):
            least = 1e3 * max(part["flops"] / record.ceilings["matmul_flops"],
                              part["bytes"] / record.ceilings["copy_bytes"])
            found[part["name"]] = part["count"] * part["ms"], part["count"] * min(least, part["ms"])
    return found
