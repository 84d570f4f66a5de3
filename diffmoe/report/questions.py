"""Open questions: which of two rows is better, where no published effect is to be reproduced? In questions.yaml.

Two-sided; the statistics of the claims: effects on log distances, paired t where rows share checkpoints and Welch
otherwise, Holm over the list. An answer is a row, or `undecided` with the seeds that would show a gap of 5 %.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from diffmoe.records import Record
from diffmoe.report.comparison import ALPHA, POWER, Comparison, Tested, compare, correct
from diffmoe.report.readings import NEAR, Reading, Rows, as_measured, at_gflops, at_training_time, swept_to_gflops
from diffmoe.report.table import group_rows, second_distances
from diffmoe.report.table1 import format_table

QUESTIONS = Path(__file__).with_name("questions.yaml")
GAP = 0.05
"""The difference of distances that an undecided question asks seeds for."""
UNDECIDED = "undecided"


class Equal(enum.StrEnum):
    """What two rows are compared at."""

    CAPACITY = "capacity"
    GFLOPS = "gflops"
    TRAINING_TIME = "training_time"
    SWEPT_GFLOPS = "swept_gflops"


NAMES = {None: "", Equal.CAPACITY: " at equal C", Equal.GFLOPS: " at equal GFLOPs",
         Equal.TRAINING_TIME: " at equal training time", Equal.SWEPT_GFLOPS: ", swept to its GFLOPs"}


@dataclass(frozen=True, kw_only=True)
class Question:
    """Two rows of which either may be better."""

    first: str
    second: str
    shares_checkpoint: bool = False
    """The rows are two inference rules of one training."""
    at_equal: Equal | None = None
    """None: as measured."""
    asked_after: bool = False
    """These records raised the question, so that only other seeds or budgets test it."""

    @property
    def text(self) -> str:
        """The question in a few words."""
        return f"{self.first} or {self.second}{NAMES[self.at_equal]}?"


@dataclass(frozen=True, kw_only=True)
class Answer(Tested):
    """A question, answered; its seeds would decide a gap of 5 %."""

    question: Question
    better: str | None
    """The row with the smaller distance; None: undecided."""
    reason: str

    @property
    def text(self) -> str:
        """The answer in a few words."""
        return f"{self.better} is better" if self.better else UNDECIDED


def load_questions(path: Path = QUESTIONS) -> list[Question]:
    """Read the list of questions."""
    return [Question(**{**entry, "at_equal": Equal(entry["at_equal"]) if "at_equal" in entry else None})
            for entry in yaml.safe_load(path.read_text())]


def answer(records: Sequence[Record], everything: Sequence[Record], questions: Sequence[Question],
           distance: str = "distance") -> list[Answer]:
    """Answer each question by the rule in this file's docstring.

    Args:
        records: those of one budget.
        everything: those of all budgets, for questions at equal training time.
        distance: name of a metric that every record has.

    Raises:
        ConfigError: for records that cannot be compared, or that share checkpoints where their question says otherwise.
    """
    rows = group_rows(records)
    found = [_compare(question, rows, everything, distance) for question in questions]
    tested = correct([comparison for comparison, _ in found], [math.log1p(GAP)] * len(found))
    answers = []
    for question, (_, reason), result in zip(questions, found, tested, strict=True):
        better = None
        if result.comparison.interval is not None and result.p_adjusted < ALPHA:
            better = question.first if result.comparison.effect < 0 else question.second
        answers.append(Answer(**vars(result), question=question, better=better, reason=reason))
    return answers


def _compare(question: Question, rows: Rows, everything: Sequence[Record], distance: str) -> tuple[Comparison, str]:
    """Return the comparison of a question's rows, and why it decides nothing if it cannot."""
    first, second = _read(question, rows, everything, distance)
    comparison = compare(first, second, paired=question.shares_checkpoint)
    if question.first not in rows or question.second not in {record.row for record in everything}:
        return comparison, "nothing to compare"
    if question.at_equal is Equal.TRAINING_TIME and _num_machines(question, rows, everything) > 1:
        return Comparison(num_seeds=comparison.num_seeds), "several kinds of hardware"
    if comparison.interval is not None:
        return comparison, ""
    missing = "no sweep reaches that C" if question.at_equal is Equal.CAPACITY else "not reached"
    return comparison, {0: missing, 1: "one seed"}.get(comparison.num_seeds, "no spread over seeds")


