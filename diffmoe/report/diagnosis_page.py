"""The page of what the networks do inside: a line a row, means over layers, noise levels and seeds, from records."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffmoe.records import Record
from diffmoe.report.diagnosis import mean, with_dense_on_one_batch
from diffmoe.report.table import group_rows, last_loss, mean_sd, with_dense
from diffmoe.report.table1 import format_table

Value = Callable[[dict[str, Any]], float]
Columns = dict[str, tuple[Value, str]]
"""By its heading, a column's value of a diagnosis and what it says."""
BRANCHES: Columns = {
    "pair weight": (lambda found: mean(found["gates"]["pair"]), "mean weight of a token-expert pair."),
    "token weight": (lambda found: mean(found["gates"]["token"]), "mean sum of a token's weights, which multiplies what"
                     " experts put out; a softmax over E experts starts near C / E."),
    "MoE RMS": (lambda found: _of_blocks(found, "rms", True), "root mean square of an MoE layer's output."),
    "dense RMS": (lambda found: _of_blocks(found, "rms", False), "the same of a dense feed-forward layer."),
    "MoE share": (lambda found: _of_blocks(found, "share", True), "RMS of what an MoE block adds behind adaLN's gate "
                  "over that of the residual stream."),
    "dense share": (lambda found: _of_blocks(found, "share", False), "the same of a dense block's feed-forward layer."),
}
CHOICES: Columns = {
    "C, noise": (lambda found: _at(found, "capacity", 0), "experts a token at inference, at the most noise."),
    "C, data": (lambda found: _at(found, "capacity", -1), "the same at the least noise."),
    "by level": (lambda found: _spread(found["load_by_level"]), "how much an expert's share of the tokens differs "
                 "between noise levels by the training rule: sd over mean; 0 is no specialisation."),
    "by class": (lambda found: _spread(found["load_by_class"]), "the same between classes, the chance of which images "
                 "are in the batch included."),
    "precision": (lambda found: mean(found["passes"]["precision"]), "of the pairs above the threshold, each for itself,"
                  " the share that the training rule takes."),
    "recall": (lambda found: mean(found["passes"]["recall"]), "of the pairs that the training rule takes, the share "
               "above the threshold."),
    "base rate": (lambda found: round(mean(found["load_by_level"]), 4), "the share of all pairs that the "
                  "training rule takes: the precision of chance."),
    "threshold": (lambda found: mean(found["thresholds"]), "mean threshold of experts and layers."),
}
POOLS: Columns = {
    "levels apart": (lambda found: _excess(mean(found["loss"]), mean(found["mixed_loss"])), "by how many percent the "
                     "averaged network's loss is higher by its inference rule, in pools of one noise level as when "
                     "sampling, than by the training rule, in pools of all."),
    "at the least noise": (lambda found: _excess(found["loss"][-1], found["mixed_loss"][-1]), "the same there."),
}
PARTS = ("embedding", "attention", "adaln", "ffn", "experts", "router", "predictor", "final")


def diagnosis_markdown(records: Sequence[Record]) -> str:
    """Return the page; rows without a diagnosis are left out.

    Raises:
        ConfigError: as `group_rows` does.
    """
    rows = [[record for record in same if record.diagnosis] for same in group_rows(records).values()]
    rows = [same for same in rows if same]
    first = rows[0][0].diagnosis
    parts = [part for part in PARTS if any(part in record.diagnosis["weights"] for same in rows for record in same)]
    norms = [["system", *parts]] + [[same[0].label, *(_norms(same, part) for part in parts)] for same in rows]
    return f"""The averaged networks at scale {rows[0][0].scale}, looked into on {first["images"]} training images at \
{len(first["noise_levels"])} noise levels.
Means over layers and levels, ± sd over seeds.

{_table(rows, BRANCHES)}{_by_block(rows)}{_table(rows, CHOICES)}{_table(rows, POOLS)}\
Gradient's norm / weights' norm, by part, means over seeds: the gradient of the training loss of these images, with
noise and times as training draws them, at the averaged weights.

{format_table(norms)}

{_losses(rows)}
"""


