"""The figures of the ablations: what each value of an axis does and costs, and a heat map for two axes."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from diffmoe.report.figures import DPI, DRAWN_FROM
from diffmoe.report.style import COLOURS, set_theme

ACCENT, PLAIN = COLOURS["diffmoe"], COLOURS["expert_choice"]
DOT = "#b0b0b0"
EFFECTS = {"effect": "{distance}, % above\nthe default's mean (left is better)",
           "loss_effect": "training loss, % above\nthe default's of the same seed"}
"""What is drawn seed by seed."""
COSTS = {"capacity": "C: experts a token", "activated_params": "activated, M", "seconds": "seconds a run"}
NOTE_WIDTH = 130


def draw_axis(data: pd.DataFrame, title: str, note: str, distance: str) -> Figure:
    """Draw each value's effect on the distance and the loss with its seeds, beside its capacity, size and time.

    Args:
        data: one line a value and seed, as `axis_data` makes it.
        note: how the numbers were measured.
        distance: name of the distance.
    """
    data = data.assign(**{name: 100 * data[name] for name in EFFECTS}, activated_params=data.activated_params / 1e6,
                       seconds=data.training_s + data.sampling_s)
    set_theme()
    labels = list(dict.fromkeys(data.label))
    effects = {column: name for column, name in EFFECTS.items() if data[column].notna().any()}  # some axes never train
    figure, panels = plt.subplots(1, len(effects) + len(COSTS), sharey=True, layout="constrained",
                                  figsize=(12, 1.9 + 0.38 * len(labels)), width_ratios=[
                                      *(2.6, 1.6)[:len(effects)], *[1] * len(COSTS)])
    for axes, (column, name) in zip(panels, effects.items(), strict=False):
        sns.stripplot(data, x=column, y="label", order=labels, color=DOT, size=5, jitter=False, ax=axes, zorder=2)
        for place, label in enumerate(labels):
            group = data[data.label == label]
            axes.errorbar(group[column].mean(), place, xerr=group[column].std() if len(group) > 1 else None, marker="D",
                          ms=6, elinewidth=1.6, color=_colour(group), zorder=3)
        axes.axvline(0, color=ACCENT, lw=1, ls="--", zorder=1)
        if not data[column].abs().max() > 0:
            axes.set_xlim(-1, 1)  # per cent
        axes.set(xlabel=name.format(distance=distance), ylabel="")
    for axes, (column, name) in zip(panels[len(effects):], COSTS.items(), strict=True):
        means = data.groupby("label", sort=False)[column].mean()
        colours = [_colour(data[data.label == label]) for label in labels]
        axes.barh(range(len(labels)), means[labels], height=0.6, color=colours, alpha=0.55)
        for place, value in enumerate(means[labels]):
            axes.annotate(f"{value:.3g}", (value, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set(xlabel=name, ylabel="")
        axes.margins(x=0.3)
        axes.grid(False, axis="y")
        axes.tick_params(axis="x", labelsize=8)
    return _finish(figure, panels[0], data, labels, title, note)


def draw_grid(data: pd.DataFrame, title: str, note: str, distance: str) -> Figure:
    """Draw the effect of two axes' values together; the default is framed, what cannot be configured is blank.

    Args:
        data: one line a pair, as `grid_data` makes it: the first two columns are the axes' values.
        note: how the numbers were measured.
        distance: name of the distance.
    """
    first, second = data.columns[:2]
    rows, columns = list(dict.fromkeys(data[first])), list(dict.fromkeys(data[second]))
    table = 100 * data.pivot(index=first, columns=second, values="effect").loc[rows, columns]
    set_theme()
    figure, axes = plt.subplots(figsize=(3.5 + 1.1 * len(columns), 2.2 + 0.5 * len(rows)), layout="constrained")
    sns.heatmap(table, annot=True, fmt="+.1f", cmap="vlag", center=0, linewidths=0.5, ax=axes,
                cbar_kws={"label": f"{distance}, % above the default's"})
    for default in data[data.default].itertuples(index=False):
        corner = columns.index(default[1]), rows.index(default[0])
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", lw=2))
    axes.set(xlabel=second.replace("_", " "), ylabel=first.replace("_", " "))
    axes.tick_params(axis="y", rotation=0)
    figure.suptitle(_heading(title, note, 90), x=0.01, ha="left", fontsize=10)
    return figure


def save_figure(figure: Figure, path: Path, drawn_from: str) -> Path:
    """Write a figure as PNG that carries the digest of its data, and return its path."""
    figure.savefig(path, dpi=DPI, metadata={"Software": None, DRAWN_FROM: drawn_from})
    plt.close(figure)
    return path


def _finish(figure: Figure, axes: Axes, data: pd.DataFrame, labels: list[str], title: str, note: str) -> Figure:
    axes.set_yticks(range(len(labels)), labels)
    for tick, label in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set_fontweight("bold" if data[data.label == label].default.any() else "normal")
    sns.despine(figure)
    figure.suptitle(_heading(title, f"{note} Diamonds: mean ± sd; dots: seeds. Bold: the default. ★: the paper's "
                             "choice.", NOTE_WIDTH), x=0.01, ha="left", fontsize=10)
    return figure


def _heading(title: str, note: str, width: int) -> str:
    return "\n".join([title, *textwrap.wrap(note, width)])


def _colour(group: pd.DataFrame) -> str:
    return ACCENT if group.default.any() else PLAIN
