"""Two rows of log distances against each other: t tests over seeds, Holm's correction, the power of so many seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from diffmoe.report.table import percent

ALPHA, POWER, MOST_SEEDS = 0.05, 0.8, 1000


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two rows measured against each other; log ratios. Without two seeds there is no test."""

    num_seeds: int
    effect: float | None = None
    interval: tuple[float, float] | None = None
    p: float = 1.0
    variances: tuple[float, ...] = ()
    """Of the log distances of each row (Welch), or of their differences (paired): one run each."""


def compare(better: Sequence[float], worse: Sequence[float], *, paired: bool) -> Comparison:
    """Compare log distances: effect, 95 % interval and two-sided p by paired t (same order of seeds) or Welch."""
    num_seeds = min(len(better), len(worse))
    if num_seeds == 0:
        return Comparison(num_seeds=0)
    effect = float(np.mean(better) - np.mean(worse))
    samples = [np.subtract(better, worse)] if paired else [np.asarray(better), np.asarray(worse)]
    if num_seeds == 1 or all(np.ptp(sample) < 1e-12 for sample in samples):  # no spread to judge an effect by
        return Comparison(num_seeds=num_seeds, effect=effect)
    test = stats.ttest_1samp(samples[0], 0.0) if paired else stats.ttest_ind(*samples, equal_var=False)
    low, high = test.confidence_interval(1 - ALPHA)
    return Comparison(num_seeds=num_seeds, effect=effect, interval=(float(low), float(high)), p=float(test.pvalue),
                      variances=tuple(float(np.var(sample, ddof=1)) for sample in samples))


def holm_factors(p_values: Sequence[float]) -> list[int]:
    """Return what Holm multiplies each p with: m for the smallest, 1 for the largest."""
    ranks = np.argsort(np.argsort(p_values, kind="stable"), kind="stable")
    return [len(p_values) - int(rank) for rank in ranks]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values (Holm 1979): step down, never below an adjusted p of a smaller one."""
    products = np.multiply(p_values, holm_factors(p_values))
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(products[order]), 1.0)
    return adjusted.tolist()


@dataclass(frozen=True, kw_only=True)
class Tested:
    """One comparison of a list, with what the list's other comparisons leave of it."""

    comparison: Comparison
    p_adjusted: float
    """By Holm over the list."""
    smallest_gap: float | None
    """Log ratio that a test of these seeds finds with power 0.8, at the level that Holm left to it."""
    seeds_to_decide: int | None
    """Seeds a row with which a given effect would be found with power 0.8; None: unknown or above 1000."""

    def cells(self, *, paired: bool) -> list[str]:
        """Return for a table: effect, interval, test, seeds, p, adjusted p; `-` for what no test gave."""
        found = self.comparison
        if found.interval is None:
            return [percent(found.effect), "-", "-", str(found.num_seeds), "-", "-"]
        return [percent(found.effect), " to ".join(map(percent, found.interval)), "paired t" if paired else "Welch",
                str(found.num_seeds), f"{found.p:.2g}", f"{self.p_adjusted:.2g}"]

    def seeds_cell(self) -> str:
        """Return for a table how many seeds a row would decide."""
        return "2 or more" if self.comparison.interval is None else str(self.seeds_to_decide or f"over {MOST_SEEDS}")


def correct(comparisons: Sequence[Comparison], effects: Sequence[float]) -> list[Tested]:
    """Correct a list of comparisons by Holm, and say for each what its seeds show and how many its effect takes.

    Args:
        effects: the log ratio that each comparison's seeds are to find.
    """
    p_values = [comparison.p for comparison in comparisons]
    tested = []
    for found, effect, adjusted, factor in zip(comparisons, effects, holm(p_values), holm_factors(p_values),
                                               strict=True):
        gap = seeds = None
        if found.variances:
            gap = smallest_gap(found.variances, found.num_seeds, ALPHA / factor)
            seeds = seeds_to_decide(effect, found.variances, ALPHA / factor)
        tested.append(Tested(comparison=found, p_adjusted=adjusted, smallest_gap=gap, seeds_to_decide=seeds))
    return tested


def detection_power(effect: float, variances: Sequence[float], num_seeds: int, level: float) -> float:
    """Return the chance that a two-sided t test of this level finds a true effect, with `num_seeds` seeds a row."""
    freedom = (num_seeds - 1) * sum(variances) ** 2 / sum(variance**2 for variance in variances)
    shift = abs(effect) / math.sqrt(sum(variances) / num_seeds)
    return float(stats.nct.sf(stats.t.isf(level / 2, freedom), freedom, shift))  # the other tail is negligible


def smallest_gap(variances: Sequence[float], num_seeds: int, level: float) -> float:
    """Return the log ratio that is found with power 0.8."""
    unit = math.sqrt(sum(variances) / num_seeds)
    high = unit
    while detection_power(high, variances, num_seeds, level) < POWER:
        high *= 2
    return optimize.brentq(lambda gap: detection_power(gap, variances, num_seeds, level) - POWER, 0, high)


def seeds_to_decide(effect: float, variances: Sequence[float], level: float) -> int | None:
    """Return the seeds a row with which a true effect is found with power 0.8; None above 1000."""
    if detection_power(effect, variances, MOST_SEEDS, level) < POWER:
        return None
    low, high = 1, MOST_SEEDS  # power rises with the seeds: bisect
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if detection_power(effect, variances, middle, level) >= POWER else (middle, high)
    return high