def _table(rows: Sequence[Sequence[Record]], columns: Columns) -> str:
    """Return a table of the rows that have any of the columns, with a sentence a column below it; "" without one."""
    cells = {same[0].label: [_cell(same, value) for value, _ in columns.values()] for same in rows}
    lines = [[same[0].label, *cells[same[0].label], str(len(same))] for same in rows
             if set(cells[same[0].label]) != {"-"}]
    sentences = "\n".join(f"- {name}: {sentence}" for name, (_, sentence) in columns.items())
    return f"{format_table([['system', *columns, 'seeds'], *lines])}\n\n{sentences}\n\n" if lines else ""


def _by_block(rows: Sequence[Sequence[Record]]) -> str:
    """Return the table of the share that each block's feed-forward layer or experts add; * where a row has experts."""
    lines = []
    for same in rows:
        shares = np.mean([record.diagnosis["blocks"]["share"] for record in same], axis=(0, 2))
        lines.append([same[0].label, *(f"{share:.2g}{'*' if is_moe else ''}" for share, is_moe in zip(
            shares, same[0].diagnosis["blocks"]["is_moe"], strict=True))])
    header = ["share by block", *map(str, range(1, max(map(len, lines))))]
    return f"{format_table([header, *lines])}\n\n- share by block: the shares above, block by block; *: of experts.\n\n"


def _losses(rows: Sequence[Sequence[Record]]) -> str:
    """Return the tables of losses, against Dense's too: of training, and of the averaged networks if measured."""
    records = [record for same in rows for record in same]
    tables = [_compared(with_dense(records), rows, "training loss", last_loss,
                        "the diffusion loss, mean of the last quarter of the steps.")]
    measured = [found for same in rows if (found := [record for record in same if "loss" in record.diagnosis])]
    if measured:
        tables.append(_compared(with_dense_on_one_batch(records), measured, "averaged loss",
                                lambda record: mean(record.diagnosis["loss"]), "the diffusion loss of the averaged "
                                "network by its inference rule on these images, mean over noise levels."))
    return "\n\n".join(tables)


def _compared(pairs: Sequence[tuple[Record, Record]], rows: Sequence[Sequence[Record]], name: str,
              loss: Callable[[Record], float], sentence: str) -> str:
    """Return the table of one loss of each row, and of its difference to Dense's on the same images and noise."""
    differences: dict[str, list[float]] = {}
    for record, dense in pairs:
        differences.setdefault(record.row, []).append(1e3 * (loss(record) - loss(dense)))
    lines = [[same[0].label, mean_sd([loss(record) for record in same]), mean_sd(differences[same[0].row])
              if same[0].row in differences else "-", str(len(same))] for same in rows]
    return f"""{format_table([["system", name, "to Dense, x1000", "seeds"], *lines])}

- {name}: {sentence}
- to Dense: the difference to Dense's of the same seed and training settings, whose steps drew the same images, times
  and noise."""


def _cell(records: Sequence[Record], value: Value) -> str:
    values = []
    for record in records:
        try:
            values.append(value(record.diagnosis))
        except KeyError:  # a dense network has no gates, a router perhaps no threshold
            return "-"
    return "-" if any(map(math.isnan, values)) else mean_sd(values)


def _norms(records: Sequence[Record], part: str) -> str:
    norms = [mean([record.diagnosis[kind].get(part) for record in records]) for kind in ("gradients", "weights")]
    return "-" if any(map(math.isnan, norms)) else " / ".join(f"{norm:.3g}" for norm in norms)


def _of_blocks(found: dict[str, Any], name: str, is_moe: bool) -> float:
    blocks = found["blocks"]
    return mean([values for values, moe in zip(blocks[name], blocks["is_moe"], strict=True) if moe == is_moe])


def _excess(loss: float, other: float) -> float:
    return 100 * (loss / other - 1)


def _at(found: dict[str, Any], name: str, level: int) -> float:
    return mean([layer[level] for layer in found[name]])


def _spread(load: list[list[list[float | None]]]) -> float:
    """Return the sd over the last axis over its mean, mean over layers and experts that have work."""
    loads = np.asarray(load, dtype=float)
    middle = np.nanmean(loads, -1)
    return mean((np.nanstd(loads, -1) / np.where(middle > 0, middle, math.nan)).tolist())
