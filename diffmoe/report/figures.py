"""The figures, from records alone. Each is a tidy frame (written beside it as CSV) and a function that draws it.

One colour a system, one marker a row. Error bars and bands are the sd over seeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from diffmoe.records import Record
from diffmoe.report.diagnosis import (
    branches,
    branches_data,
    experts,
    experts_data,
    loss_by_noise_level,
    loss_by_noise_level_data,
    thresholds,
    thresholds_data,
)
from diffmoe.report.distances import (
    cost_data,
    distance_against_capacity,
    distance_against_cost,
    distance_against_parameters,
    distances_by_row,
    distances_data,
    points_data,
)
from diffmoe.report.panels import (
    computation,
    computation_data,
    expert_load_data,
    samples,
    samples_data,
    tokens_per_expert,
)
from diffmoe.report.style import draw_lines, finish_figure, row_columns, row_style, start_figure, trainings
from diffmoe.report.table import group_rows

DPI = 150
DRAWN_FROM = "Data digest"
"""Text entry of a PNG."""
MOST_NAMED_CLASSES = 20


def losses_data(records: Sequence[Record]) -> pd.DataFrame:
    """Return the diffusion loss of each training run once, though several rows may share it."""
    return pd.DataFrame([row_columns(record) | {"step": step, "loss": losses["mse"]}
                         for runs in trainings(records) for record in runs
                         for step, losses in record.training["losses"]])


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


def training_loss(records: Sequence[Record]) -> Figure:
    """Draw the diffusion loss of each training, mean and sd over seeds."""
    figure, axes = start_figure(records, "Training loss", "optimiser step",
                                "diffusion loss (mean squared error)", metric=False, sampled=False)
    draw_lines(axes, losses_data(records), "step", "loss", records)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    return finish_figure(figure, axes)


def capacity_by_call(records: Sequence[Record]) -> Figure:
    """Draw the capacity of each sampling call of the dynamic rows (the paper's Figure 1c)."""
    figure, axes = start_figure(records, "Capacity against sampling step", "network call (1: pure noise)",
                                "capacity C: experts a token", metric=False)
    axes.axhline(1, color="0.6", lw=1, zorder=0)
    draw_lines(axes, calls_data(records), "call", "capacity", records)
    return finish_figure(figure, axes)


def capacity_by_class(records: Sequence[Record]) -> Figure:
    """Draw the capacity of each class of the dynamic rows (the paper's Figure 1d); many classes: by rank."""
    data = classes_data(records)
    few = data["class"].nunique() <= MOST_NAMED_CLASSES
    figure, axes = start_figure(records, "Capacity by class", "class" if few else "class, by rank",
                                "capacity C: experts a token", metric=False)
    axes.axhline(1, color="0.6", lw=1, zorder=0)
    if not few:
        data = data.assign(**{"class": data.groupby(["row", "seed"]).capacity.rank(method="first", ascending=False)})
        draw_lines(axes, data, "class", "capacity", records)
        return finish_figure(figure, axes)
    rows = list(dict.fromkeys(data.row))
    for index, (row, group) in enumerate(data.groupby("row", sort=False)):
        found = group.groupby("class").capacity.agg(["mean", "std"])
        offset = 0.14 * (rows.index(row) - (len(rows) - 1) / 2)
        axes.errorbar(found.index + offset, found["mean"], found["std"].fillna(0), label=group.label.iloc[0],
                      ls="", elinewidth=1.2, ms=6, **row_style(row, records), zorder=3 + index)
    axes.set_xticks(sorted(data["class"].unique()))
    axes.grid(False, axis="x")
    return finish_figure(figure, axes)


Frame, Draw = Callable[[Sequence[Record]], pd.DataFrame], Callable[[Sequence[Record]], Figure]
Figures = dict[str, tuple[Frame, Draw]]
FIGURES: Figures = {
    "distances": (distances_data, distances_by_row),
    "distance_vs_activated_params": (points_data, distance_against_parameters),
    "distance_vs_cost": (cost_data, distance_against_cost),
    "distance_vs_capacity": (points_data, distance_against_capacity),
    "training_loss": (losses_data, training_loss),
    "capacity_by_call": (calls_data, capacity_by_call),
    "capacity_by_class": (classes_data, capacity_by_class),
    "tokens_per_expert": (expert_load_data, tokens_per_expert),
    "samples": (samples_data, samples),
    "computation": (computation_data, computation),
    "branches": (branches_data, branches),
    "experts_by_noise_level": (partial(experts_data, of="noise_level"), partial(experts, of="noise_level")),
    "experts_by_class": (partial(experts_data, of="class"), partial(experts, of="class")),
    "thresholds": (thresholds_data, thresholds),
    "loss_by_noise_level": (loss_by_noise_level_data, loss_by_noise_level),
}


def write_figures(records: Sequence[Record], folder: Path, figures: Figures = FIGURES) -> list[Path]:
    """Write each figure that the records have data for as PNG; equal records give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in figures_csv(records, figures).items():
        figure = figures[name][1](records)
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


def figures_csv(records: Sequence[Record], figures: Figures = FIGURES) -> dict[str, str]:
    """Return the data of each figure as CSV text, by the figure's name."""
    frames = {name: frame(records) for name, (frame, _) in figures.items()}
    return {name: frame.to_csv(index=False, lineterminator="\n") for name, frame in frames.items() if not frame.empty}
