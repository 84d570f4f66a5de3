"""What all figures share: a colour a system, the look, the note under a title, the first columns of their data."""

from __future__ import annotations

from collections.abc import Sequence

import seaborn as sns

from diffmoe.records import Record

SYSTEMS = {"dense": "Dense", "token_choice": "TC", "expert_choice": "EC", "diffmoe": "DiffMoE",
           "expert_race": "Expert Race"}
COLOURS = dict(zip(SYSTEMS, ("#5b5b5b", "#de8f05", "#0173b2", "#d1332e", "#029e73"), strict=True))
OTHER_COLOURS = ("#cc78bc", "#ca9161", "#56b4e9", "#a5a516")
"""For systems that a user adds, in alphabetical order."""


def row_columns(record: Record) -> dict[str, object]:
    """Return what each line of a figure's data starts with."""
    return {"row": record.row, "label": record.label, "system": record.system, "seed": record.seed}


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
