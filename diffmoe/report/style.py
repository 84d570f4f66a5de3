"""What all figures share: a colour a system, a marker a row, the look, title and legend, the first columns of data."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from diffmoe.records import Record
from diffmoe.report.table import floors, group_rows, row_order

SYSTEMS = {"dense": "Dense", "token_choice": "TC", "expert_choice": "EC", "diffmoe": "DiffMoE",
           "expert_race": "Expert Race"}
COLOURS = dict(zip(SYSTEMS, ("#5b5b5b", "#de8f05", "#0173b2", "#d1332e", "#029e73"), strict=True))
OTHER_COLOURS = ("#cc78bc", "#ca9161", "#56b4e9", "#a5a516")
"""For systems that a user adds, in alphabetical order."""
DASHES = ((), (4, 1.5), (1, 1.2), (5, 1, 1, 1), (3, 1, 1, 1, 1, 1), (2, 2))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
SWEPT = "threshold swept"
FLOOR = "floor: as many training images"
LOAD_SCALE = TwoSlopeNorm(vmin=0, vcenter=1, vmax=3)
"""Colours of tokens per expert: an idle one is as blue as a crowded one is red; a collapsed router's lone one has E."""
LEGEND_LINE = 0.2
"""Inches of a row's name beside a figure."""
MOST_TICKS = 8


def row_columns(record: Record) -> dict[str, object]:
    """Return what each line of a figure's data starts with."""
    return {"row": record.row, "label": record.label, "system": record.system, "seed": record.seed}


def shared_label(labels: Sequence[str]) -> str:
    """Name what several rows share by what their labels do: EC (static), 4 and EC (dynamic), 4 are EC, 4."""
    stems = {re.sub(r" \(.*?\)", "", label) for label in labels}
    return stems.pop() if len(stems) == 1 < len(set(labels)) else labels[0]


def trainings(records: Sequence[Record]) -> list[list[Record]]:
    """Return the records of each training, one a seed, whichever rows share it; they go by what the rows' labels share.

    Raises:
        ConfigError: as `group_rows` does.
    """
    runs: dict[str, dict[int, Record]] = {}
    labels: dict[str, list[str]] = {}
    for record in (record for rows in group_rows(records).values() for record in rows):
        runs.setdefault(record.training_digest, {}).setdefault(record.seed, record)
        labels.setdefault(record.training_digest, []).append(record.label)
    return [[replace(seeds[seed], label=shared_label(labels[training])) for seed in sorted(seeds)]
            for training, seeds in runs.items()]


def set_theme() -> None:
    """Set the look of the next figure."""
    sns.set_theme(style="whitegrid", rc={"grid.color": "0.9", "axes.edgecolor": "0.4", "axes.labelsize": 10,
                                         "xtick.labelsize": 9, "ytick.labelsize": 9})


def scale_note(records: Sequence[Record], *, metric: bool, sampled: bool = True) -> str:
    """Say at which scale, by which distance and on how many samples a figure was measured."""
    first = records[0]
    measured = f", {first.evaluation['distance_name']}" if metric else ""
    samples = f", {first.sampling['num_samples']} samples" if sampled else ""
    return f"scale {first.scale}{measured}{samples}"


def system_colour(system: str, records: Sequence[Record]) -> str:
    """Return the colour of a system."""
    others = sorted({record.system for record in records} - set(COLOURS))
    return COLOURS.get(system) or OTHER_COLOURS[others.index(system) % len(OTHER_COLOURS)]


def row_style(row: str, records: Sequence[Record]) -> dict[str, str]:
    """Return colour and marker of a row: its system's colour, its place among the system's rows."""
    systems = {record.row: record.system for record in records}
    same = sorted((name for name, system in systems.items() if system == systems[row]), key=row_order)
    return {"color": system_colour(systems[row], records), "marker": MARKERS[same.index(row) % len(MARKERS)]}


def start_figure(records: Sequence[Record], title: str, x: str, y: str, *, metric: bool = True,
                 sampled: bool = True) -> tuple[Figure, Axes]:
    """Return an empty figure with its title, the note under it and the axes' names."""
    set_theme()
    figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    name_figure(figure, records, title, metric=metric, sampled=sampled)
    return figure, axes


