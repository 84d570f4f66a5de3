"""Figures made of panels, a line or panel a row of the table: tokens per expert, samples, computation of each patch."""

from __future__ import annotations

import hashlib
import math
import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from diffmoe.evaluation.grid import decode_examples
from diffmoe.records import Record
from diffmoe.report.style import draw_load_bar, draw_loads, row_columns, scale_note, set_theme
from diffmoe.report.table import group_rows

MAPS = ("all calls", "first third", "middle third", "last third")
"""Panels of the mean computation, by time: sampling starts at pure noise."""
EXAMPLE = "example"
EXAMPLES_DRAWN = 4
"""Images whose own computation is drawn, each of another class."""
LABEL_WIDTH = 18
"""Letters of a row's label on one line."""


def expert_load_data(records: Sequence[Record]) -> pd.DataFrame:
    """Return pairs a token of each layer and expert, of each row's first seed: two seeds order experts differently."""
    firsts = [rows[0] for rows in group_rows(records).values() if "expert_load" in rows[0].activation]
    return pd.DataFrame([row_columns(record) | {"layer": layer, "expert": expert, "load": load} for record in firsts
                         for layer, loads in enumerate(record.activation["expert_load"], 1)
                         for expert, load in enumerate(loads, 1)])


def samples_data(records: Sequence[Record]) -> pd.DataFrame:
    """Return a line for each example image of each row's first seed: its class and the digest of its pixels."""
    return pd.DataFrame([row_columns(record) | {"image": place, "class": label, "pixels": _digest(pixels)}
                         for record in _exemplary(records)
                         for place, (label, pixels) in enumerate(_examples(record), 1)])


def computation_data(records: Sequence[Record]) -> pd.DataFrame:
    """Return experts a token by row and column of patches, for rows in which some place gets more than another.

    `panel`: one of `MAPS` (mean over images and seeds, `seed` is empty), or `example` with an image's class and pixels.
    """
    lines = []
    for rows in group_rows(records).values():
        measured = [record for record in rows if _is_mapped(record)]
        if not measured or all(np.ptp(record.activation["load_by_position"]) < 1e-3 for record in measured):
            continue
        columns = row_columns(measured[0])
        thirds = np.mean([record.activation["load_by_third"] for record in measured], 0)
        loads = [np.mean([record.activation["load_by_position"] for record in measured], 0),
                 *(thirds if len(thirds) == len(MAPS) - 1 else ())]  # fewer than three calls have no thirds
        for name, load in zip(MAPS, loads, strict=False):
            lines += _patches(columns | {"seed": None, "panel": name, "class": None, "pixels": None}, load)
        for index, label, pixels in _one_a_class(measured[0]):
            lines += _patches(columns | {"panel": EXAMPLE, "class": label, "pixels": _digest(pixels)},
                              measured[0].examples["token_load"][index])
    return pd.DataFrame(lines).astype({"seed": "Int64", "class": "Int64"}) if lines else pd.DataFrame()


def _is_mapped(record: Record) -> bool:
    return "load_by_position" in record.activation


