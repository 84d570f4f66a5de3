"""Figures of what the networks do inside, from the `diagnosis` of records: gates and branches, who works on what, and
what passes the thresholds. Records that lack it are left out; the page with the means is `diagnosis_page`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from diffmoe.records import Record
from diffmoe.report.style import (
    draw_lines,
    draw_load_bar,
    draw_loads,
    name_figure,
    row_columns,
    scale_note,
    set_theme,
    shared_label,
    trainings,
)
from diffmoe.report.table import group_rows, with_dense

PANELS = {"pair": "weight of a pair, MoE layers", "token": "sum of a token's weights, MoE layers",
          "moe": "share of the stream, blocks with experts (Dense: the same)",
          "dense": "share of the stream, other blocks"}
"""Panels of `branches`."""
LOADS = {"noise_level": "load_by_level", "class": "load_by_class"}
"""Of a figure's axis, the diagnosis's key."""


def mean(values: Any) -> float:
    """Return the mean of nested lists without their Nones; NaN of nothing."""
    found = [value for value in np.ravel(np.asarray(values, dtype=float)) if not math.isnan(value)]
    return fmean(found) if found else math.nan


def branches_data(records: Sequence[Record]) -> pd.DataFrame:
    """Return gate weights and branches' shares by block (from 1), means over noise levels.

    `panel`: one of `PANELS`; a block is among `moe` for all rows where it has experts in any.
    """
    measured = [record for rows in group_rows(records).values() for record in rows if record.diagnosis]
    sparse = {block for record in measured for block, is_moe in enumerate(record.diagnosis["blocks"]["is_moe"], 1)
              if is_moe}
    lines = []
    for record in measured:
        blocks = record.diagnosis["blocks"]
        own = [block for block, is_moe in enumerate(blocks["is_moe"], 1) if is_moe]
        places = [("moe" if block in sparse else "dense", block, share)
                  for block, share in enumerate(blocks["share"], 1)]
        for panel, weights in record.diagnosis.get("gates", {}).items():
            places += [(panel, block, weight) for block, weight in zip(own, weights, strict=True)]
        lines += [row_columns(record) | {"panel": panel, "block": block, "value": mean(values)}
                  for panel, block, values in places]
    return pd.DataFrame(lines)


def branches(records: Sequence[Record]) -> Figure:
    """Draw what multiplies the experts' outputs, and what the feed-forward layers add to the stream, by block."""
    data = branches_data(records)
    panels = [panel for panel in PANELS if panel in set(data.panel)]
    set_theme()
    lines = math.ceil(len(panels) / 2)
    figure, grid = plt.subplots(lines, 2, figsize=(9, 0.9 + 2.6 * lines), squeeze=False, layout="constrained")
    for axes, panel in zip(grid.flat, panels, strict=False):
        part = data[data.panel == panel]
        draw_lines(axes, part, "block", "value", records)
        axes.set(title=PANELS[panel], xlabel="block", ylabel="", xticks=sorted(part.block.unique()))
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    for axes in grid.flat[len(panels):]:
        axes.set_axis_off()
    return _finish(figure, records, "Gates and branches, mean over noise levels")


def experts_data(records: Sequence[Record], of: str) -> pd.DataFrame:
    """Return pairs a token by layer, expert and noise level or class (`of`), by the training rule.

    Of each training's first seed: two seeds order experts differently.
    """
    key = LOADS[of]
    measured = [record for record in records if key in record.diagnosis]
    lines = []
    for record, *_ in trainings(measured) if measured else ():
        places = record.diagnosis["noise_levels"] if of == "noise_level" else range(len(record.diagnosis[key][0][0]))
        lines += [row_columns(record) | {"layer": layer, "expert": expert, of: place, "load": load}
                  for layer, experts in enumerate(record.diagnosis[key], 1) for expert, loads in enumerate(experts, 1)
                  for place, load in zip(places, loads, strict=True)]
    return pd.DataFrame(lines)


