"""How long a sweep takes, from the times in records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from ablations.trials import Trials
from diffmoe.cells import Cell, Store
from diffmoe.config import digest
from diffmoe.data import ImageData
from diffmoe.records import Record
from diffmoe.report.table1 import format_table


def trial_minutes(cells: Sequence[Cell], records: Sequence[Record], store: Store, data: ImageData) -> float | None:
    """Return the minutes of a trial, or None without a record to go by.

    Training and sampling scale with their images, and sampling with its steps; records of the same training settings
    are the best to go by, then those of the same system, then any. A finished training costs nothing.
    """
    if not records:
        return None
    first = cells[0]
    seconds = 0.0
    if not store.is_trained(first, data):
        seconds = first.row.config.training.num_images * _typical(
            first, records, lambda record: record.training["seconds"] / record.training["images"])
    for cell in cells:
        config = cell.row.config
        seconds += config.evaluation.num_samples * config.sampling.num_steps * _typical(cell, records, _sampling_cost)
    return seconds / 60


def _sampling_cost(record: Record) -> float:
    """Return the seconds of one step of one sample, measuring included."""
    seconds = record.sampling["seconds"] + record.evaluation["seconds"]
    return seconds / (record.sampling["num_samples"] * record.config["sampling"]["num_steps"])


def _typical(cell: Cell, records: Sequence[Record], cost: Callable[[Record], float]) -> float:
    wanted = digest(cell.row.config, scope="training")
    nearest = ([record for record in records if record.training_digest == wanted]
               or [record for record in records if record.system == cell.row.system] or records)
    return median(map(cost, nearest))


def describe_cost(trials: Trials, records: Sequence[Record], store: Store, data: ImageData, jobs: int) -> str:
    """Return a line a trial with its minutes, and their sum."""
    minutes = {name: trial_minutes(cells, records, store, data) for name, cells in trials.items()}
    lines = [["trial", "rows", "steps", "minutes"]]
    for name, cells in trials.items():
        steps = cells[0].row.config.training.num_steps
        lines.append([name, str(len(cells)), str(steps), "-" if minutes[name] is None else f"{minutes[name]:.1f}"])
    if None in minutes.values():
        return f"{format_table(lines)}\n\nno record to estimate the time from"
    total = sum(minutes.values())
    return (f"{format_table(lines)}\n\n{total:.0f} minutes of one core or GPU share, about {total / jobs:.0f} with "
            f"{jobs} at a time, going by {len(records)} records")