def _read(question: Question, rows: Rows, everything: Sequence[Record], distance: str) -> Reading:
    if question.at_equal is Equal.GFLOPS:
        return at_gflops(rows, question.first, question.second, distance)
    if question.at_equal is Equal.SWEPT_GFLOPS:
        return swept_to_gflops(rows, question.first, question.second, distance)
    if question.at_equal is Equal.TRAINING_TIME:
        return at_training_time(rows, question.first, question.second, everything, distance)
    return as_measured(rows, question.first, question.second, shares_checkpoint=question.shares_checkpoint,
                       equal_capacity=question.at_equal is Equal.CAPACITY, distance=distance)


def _num_machines(question: Question, rows: Rows, everything: Sequence[Record]) -> int:
    compared = [*rows.get(question.first, []), *(record for record in everything if record.row == question.second)]
    return len({record.environment.get("hardware") for record in compared})


def questions_markdown(records: Sequence[Record], everything: Sequence[Record]) -> str:
    """Return the section of the open questions."""
    others = second_distances(records)
    also = f" {' and '.join(others)}: the same, Holm over its own list." if others else ""
    before, after = ([question for question in load_questions() if question.asked_after is asked_after]
                     for asked_after in (False, True))
    return f"""## Open questions

Listed before the runs, without a published effect to reproduce.

{_table(before, records, everything)}

The effect is that of the first row against the second, below 0 where the first is better. Two-sided; Holm over this
list; a row is better with Holm's p < {ALPHA}.{also}
Undecided: `smallest gap shown` is the relative difference that these seeds show with power {POWER} at the level that
Holm leaves; `seeds for {GAP:.0%}`, a row's seeds that would so show one of {GAP:.0%}, at today's spread.
At equal GFLOPs the second row is read between the sizes of its system; at equal training time between its own budgets,
at the minutes that the first took (images by throughput, on one kind of hardware). Both a seed at a time, linear in the
logarithms; less than {NEAR - 1:.0%} beyond the last of them the last is taken, farther it is not reached.

## Asked afterwards

Records raised these questions, so what the same records answer is a lead and no finding: the file of questions names
their seeds, and only others test it. Holm over this list.

{_table(after, records, everything)}

Swept: each seed of the first row is read between the thresholds of its sweep, at the second's mean GFLOPs, or at the
lowest threshold where that costs less.
"""


def _table(questions: Sequence[Question], records: Sequence[Record], everything: Sequence[Record]) -> str:
    others = {name: answer(records, everything, questions, distance=name) for name in second_distances(records)}
    lines = [["question", "effect", "95 % interval", "test", "seeds", "p", "p, Holm", "answer",
              *(f"by {name}" for name in others), "why", "smallest gap shown", f"seeds for {GAP:.0%}"]]
    lines += [_cells(found, [by[index].text for by in others.values()])
              for index, found in enumerate(answer(records, everything, questions))]
    return format_table(lines)


def _cells(found: Answer, others: Sequence[str]) -> list[str]:
    undecided, gap = found.better is None, found.smallest_gap
    return [found.question.text, *found.cells(paired=found.question.shares_checkpoint), found.text, *others,
            found.reason or ("too few seeds" if undecided else "-"),
            f"{math.expm1(gap):.1%}".replace("%", " %") if undecided and gap is not None else "-",
            found.seeds_cell() if undecided else "-"]