def experts(records: Sequence[Record], of: str) -> Figure:
    """Draw the load of every expert of the first, middle and last layer by noise level or class (`of`)."""
    data = experts_data(records, of)
    labels = list(dict.fromkeys(data.label))
    last = data.layer.max()
    layers = sorted({1, (1 + last) // 2, last})
    set_theme()
    height = 0.5 + min(0.11 * data.expert.nunique(), 3, max(0.7, 11 / len(labels)))
    figure, grid = plt.subplots(len(labels), len(layers), figsize=(9, 1.1 + height * len(labels)), squeeze=False,
                                layout="constrained")
    for label, line in zip(labels, grid, strict=True):
        for layer, axes in zip(layers, line, strict=True):
            part = data[(data.label == label) & (data.layer == layer)]
            table = part.pivot(index="expert", columns=of, values="load") / part.load.mean()
            if of == "noise_level":  # experts in the order of their mean level; an idle one has none
                centre = (table * table.columns).sum(axis=1) / table.sum(axis=1)
                table = table.loc[centre.sort_values(kind="stable").index, ::-1]
            draw_loads(axes, table)
            bottom = label == labels[-1]
            axes.set(xlabel=f"{of.replace('_', ' ')}, MoE layer {layer}" if bottom else "", ylabel="", yticks=[])
            axes.set_title(label if layer == 1 else "", fontsize=9, loc="left")
            axes.tick_params(labelsize=8, labelbottom=bottom, rotation=0)
    draw_load_bar(figure, grid)
    figure.suptitle(f"Which expert takes which {of.replace('_', ' ')}: a line an expert, by the training rule\n"
                    f"{scale_note(records, metric=False, sampled=False)}, seed {data.seed.min()}", x=0.01, ha="left",
                    fontsize=11)
    return figure


def thresholds_data(records: Sequence[Record]) -> pd.DataFrame:
    """Return precision and recall of the pairs above the threshold by noise level, means over layers."""
    lines = []
    for record in (record for rows in _distinct(records, "passes") for record in rows):
        parts = record.diagnosis["passes"]
        for place, level in enumerate(record.diagnosis["noise_levels"]):
            lines.append(row_columns(record) | {"noise_level": level} | {
                name: mean([layer[place] for layer in parts[name]]) for name in ("precision", "recall")})
    return pd.DataFrame(lines)


def thresholds(records: Sequence[Record]) -> Figure:
    """Draw how well the pairs above the threshold, each for itself, are those that the training rule takes."""
    data = thresholds_data(records)
    set_theme()
    figure, grid = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axes, name in zip(grid, ("precision", "recall"), strict=True):
        draw_lines(axes, data, "noise_level", name, records)
        axes.set(title=name, xlabel="noise level (1: pure noise)", ylabel="", xlim=(1, 0))
    return _finish(figure, records, "What passes the threshold, against the choice of the training rule")


def with_dense_on_one_batch(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Return pairs of `with_dense` whose averaged networks' losses were measured on the same batch."""
    measured = [record for record in records if "loss" in record.diagnosis]
    return [(record, dense) for record, dense in with_dense(measured)
            if record.diagnosis["batch"] == dense.diagnosis["batch"]]


def loss_by_noise_level_data(records: Sequence[Record]) -> pd.DataFrame:
    """Return the averaged networks' diffusion loss by noise level, and by how many percent it is above Dense's."""
    lines = []
    for record, dense in with_dense_on_one_batch([record for rows in _distinct(records, "loss") for record in rows]):
        lines += [row_columns(record) | {"noise_level": level, "loss": loss, "to_dense": 100 * (loss / other - 1)}
                  for level, loss, other in zip(record.diagnosis["noise_levels"], record.diagnosis["loss"],
                                                dense.diagnosis["loss"], strict=True)]
    return pd.DataFrame(lines)


def loss_by_noise_level(records: Sequence[Record]) -> Figure:
    """Draw each row's loss against Dense's of the same seed, images and noise, by noise level."""
    data = loss_by_noise_level_data(records)
    set_theme()
    figure, axes = plt.subplots(figsize=(7, 4.8), layout="constrained")
    axes.axhline(0, color="0.4", lw=1, zorder=0)
    draw_lines(axes, data, "noise_level", "to_dense", records)
    axes.set(xlabel="noise level (1: pure noise)", ylabel="loss against Dense's, % (lower is better)", xlim=(1, 0))
    paired = [record for record, _ in with_dense_on_one_batch(records)]
    return _finish(figure, paired, "Diffusion loss of the averaged networks, by their inference rule")


def _finish(figure: Figure, records: Sequence[Record], title: str) -> Figure:
    """Put the title over the panels and one legend below them."""
    named: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
        if axes.get_legend():
            axes.get_legend().remove()
        axes.title.set_fontsize(10)
    sns.despine(figure)
    figure.legend(named.values(), named.keys(), frameon=False, fontsize=9, loc="outside lower center", ncols=4)
    measured = [record for record in records if record.diagnosis]
    name_figure(figure, measured, title, metric=False, sampled=False)
    return figure


def _distinct(records: Sequence[Record], key: str) -> list[list[Record]]:
    """Return the records of each row whose diagnosis has `key`, of rows that have the same in it the first.

    Rows of one training do, and go by what their labels share; a later one may have some of the seeds alone.
    """
    found: list[tuple[set[str], list[Record], list[str]]] = []
    for rows in group_rows(records).values():
        measured = [record for record in rows if key in record.diagnosis]
        contents = {json.dumps((record.training_digest, record.seed, record.diagnosis[key])) for record in measured}
        same = [labels for others, _, labels in found if contents <= others]
        if measured and same:
            same[0].append(rows[0].label)
        elif measured:
            found.append((contents, measured, [rows[0].label]))
    return [[replace(record, label=shared_label(labels)) for record in measured] for _, measured, labels in found]
