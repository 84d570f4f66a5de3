"""Log distances of two rows, read from records: as measured, or at equal capacity, GFLOPs or training time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from statistics import fmean

import numpy as np

from diffmoe.config import ConfigError
from diffmoe.records import Record
from diffmoe.report.cost import counted_sweep, training_minutes
from diffmoe.report.table import log_distance

Rows = dict[str, list[Record]]
Reading = tuple[list[float], list[float]]
"""Log distances of the first row and of the second, one a seed; in one order of seeds where they are paired."""
Curve = list[tuple[float, dict[int, float]]]
"""Points of a row by rising cost: the cost, and the log distance by seed."""
NEAR = 1.02
"""A cost outside a curve by less than this factor is read at the curve's end."""


def as_measured(rows: Rows, first: str, second: str, *, shares_checkpoint: bool, equal_capacity: bool,
                distance: str) -> Reading:
    """Read two rows; of the seeds that both have where they share checkpoints or capacities are made equal.

    Raises:
        ConfigError: when `shares_checkpoint` is wrong about the records.
    """
    ours, theirs = ({record.seed: record for record in rows.get(row, [])} for row in (first, second))
    both = sorted(ours.keys() & theirs.keys())
    for seed in both:
        digests = ours[seed].training_digest, theirs[seed].training_digest
        if (digests[0] == digests[1]) != shares_checkpoint:
            raise ConfigError(f"{first} and {second}: shares_checkpoint={str(shares_checkpoint).lower()}, but their "
                              f"training digests are {digests[0]} and {digests[1]}; correct the list or the rows")
    if equal_capacity:
        values = {seed: _at_capacity(ours[seed], theirs[seed].activation["capacity"], distance) for seed in both}
        both = [seed for seed in both if values[seed] is not None]
        return [values[seed] for seed in both], [own_log_distance(theirs[seed], distance) for seed in both]
    if shares_checkpoint:
        ours, theirs = ({seed: row[seed] for seed in both} for row in (ours, theirs))
    return ([own_log_distance(record, distance) for record in ours.values()],
            [own_log_distance(record, distance) for record in theirs.values()])


def at_gflops(rows: Rows, first: str, second: str, distance: str) -> Reading:
    """Read `second` between the sizes of its system, at the GFLOPs a call that `first` measured."""
    if first not in rows or second not in rows:
        return [], []
    sizes = [same for same in rows.values() if same[0].system == rows[second][0].system]
    curve = _curve(((fmean(record.activation["gflops"] for record in same), same) for same in sizes), distance)
    gflops = fmean(record.activation["gflops"] for record in rows[first])
    return [own_log_distance(record, distance) for record in rows[first]], read_curve(curve, gflops)


def swept_to_gflops(rows: Rows, first: str, second: str, distance: str) -> Reading:
    """Read `first` off its threshold sweeps at the mean GFLOPs of `second`, or at a sweep's end if it costs less."""
    if first not in rows or second not in rows:
        return [], []
    most = fmean(record.activation["gflops"] for record in rows[second])
    swept = []
    for record in rows[first]:
        curve = sorted((point["gflops"], {record.seed: log_distance(point[distance], record.id)})
                       for point in counted_sweep(record) if distance in point)
        swept += read_curve(curve, min(most, curve[-1][0])) if curve else []
    return swept, [own_log_distance(record, distance) for record in rows[second]]


def at_training_time(rows: Rows, first: str, second: str, everything: Sequence[Record], distance: str) -> Reading:
    """Read `second` between its budgets, at the minutes that `first` trained.

    Args:
        everything: records of all budgets.
    """
    if first not in rows:
        return [], []
    budgets: dict[int, list[Record]] = {}
    for record in everything:
        if record.row == second:
            budgets.setdefault(record.training["images"], []).append(record)
    curve = _curve(((fmean(map(training_minutes, same)), same) for same in budgets.values()), distance)
    minutes = fmean(map(training_minutes, rows[first]))
    return [own_log_distance(record, distance) for record in rows[first]], read_curve(curve, minutes)


def read_curve(curve: Curve, cost: float) -> list[float]:
    """Return the log distance of each seed at a cost, linear in the cost's logarithm; [] where no point is near."""
    for end, (place, values) in ((min, curve[0]), (max, curve[-1])) if curve else ():
        if end(cost, place) == cost:  # at the end or beyond it
            return list(values.values()) if max(cost / place, place / cost) < NEAR else []
    for (low, below), (high, above) in itertools.pairwise(curve):
        if low <= cost <= high:
            share = math.log(cost / low) / math.log(high / low)
            return [(1 - share) * below[seed] + share * above[seed] for seed in sorted(below.keys() & above.keys())]
    return []


def _curve(points: Iterable[tuple[float, list[Record]]], distance: str) -> Curve:
    curve = [(cost, {record.seed: own_log_distance(record, distance) for record in same}) for cost, same in points]
    return sorted(curve, key=lambda point: point[0])


def own_log_distance(record: Record, distance: str = "distance") -> float:
    """Return the log distance of a record."""
    return log_distance(record.metrics[distance], record.id)


def _at_capacity(record: Record, capacity: float, distance: str) -> float | None:
    """Interpolate the log distance of a threshold sweep; None where the sweep does not reach the capacity."""
    points = sorted((point["capacity"], log_distance(point[distance], record.id)) for point in record.threshold_sweep
                    if distance in point)
    if not points or not points[0][0] <= capacity <= points[-1][0]:
        return None
    return float(np.interp(capacity, *zip(*points, strict=True)))