def _patches(columns: dict[str, object], load: Sequence[float]) -> list[dict[str, object]]:
    side = math.isqrt(len(load))
    return [columns | {"y": index // side, "x": index % side, "load": round(float(value), 6)}
            for index, value in enumerate(load)]


def _exemplary(records: Sequence[Record]) -> list[Record]:
    """Return the first record of each row that holds example images."""
    found = (next((record for record in rows if record.examples), None) for rows in group_rows(records).values())
    return [record for record in found if record is not None]


def _examples(record: Record) -> list[tuple[int, np.ndarray]]:
    return list(zip(record.examples["labels"], decode_examples(record.examples), strict=True))


def _one_a_class(record: Record) -> list[tuple[int, int, np.ndarray]]:
    """Return index, class and pixels of the first example of each of the first classes."""
    if not record.examples:
        return []
    firsts = {label: (index, label, pixels) for index, (label, pixels) in reversed(list(enumerate(_examples(record))))}
    return [firsts[label] for label in sorted(firsts)][:EXAMPLES_DRAWN]


def _digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()[:12]


def tokens_per_expert(records: Sequence[Record]) -> Figure:
    """Draw the load of every expert of every layer, 1 where all work alike; the first seed of each row."""
    data = expert_load_data(records)
    data["share"] = data.load / data.groupby(["row", "layer"]).load.transform("mean")
    labels = list(dict.fromkeys(data.label))
    columns = min(4, len(labels))
    lines = math.ceil(len(labels) / columns)
    layers = data.layer.nunique()
    set_theme()
    size = (9, 0.9 + lines * (0.75 + min(0.35 * layers, 3)))
    figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for index, (axes, label) in enumerate(zip(grid.flat, labels, strict=False)):
        table = data[data.label == label].pivot(index="layer", columns="expert", values="share")
        draw_loads(axes, table, linewidth=0.5, edgecolor="0.8")
        axes.set_title(label, fontsize=9)
        left, bottom = index % columns == 0, index // columns == lines - 1
        axes.set(xlabel="expert" if bottom else "", ylabel="MoE layer" if left else "")
        axes.tick_params(labelsize=8, labelbottom=bottom, labelleft=left)
    for axes in grid.flat[len(labels):]:
        axes.set_axis_off()
    draw_load_bar(figure, grid)
    _title(figure, "Tokens per expert at inference", f"{scale_note(records, metric=False)}, seed {data.seed.min()}")
    return figure


def samples(records: Sequence[Record]) -> Figure:
    """Draw the first images of each class, a strip a row; the same column has the same class and starting noise."""
    exemplary = _exemplary(records)
    set_theme()
    size = (9, 1 + 0.46 * len(exemplary))
    figure, grid = plt.subplots(len(exemplary), 1, figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.03, hspace=0)
    for index, (axes, record) in enumerate(zip(grid.flat, exemplary, strict=True)):
        labels, images = zip(*_examples(record), strict=True)
        gap = max(1, images[0].shape[0] // 16)
        framed = [_framed(image, gap, gap if label == before else 3 * gap)
                  for image, label, before in zip(images, labels, (labels[0], *labels), strict=False)]
        _picture(axes, np.concatenate(framed, 1), record.label)
        if index == 0:
            ends = pd.Series(np.cumsum([image.shape[1] for image in framed]))
            centres = (ends - gap - images[0].shape[1] / 2 - 0.5).groupby(list(labels)).mean()
            axes.set_xticks(centres, [str(label) for label in centres.index], fontsize=9)
            axes.tick_params(top=False, labeltop=True, bottom=False, labelbottom=False, pad=1)
            axes.set_xlabel("class", fontsize=9)
            axes.xaxis.set_label_position("top")
    _title(figure, "The first images of each class", f"scale {records[0].scale}, training seed {exemplary[0].seed}; "
           "a column has one class and one starting noise")
    return figure


def _framed(image: np.ndarray, gap: int, left: int) -> np.ndarray:
    return np.pad(image, [(gap, gap), (left, gap), *[(0, 0)] * (image.ndim - 2)], constant_values=255)


def computation(records: Sequence[Record]) -> Figure:
    """Draw how many experts work at each place: the mean, by time, and beside single images as they were drawn."""
    data = computation_data(records)
    rows = list(dict.fromkeys(data.row))
    examples = {record.row: _one_a_class(record) for record in _exemplary(records) if record.row in rows}
    maps = [name for name in MAPS if name in set(data.panel)]
    num_pictures = 2 * max(map(len, examples.values()), default=0)
    set_theme()
    figure, grid = plt.subplots(len(rows), len(maps) + 1 + num_pictures, figsize=(9, 1.7 + 0.62 * len(rows)),
                                width_ratios=[*[1] * len(maps), 0.15, *[1] * num_pictures], squeeze=False,
                                layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    for axes in grid.flat:
        axes.set_axis_off()
    left, right = grid[:, :len(maps)], grid[:, len(maps) + 1:]
    means, singles = data[data.panel != EXAMPLE], data[data.panel == EXAMPLE]
    mean_scale, single_scale = (Normalize(part.load.min(), part.load.max()) for part in (means, singles))
    for line, row in enumerate(rows):
        here = data[data.row == row]
        for axes, name in zip(left[line], maps, strict=True):
            _load(axes, here[here.panel == name], mean_scale)
        for index, (_, label, pixels) in enumerate(examples.get(row, [])):
            drawn, load = right[line, 2 * index:2 * index + 2]
            _picture(drawn, pixels, "")
            _load(load, here[(here.panel == EXAMPLE) & (here["class"] == label)], single_scale)
            if line == 0:
                drawn.set_title(f"class {label}:\ndrawn", fontsize=8)
                load.set_title("its\nload", fontsize=8)
        _label(left[line, 0], here.label.iloc[0])
    for axes, name in zip(left[0], maps, strict=True):
        axes.set_title(name.replace(" ", "\n"), fontsize=8)
    _bar(figure, left, mean_scale, "experts per token, mean of all images")
    if num_pictures:
        _bar(figure, right, single_scale, "experts per token of one image, all calls")
    seeds = sorted({record.seed for record in records if _is_mapped(record)})
    mean = f"mean over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    images = f"; images: seed {singles.seed.min()}" if num_pictures else ""
    _title(figure, "Where the computation goes: experts per token, by patch",
           f"{scale_note(records, metric=False)}, {mean}{images}; thirds of the sampling calls")
    return figure


def _bar(figure: Figure, grid: np.ndarray, scale: Normalize, label: str) -> None:
    bar = figure.colorbar(ScalarMappable(scale, "viridis"), ax=grid, location="bottom", aspect=40, fraction=0.03,
                          shrink=0.9, pad=0.02)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _title(figure: Figure, title: str, note: str) -> None:
    figure.suptitle(f"{title}\n{note}", x=0.01, ha="left", fontsize=11)


def _picture(axes: Axes, pixels: np.ndarray, label: str) -> None:
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
    _bare(axes)
    _label(axes, label)


def _load(axes: Axes, patches: pd.DataFrame, scale: Normalize) -> None:
    axes.imshow(patches.pivot(index="y", columns="x", values="load"), cmap="viridis", norm=scale)
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.set_axis_on()
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    sns.despine(ax=axes, left=True, bottom=True)


def _label(axes: Axes, label: str) -> None:
    lines = textwrap.fill(label, LABEL_WIDTH, break_on_hyphens=False)
    axes.set_ylabel(lines, rotation=0, ha="right", va="center", fontsize=9)
