"""Budgets: trainings are measured after several numbers of images; each budget is a report, this is the page across.

A budget is `evaluation.budget_images`, or the whole run; a longer run of a row's settings is one more. Its report lies
in a subfolder named by its optimiser steps; records of one budget need none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from diffmoe.config import ConfigError, RunConfig, digest, from_dict
from diffmoe.records import Record
from diffmoe.report.cost import cost_seconds
from diffmoe.report.style import distance_axis, finish_figure, floor_line, row_columns, row_style, start_figure
from diffmoe.report.table import group_rows, mean_sd, protocol, require_one_protocol, row_order
from diffmoe.report.table1 import format_table
from diffmoe.report.verdicts import of_claims


def by_budget(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the records of each budget, smallest first, by the name of its subfolder; of one budget alone under "".

    Raises:
        ConfigError: for records of several budgets that cannot stand on one page, or of a row that was trained anew.
    """
    found = {(record.row, record.training["images"]) for record in records}
    if (len({record.config["evaluation"].get("budget_images") for record in records}) <= 1
            and len(found) == len({row for row, _ in found})):
        return {"": list(records)}
    require_one_protocol(records)
    trainings: dict[str, Record] = {}
    budgets: dict[int, list[Record]] = {}
    for record in records:
        first = trainings.setdefault(record.row, record)
        if first.training_digest != record.training_digest and _settings(first) != _settings(record):
            raise ConfigError(f"row {record.row}: budgets of two trainings, {first.training_digest} in {first.id} and "
                              f"{record.training_digest} in {record.id}; report them in separate folders")
        budgets.setdefault(record.training["images"], []).append(record)
    if len(budgets) == 1:
        return {"": list(records)}
    return {_name(images, budgets[images]): budgets[images] for images in sorted(budgets)}


def _settings(record: Record) -> str:
    """Name what a record's training computes, however long: at a constant rate no step depends on those that follow."""
    config = from_dict(RunConfig, record.config)
    endless = replace(config.training, num_images=config.training.batch_size * 10**9, budgets=())
    whole = replace(config.evaluation, budget_images=None)
    return digest(replace(config, training=endless, evaluation=whole), scope="training")


def _name(images: int, records: Sequence[Record]) -> str:
    steps = {record.training["steps"] for record in records}
    return f"{steps.pop()}-steps" if len(steps) == 1 else f"{images}-images"  # batches of several sizes


def budgets_data(records: Sequence[Record]) -> pd.DataFrame:
    """Return one line a record: its distance, and the images and steps that its training had seen.

    Only rows that a claim names, if there are any: twenty rows' lines would hide them.
    """
    ordered = sorted(of_claims(records) or records,
                     key=lambda record: (row_order(record.row), record.training["images"], record.seed))
    return pd.DataFrame([row_columns(record) | {key: record.training[key] for key in ("images", "steps")} | {
        "distance": record.metrics["distance"]} for record in ordered])


def distance_against_budget(records: Sequence[Record]) -> Figure:
    """Draw distance against training images, a line a row, both axes logarithmic."""
    data = budgets_data(records)
    figure, axes = start_figure(records, "Distance against training images", "training images, M",
                                distance_axis(records))
    for row, group in data.groupby("row", sort=False):
        found = group.groupby("images").distance.agg(["mean", "std"]).fillna(0)
        axes.errorbar(found.index / 1e6, found["mean"], found["std"], label=group.label.iloc[0], lw=1.4,
                      elinewidth=1.2, ms=6, mec="white", mew=0.6, **row_style(row, records))
    axes.set(xscale="log", yscale="log")
    budgets = sorted(data.images.unique() / 1e6)
    axes.set_xticks(budgets, [f"{images:.4g}" for images in budgets])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7), numticks=20))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_yticks([], minor=True)
    floor_line(axes, records)
    return finish_figure(figure, axes)


