"""What so many seeds can show: the spread of each row over its seeds, and the gaps between two rows that it hides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance

from diffmoe.records import Record
from diffmoe.report.comparison import ALPHA, POWER, smallest_gap
from diffmoe.report.readings import own_log_distance
from diffmoe.report.table import group_rows
from diffmoe.report.table1 import format_table

SEEDS = (2, 3, 5, 10)
SAMPLING_ERROR = """
Sampling error: what one distance would scatter if other noise had been drawn for as many samples, by the delta method.
All rows have the same noise and classes, so that what they share of it is in no difference between them.
"""


def row_variances(records: Sequence[Record]) -> dict[str, tuple[int, float | None]]:
    """Return seeds and variance of the log distance of each row; None for one seed."""
    logs = {row: [own_log_distance(record) for record in same] for row, same in group_rows(records).items()}
    return {row: (len(values), variance(values) if len(values) > 1 else None) for row, values in logs.items()}


def pooled_variance(rows: Sequence[tuple[int, float | None]]) -> float | None:
    """Return the mean of the rows' variances by their degrees of freedom; None where no row has two seeds."""
    known = [(seeds - 1, found) for seeds, found in rows if found is not None]
    return sum(freedom * found for freedom, found in known) / sum(freedom for freedom, _ in known) if known else None


def power_markdown(records: Sequence[Record]) -> str:
    """Return the section of the spread over seeds and of the gaps that it lets two rows show."""
    rows = row_variances(records)
    pooled = pooled_variance(list(rows.values()))
    errors = {row: _sampling_error(same) for row, same in group_rows(records).items()}
    columns = [["row", *rows], ["seeds", *(str(seeds) for seeds, _ in rows.values())],
               ["spread over seeds", *(_percent(found and math.sqrt(found)) for _, found in rows.values())]]
    explained = ""
    if any(errors.values()):
        columns.append(["sampling error", *map(_percent, errors.values())])
        explained = SAMPLING_ERROR
    lines = list(map(list, zip(*columns, strict=True)))
    text = f"## What these seeds can show\n\n{format_table(lines)}\n{explained}"
    if not pooled:  # one seed, or no spread
        return text
    gaps = [_percent(math.expm1(smallest_gap((pooled, pooled), seeds, ALPHA))) for seeds in SEEDS]
    spread = _percent(math.sqrt(pooled))
    return f"""{text}
Spread: sd of the log distance; a small one is the coefficient of variation. Pooled over the rows: {spread}.
With it, the smallest difference of two independent rows that a t test (two-sided {ALPHA:.0%}, no Holm) shows with
power {POWER}:

{format_table([["seeds a row", *map(str, SEEDS)], ["smallest gap", *gaps]])}
"""


def _sampling_error(records: Sequence[Record]) -> float | None:
    """Return the root mean square of the records' standard errors over their distances."""
    shares = [record.metrics["distance_se"] / record.metrics["distance"] for record in records
              if "distance_se" in record.metrics]
    return math.sqrt(fmean(share**2 for share in shares)) if shares else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %"
