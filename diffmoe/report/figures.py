"""The figures, from records alone. Each is a tidy frame (written beside it as CSV) and a function that draws it.

One colour a system, one marker a row. Error bars and bands are the sd over seeds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image

from diffmoe.records import Record
from diffmoe.report.panels import (
    computation,
    computation_data,
    expert_load_data,
    samples,
    samples_data,
    tokens_per_expert,
)
from diffmoe.report.style import SYSTEMS, row_columns, scale_note, set_theme, system_colour
from diffmoe.report.table import group_rows

MARKERS, DASHES = ("o", "s", "^", "D", "v", "P"), ((), (4, 1.5), (1, 1.2), (5, 1, 1, 1), (3, 1, 1, 1, 1, 1), (2, 2))
SWEPT = "threshold swept"
DPI = 150
FEW_TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
MANY_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.4, 1.7, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10)
"""Of a logarithmic axis that spans a factor of 5 at most."""
DRAWN_FROM = "Data digest"
"""Text entry of a PNG."""
MOST_NAMED_CLASSES = 20


def points_data(records: Sequence[Record]) -> pd.DataFrame:
    """Return one line a record, and one a threshold of its sweep (`threshold` is empty for the record's own point)."""
    lines = []
    for record in (record for rows in group_rows(records).values() for record in rows):
        own = record.activation | {"threshold": math.nan, "distance": record.metrics["distance"]}
        for point in (own, *record.threshold_sweep):
            lines.append(row_columns(record) | {"training_digest": record.training_digest} | {
                key: point[key] for key in ("threshold", "capacity", "activated_params", "distance")})
    return pd.DataFrame(lines)


def losses_data(records: Sequence[Record]) -> pd.DataFrame:
    """Return the diffusion loss of each training run once, though several rows may share it."""
    runs = {(record.training_digest, record.seed): record for rows in group_rows(records).values() for record in rows}
    trainings: dict[str, set[str]] = {}
    for record in runs.values():
        trainings.setdefault(record.system, set()).add(record.training_digest)
    lines = []
    for record in runs.values():
        alone = len(trainings[record.system]) == 1
        columns = row_columns(record) | {"label": SYSTEMS.get(record.system, record.system) if alone else record.label}
        lines += [columns | {"step": step, "loss": losses["mse"]} for step, losses in record.training["losses"]]
    return pd.DataFrame(lines)


def calls_data(records: Sequence[Record]) -> pd.DataFrame:
    """Return the capacity of each sampling call (from 1) of the rows whose capacity moves."""
    return pd.DataFrame([row_columns(record) | {"call": call, "capacity": capacity} for record in _dynamic(records)
                         for call, capacity in enumerate(record.activation["capacity_by_call"], 1)])


def classes_data(records: Sequence[Record]) -> pd.DataFrame:
    """Return the capacity of each class of the rows whose capacity moves."""
    return pd.DataFrame([row_columns(record) | {"class": label, "capacity": capacity} for record in _dynamic(records)
                         for label, capacity in enumerate(record.activation["capacity_by_class"])])


def _dynamic(records: Sequence[Record]) -> list[Record]:
    """Return the records of rows where some image, call or class got another capacity than the rest."""
    def moves(record: Record) -> bool:
        series = (record.activation.get(key, [0.0]) for key in ("capacity_by_call", "capacity_by_class"))
        return any(max(values) - min(values) > 1e-4 for values in series)

    return [record for rows in group_rows(records).values() if any(map(moves, rows)) for record in rows]


def distance_against_parameters(records: Sequence[Record]) -> Figure:
    """Draw distance against activated parameters: a point a row, a curve through a system's sizes."""
    data = points_data(records)
    figure, axes = _start(records, "Distance against activated parameters",
                          "activated parameters, M (paper's count, measured)", _distance_axis(records))
    data["activated_params"] /= 1e6
    for system, group in data[data.threshold.isna()].groupby("system", sort=False):
        sizes = group.groupby("row")[["activated_params", "distance"]].mean().sort_values("activated_params")
        if group.training_digest.nunique() == len(sizes) > 1:
            axes.plot(sizes.activated_params, sizes.distance, color=system_colour(system, records), lw=1.2, zorder=1)
    _row_points(axes, data, "activated_params", records)
    _sweeps(axes, data, "activated_params", records)
    return _finish(figure, axes)


def distance_against_capacity(records: Sequence[Record]) -> Figure:
    """Draw each swept checkpoint's distance as one global threshold moves its capacity (the paper's Figure 7)."""
    data = points_data(records)
    figure, axes = _start(records, "One checkpoint, many capacities: a global threshold is swept",
                          "capacity C: experts a token, measured; small numbers: the threshold",
                          _distance_axis(records))
    axes.set_xscale("log")
    _row_points(axes, data, "capacity", records)
    _sweeps(axes, data, "capacity", records, named=True)
    axes.margins(y=0.1)
    low, high = axes.get_xlim()
    ticks = [tick for tick in (FEW_TICKS if high > 5 * low else MANY_TICKS) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    return _finish(figure, axes)


def training_loss(records: Sequence[Record]) -> Figure:
    """Draw the diffusion loss of each training, mean and sd over seeds."""
    figure, axes = _start(records, "Training loss", "optimiser step",
                          "diffusion loss (mean squared error)", metric=False, sampled=False)
    _lines(axes, losses_data(records), "step", "loss", records)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    return _finish(figure, axes)


def capacity_by_call(records: Sequence[Record]) -> Figure:
    """Draw the capacity of each sampling call of the dynamic rows (the paper's Figure 1c)."""
    figure, axes = _start(records, "Capacity against sampling step", "network call (1: pure noise)",
                          "capacity C: experts a token", metric=False)
    axes.axhline(1, color="0.6", lw=1, zorder=0)
    _lines(axes, calls_data(records), "call", "capacity", records)
    return _finish(figure, axes)


def capacity_by_class(records: Sequence[Record]) -> Figure:
    """Draw the capacity of each class of the dynamic rows (the paper's Figure 1d); many classes: by rank."""
    data = classes_data(records)
    few = data["class"].nunique() <= MOST_NAMED_CLASSES
    figure, axes = _start(records, "Capacity by class", "class" if few else "class, by rank",
                          "capacity C: experts a token", metric=False)
    axes.axhline(1, color="0.6", lw=1, zorder=0)
    if not few:
        data = data.assign(**{"class": data.groupby(["row", "seed"]).capacity.rank(method="first", ascending=False)})
        _lines(axes, data, "class", "capacity", records)
        return _finish(figure, axes)
    rows = list(dict.fromkeys(data.row))
    for index, (row, group) in enumerate(data.groupby("row", sort=False)):
        found = group.groupby("class").capacity.agg(["mean", "std"])
        offset = 0.14 * (rows.index(row) - (len(rows) - 1) / 2)
        axes.errorbar(found.index + offset, found["mean"], found["std"].fillna(0), label=group.label.iloc[0],
                      ls="", elinewidth=1.2, ms=6, **_style(row, records), zorder=3 + index)
    axes.set_xticks(sorted(data["class"].unique()))
    axes.grid(False, axis="x")
    return _finish(figure, axes)


Frame, Draw = Callable[[Sequence[Record]], pd.DataFrame], Callable[[Sequence[Record]], Figure]
FIGURES: dict[str, tuple[Frame, Draw]] = {
    "distance_vs_activated_params": (points_data, distance_against_parameters),
    "distance_vs_capacity": (points_data, distance_against_capacity),
    "training_loss": (losses_data, training_loss),
    "capacity_by_call": (calls_data, capacity_by_call),
    "capacity_by_class": (classes_data, capacity_by_class),
    "tokens_per_expert": (expert_load_data, tokens_per_expert),
    "samples": (samples_data, samples),
    "computation": (computation_data, computation),
}


def write_figures(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write each figure that the records have data for as PNG; equal records give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in figures_csv(records).items():
        figure = FIGURES[name][1](records)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI, metadata={"Software": None, DRAWN_FROM: data_digest(text)})
        plt.close(figure)
    return paths


def data_digest(text: str) -> str:
    """Return the digest of a figure's data that its picture carries."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def drawn_from(picture: Path) -> str | None:
    """Return the digest of the data that a picture was drawn from; None for one that is not from here or damaged."""
    try:
        with Image.open(picture) as image:
            return image.info.get(DRAWN_FROM)
    except (OSError, SyntaxError):  # Pillow's word for a damaged PNG
        return None


def figures_csv(records: Sequence[Record]) -> dict[str, str]:
    """Return the data of each figure as CSV text, by the figure's name."""
    frames = {name: frame(records) for name, (frame, _) in FIGURES.items()}
    return {name: frame.to_csv(index=False, lineterminator="\n") for name, frame in frames.items() if not frame.empty}


def _start(records: Sequence[Record], title: str, x: str, y: str, *, metric: bool = True,
           sampled: bool = True) -> tuple[Figure, Axes]:
    set_theme()
    figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    seeds = sorted({record.seed for record in records})
    spread = f"mean ± sd over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    note = scale_note(records, metric=metric, sampled=sampled)
    figure.suptitle(f"{title}\n{note}, {spread}", x=0.01, ha="left", fontsize=11)
    return figure, axes


def _distance_axis(records: Sequence[Record]) -> str:
    return f"{records[0].evaluation['distance_name']} (lower is better)"


def _finish(figure: Figure, axes: Axes) -> Figure:
    sns.despine(figure)
    handles, labels = axes.get_legend_handles_labels()
    named = dict(sorted(zip(labels, handles, strict=True), key=lambda pair: SWEPT in pair[0]))
    if axes.get_legend():
        axes.get_legend().remove()
    figure.legend(named.values(), named.keys(), loc="outside right center", frameon=False, fontsize=9)
    return figure


def _style(row: str, records: Sequence[Record]) -> dict[str, str]:
    rows = group_rows(records)
    system = rows[row][0].system
    place = [name for name, same in rows.items() if same[0].system == system].index(row)
    return {"color": system_colour(system, records), "marker": MARKERS[place % len(MARKERS)]}


def _row_points(axes: Axes, data: pd.DataFrame, x: str, records: Sequence[Record]) -> None:
    own = data[data.threshold.isna()]
    for row in group_rows(records):
        group = own[own.row == row]
        spread = group[[x, "distance"]].std().fillna(0)
        axes.errorbar(group[x].mean(), group.distance.mean(), xerr=spread[x], yerr=spread.distance, ls="", ms=7,
                      elinewidth=1.2, mec="white", mew=0.6, label=group.label.iloc[0], zorder=4,
                      **_style(row, records))


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


def _lines(axes: Axes, data: pd.DataFrame, x: str, y: str, records: Sequence[Record]) -> None:
    firsts = data.drop_duplicates("label")
    palette = {line.label: system_colour(line.system, records) for line in firsts.itertuples()}
    place = firsts.groupby("system").cumcount()
    dashes = {label: DASHES[index % len(DASHES)] for label, index in zip(firsts.label, place, strict=True)}
    sns.lineplot(data, x=x, y=y, hue="label", style="label", palette=palette, dashes=dashes, errorbar="sd", ax=axes,
                 lw=1.6)
