"""Figures of the distance: of each row, against activated parameters, against a swept capacity, and three costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from diffmoe.records import Record
from diffmoe.report.cost import counted_sweep, training_minutes
from diffmoe.report.style import (
    SWEPT,
    SYSTEMS,
    distance_axis,
    finish_figure,
    floor_line,
    name_figure,
    row_columns,
    row_style,
    set_theme,
    start_figure,
    system_colour,
)
from diffmoe.report.table import BASELINE, distance_names, group_rows, second_distances

FEW_TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
MANY_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.4, 1.7, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10)
"""Of a logarithmic axis that spans a factor of 5 at most."""
COSTS = {"activated_params_strict": "activated parameters, M (strict)", "gflops": "GFLOPs a network call",
         "training_minutes": "training, minutes"}
"""Columns and names of the panels of `distance_against_cost`."""


def points_data(records: Sequence[Record]) -> pd.DataFrame:
    """Return one line a record, and one a threshold of its sweep (`threshold` is empty for the record's own point).

    A column for each further extractor is empty for sweeps from before these were measured by it.
    """
    names = second_distances(records)
    lines = []
    for record in (record for rows in group_rows(records).values() for record in rows):
        own = record.activation | record.metrics | {"threshold": math.nan}
        for point in (own, *record.threshold_sweep):
            lines.append(row_columns(record) | {"training_digest": record.training_digest} | {
                key: point[key] for key in ("threshold", "capacity", "activated_params", "distance")} | {
                name: point.get(name, math.nan) for name in names})
    return pd.DataFrame(lines)


def distances_data(records: Sequence[Record]) -> pd.DataFrame:
    """Return one line a record and extractor."""
    names = distance_names(records)
    return pd.DataFrame([row_columns(record) | {"name": name, "distance": record.metrics[key]}
                         for rows in group_rows(records).values() for record in rows
                         for key, name in names.items()])


def distances_by_row(records: Sequence[Record]) -> Figure:
    """Draw each seed's distance and each row's mean: a row a line, an extractor a panel, Dense's mean across all."""
    data = distances_data(records)
    labels, names = list(data.label.unique()), list(data.name.unique())
    set_theme()
    figure, panels = plt.subplots(1, len(names), figsize=(9, 1.4 + 0.3 * len(labels)), sharey=True, squeeze=False,
                                  layout="constrained")
    across = "; dashed: Dense's mean" if BASELINE in set(data.row) else ""
    title = f"Distance of each row: a dot a seed, a line their mean{across}"
    name_figure(figure, records, title, metric=False, each_seed=True)
    for axes, name in zip(panels[0], names, strict=True):
        found = data[data.name == name]
        for row, group in found.groupby("row", sort=False):
            place, colour = labels.index(group.label.iloc[0]), row_style(row, records)["color"]
            axes.plot(group.distance, [place] * len(group), "o", color=colour, alpha=0.6, ms=5, mew=0)
            axes.vlines(group.distance.mean(), place - 0.35, place + 0.35, color=colour, lw=2)
        dense = found[found.row == BASELINE].distance
        if len(dense):
            axes.axvline(dense.mean(), color="0.45", lw=0.9, ls=(0, (6, 3)), zorder=0)
        axes.set_xlabel(distance_axis(records, name))
    panels[0, 0].set_yticks(range(len(labels)), labels)
    panels[0, 0].invert_yaxis()
    sns.despine(figure)
    return figure


def distance_against_parameters(records: Sequence[Record]) -> Figure:
    """Draw distance against activated parameters: a point a row, a curve through a system's sizes."""
    data = points_data(records)
    figure, axes = start_figure(records, "Distance against activated parameters",
                                "activated parameters, M (paper's count, measured)", distance_axis(records))
    data["activated_params"] /= 1e6
    _sizes(axes, data, "activated_params", records)
    _row_points(axes, data, "activated_params", records)
    _sweeps(axes, data, "activated_params", records)
    floor_line(axes, records)
    return finish_figure(figure, axes)


def distance_against_capacity(records: Sequence[Record]) -> Figure:
    """Draw each swept checkpoint's distance as one global threshold moves its capacity (the paper's Figure 7).

    A panel an extractor that measured sweeps, below one another.
    """
    data = points_data(records)
    swept = data[data.threshold.notna()]
    names = ["distance", *(name for name in second_distances(records) if swept[name].notna().any())]
    set_theme()
    figure, panels = plt.subplots(len(names), 1, figsize=(9, 4.8 * len(names)), sharex=True, squeeze=False,
                                  layout="constrained")
    name_figure(figure, records, "One checkpoint, many capacities: a global threshold is swept")
    for axes, name in zip(panels[:, 0], names, strict=True):
        drawn = data.assign(distance=data[name]).dropna(subset="distance")
        axes.set_xscale("log")
        _row_points(axes, drawn, "capacity", records)
        _sweeps(axes, drawn, "capacity", records, named=True)
        axes.margins(y=0.1)
        axes.set_ylabel(distance_axis(records, None if name == "distance" else name))
    low, high = axes.get_xlim()
    ticks = [tick for tick in (FEW_TICKS if high > 5 * low else MANY_TICKS) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("capacity C: experts a token, measured; small numbers: the threshold")
    floor_line(panels[0, 0], records)
    return finish_figure(figure, panels[0, 0])


def cost_data(records: Sequence[Record]) -> pd.DataFrame:
    """Return one line a record, and one a threshold of its sweep, with what each costs.

    The training is that of the checkpoint: `training_minutes` of a threshold is empty.
    """
    lines = []
    for record in (record for rows in group_rows(records).values() for record in rows):
        own = record.activation | {"threshold": math.nan, "distance": record.metrics["distance"],
                                   "training_minutes": training_minutes(record)}
        for point in (own, *counted_sweep(record)):
            lines.append(row_columns(record) | {"training_digest": record.training_digest} | {
                key: point.get(key, math.nan) for key in ("threshold", "capacity", *COSTS, "distance")})
    return pd.DataFrame(lines)


def distance_against_cost(records: Sequence[Record]) -> Figure:
    """Draw distance against the strict count, GFLOPs and training time: a panel each, one axis of distance."""
    data = cost_data(records)
    data["activated_params_strict"] /= 1e6
    set_theme()
    figure, panels = plt.subplots(1, len(COSTS), figsize=(9, 5.2), sharey=True, layout="constrained")
    name_figure(figure, records, "Distance against what it costs")
    for axes, (cost, name) in zip(panels, COSTS.items(), strict=True):
        _sizes(axes, data, cost, records)
        _row_points(axes, data, cost, records)
        _sweeps(axes, data.dropna(subset=cost), cost, records)
        axes.set_xlabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    panels[0].set_ylabel(distance_axis(records))
    for axes in panels:
        floor_line(axes, records, named=axes is panels[-1])
    return finish_figure(figure, panels[0], below=True)


def _sizes(axes: Axes, data: pd.DataFrame, x: str, records: Sequence[Record]) -> None:
    """Draw a curve through the sizes of a system whose rows are all trainings of their own."""
    for system, group in data[data.threshold.isna()].groupby("system", sort=False):
        sizes = group.groupby("row")[[x, "distance"]].mean().sort_values(x)
        if group.training_digest.nunique() == len(sizes) > 1:
            axes.plot(sizes[x], sizes.distance, color=system_colour(system, records), lw=1.2, zorder=1)


def _row_points(axes: Axes, data: pd.DataFrame, x: str, records: Sequence[Record]) -> None:
    own = data[data.threshold.isna()]
    for row in group_rows(records):
        group = own[own.row == row]
        spread = group[[x, "distance"]].std().fillna(0)
        axes.errorbar(group[x].mean(), group.distance.mean(), xerr=spread[x], yerr=spread.distance, ls="", ms=7,
                      elinewidth=1.2, mec="white", mew=0.6, label=group.label.iloc[0], zorder=4,
                      **row_style(row, records))


def _sweeps(axes: Axes, data: pd.DataFrame, x: str, records: Sequence[Record], *, named: bool = False) -> None:
    swept = data[data.threshold.notna()]
    for _, group in swept.groupby("row", sort=False):
        system = group.system.iloc[0]
        colour = system_colour(system, records)
        seeds = sorted(group.seed.unique())
        some = "" if len(seeds) == data.seed.nunique() else f", seed {', '.join(map(str, seeds))}"
        points = group.groupby("threshold", as_index=False)[[x, "distance"]].agg(["mean", "std"]).fillna(0)
        points = points.sort_values((x, "mean"))
        axes.errorbar(points[x]["mean"], points.distance["mean"], xerr=points[x]["std"], yerr=points.distance["std"],
                      color=colour, lw=1.4, elinewidth=0.8, marker=".", ms=6, alpha=0.75, zorder=2,
                      label=f"{SYSTEMS.get(system, system)}, {SWEPT}{some}")
        for _, point in points.iterrows() if named else ():
            axes.annotate(f"{point['threshold', '']:g}", (point[x, "mean"], point["distance", "mean"]), (-3, -9),
                          fontsize=8, textcoords="offset points", ha="right", color=colour, zorder=5,
                          path_effects=[withStroke(linewidth=2.5, foreground="white")])