def budgets_markdown(records: Sequence[Record]) -> str:
    """Return the distances of all rows at all budgets, and what each budget cost.

    Raises:
        ConfigError: as `by_budget` and `group_rows` do.
    """
    budgets = by_budget(records)
    rows = {name: group_rows(same) for name, same in budgets.items()}
    labels = {record.row: record.label for record in records}
    distances = [["system", *(_heading(same) for same in budgets.values())]]
    distances += [[labels[row], *(_distance(rows[name].get(row, [])) for name in budgets)]
                  for row in sorted(labels, key=row_order)]
    costs = [_cost(same) for same in budgets.values()]
    header = ["budget", "report", "images", "records", *(f"{part}, min" for part in costs[0])]
    cost_lines = [[_heading(same), f"[{name}]({name}/table.md)", f"{same[0].training['images']:,}", str(len(same)),
                   *cost.values()] for (name, same), cost in zip(budgets.items(), costs, strict=True)]
    total = sum(cost_seconds(records).values()) / 60
    return f"""{format_table(distances)}

Mean ± sd over seeds (their number). Scale {records[0].scale}. {protocol(records)}
{_trainings(records)}

{format_table([header, *cost_lines])}

Training: from the start to the budget, a training that rows share counted once. All {len(records)} records, each
training once to its largest budget: {total:.1f} minutes, one after another.

{_trends(list(budgets.values()))}"""


def _trends(budgets: Sequence[Sequence[Record]]) -> str:
    """Return how the distances fell from each budget to the next, where a straight line leads, and what came of it."""
    tables = []
    for before, last in itertools.pairwise(budgets):
        factor = last[0].training["images"] / before[0].training["images"]
        steps = round(factor * last[0].training["steps"])
        measured = [record for same in budgets for record in same if record.training["steps"] == steps]
        tables.append(_trend(before, last, factor, steps, measured))
    return "\n".join(tables) + """
Exponent: of the distance as a power of the training images, between two budgets, a seed at a time. If straight: the
same power once more; no distance falls below the floor, so the line is bold. Measured: by runs of so many steps.
"""


def _trend(before: Sequence[Record], last: Sequence[Record], factor: float, steps: int,
           measured: Sequence[Record]) -> str:
    earlier = {(record.row, record.seed): record.metrics["distance"] for record in before}
    falls: dict[str, list[tuple[float, float]]] = {}
    labels = {}
    for record in sorted(last, key=lambda record: row_order(record.row)):
        if (record.row, record.seed) in earlier:
            distance = record.metrics["distance"]
            fall = distance / earlier[record.row, record.seed]
            falls.setdefault(record.row, []).append((math.log(fall) / math.log(factor), distance * fall))
            labels[record.row] = record.label
    lines = [["system", f"exponent, {before[0].training['steps']:,} to {last[0].training['steps']:,} steps",
              f"{steps:,} steps, if straight", *(["measured"] if measured else [])]]
    lines += [[labels[row], *(f"{mean_sd(values)} ({len(found)})" for values in map(list, zip(*found, strict=True))),
               *([_distance([record for record in measured if record.row == row])] if measured else [])]
              for row, found in falls.items()]
    return f"{format_table(lines)}\n"


def _trainings(records: Sequence[Record]) -> str:
    """Say which budgets of a row are one training, and name the rows and seeds whose logs differ all the same."""
    logs: dict[tuple[str, int], list[Any]] = {}
    anew: dict[int, list[str]] = {}
    trainings: dict[int, set[str]] = {}
    for record in sorted(records, key=lambda record: row_order(record.row)):
        trainings.setdefault(record.training["steps"], set()).add(record.training_digest)
        lines = record.training["losses"]
        known = logs.setdefault((record.row, record.seed), lines)
        if any(one != other for one, other in zip(known, lines, strict=False)):
            anew.setdefault(record.seed, []).append(record.label)
    own = [steps for smaller, steps in itertools.pairwise(sorted(trainings))
           if not trainings[smaller] & trainings[steps]]
    sentences = ["The budgets of a row are one training, whose averages were kept on the way."]
    if anew:
        rows = "; ".join(f"seed {seed} of {', '.join(dict.fromkeys(labels))}" for seed, labels in sorted(anew.items()))
        sentences.append(f"Except for {rows}: trained again for a later budget, and not alike to the last bit.")
    if own:
        sentences.append(f"Those of {_steps(own)} are trainings of their own.")
    return "\n".join(sentences)


def _steps(numbers: Sequence[int]) -> str:
    return f"{' or '.join(f'{number:,}' for number in numbers)} steps"


def _heading(records: Sequence[Record]) -> str:
    return _steps(sorted({record.training["steps"] for record in records}))


def _distance(records: Sequence[Record]) -> str:
    return f"{mean_sd([record.metrics['distance'] for record in records])} ({len(records)})" if records else "-"


def _cost(records: Sequence[Record]) -> dict[str, str]:
    return {part: f"{seconds / 60:,.1f}" for part, seconds in cost_seconds(records).items()}