def name_figure(figure: Figure, records: Sequence[Record], title: str, *, metric: bool = True,
                sampled: bool = True, each_seed: bool = False) -> None:
    """Put the title over a figure, with the scale, the distance and the seeds under it."""
    seeds = sorted({record.seed for record in records})
    several = f"{'' if each_seed else 'mean ± sd over '}seeds {', '.join(map(str, seeds))}"
    spread = several if len(seeds) > 1 else f"seed {seeds[0]}"
    note = scale_note(records, metric=metric, sampled=sampled)
    figure.suptitle(f"{title}\n{note}, {spread}", x=0.01, ha="left", fontsize=11)


def draw_lines(axes: Axes, data: pd.DataFrame, x: str, y: str, records: Sequence[Record]) -> None:
    """Draw a line a label, mean and sd over its seeds: of its system's colour, each of a system with other dashes.

    A system with more labels than there are dashes has the same again in a lighter colour.
    """
    firsts = data.drop_duplicates("label")
    place = firsts.groupby("system").cumcount()
    palette, dashes = {}, {}
    for line, index in zip(firsts.itertuples(), place, strict=True):
        again, kind = divmod(index, len(DASHES))
        palette[line.label] = sns.light_palette(system_colour(line.system, records), as_cmap=True)(0.5**again)
        dashes[line.label] = DASHES[kind]
    sns.lineplot(data, x=x, y=y, hue="label", style="label", palette=palette, dashes=dashes, errorbar="sd", ax=axes,
                 lw=1.6)


def draw_loads(axes: Axes, table: pd.DataFrame, **lines: object) -> None:
    """Draw a table of relative loads as colours, its index down the axes; `lines`: of the cells' edges.

    What `seaborn.heatmap` draws, which lays out the whole figure anew for each of its panels.
    """
    axes.pcolormesh(np.ma.masked_invalid(table.to_numpy(dtype=float)), norm=LOAD_SCALE, cmap="vlag", **lines)
    axes.grid(False)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    for axis, names in ((axes.xaxis, table.columns), (axes.yaxis, table.index)):
        step = math.ceil(len(names) / MOST_TICKS)
        axis.set_ticks(np.arange(0, len(names), step) + 0.5, [str(name) for name in names[::step]])


def draw_load_bar(figure: Figure, grid: np.ndarray) -> None:
    """Draw the colour bar of the panels that `draw_loads` drew."""
    bar = figure.colorbar(ScalarMappable(LOAD_SCALE, "vlag"), ax=grid, shrink=0.8, pad=0.02, extend="max",
                          aspect=4 * figure.get_figheight())
    bar.set_label("tokens (1: the layer's mean)", fontsize=9)
    bar.ax.tick_params(labelsize=8)


def floor_line(axes: Axes, records: Sequence[Record], *, named: bool = True) -> None:
    """Draw the training set's floor where it lies in view; call it when all else is drawn."""
    floor = floors(records).get(records[0].evaluation["distance_name"])
    low, high = axes.get_ylim()
    if floor is None or not low <= floor <= high:
        return
    axes.axhline(floor, color="0.45", lw=0.9, ls=(0, (6, 3)), zorder=0)
    axes.set_ylim(low, high)
    if named:
        axes.annotate(FLOOR, (0.99, floor), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", fontsize=8, color="0.35", path_effects=[withStroke(linewidth=2.5, foreground="w")])


def finish_figure(figure: Figure, axes: Axes, *, below: bool = False) -> Figure:
    """Put the legend of `axes` beside the figure, or below it, sweeps last."""
    sns.despine(figure)
    handles, labels = axes.get_legend_handles_labels()
    named = dict(sorted(zip(labels, handles, strict=True), key=lambda pair: SWEPT in pair[0]))
    if axes.get_legend():
        axes.get_legend().remove()
    if not below:
        figure.set_figheight(max(figure.get_figheight(), 1 + LEGEND_LINE * len(named)))
    place = {"loc": "outside lower center", "ncols": 4} if below else {"loc": "outside right center"}
    figure.legend(named.values(), named.keys(), frameon=False, fontsize=9, **place)
    return figure


def distance_axis(records: Sequence[Record], name: str | None = None) -> str:
    """Name the axis of the distance, or of another extractor's by its name."""
    return f"{name or records[0].evaluation['distance_name']} (lower is better)"
