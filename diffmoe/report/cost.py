"""What the rows cost in time and memory, from records: one line a row, means over seeds, and the sum of it all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from statistics import fmean

from diffmoe.config import ModelConfig, from_dict
from diffmoe.models.counting import ParameterCount, count_parameters, flops_per_call
from diffmoe.records import Record
from diffmoe.report.table import group_rows
from diffmoe.report.table1 import format_table

HEADER = ["system", "seeds", "training, s", "images/s", "sampling, s", "samples/s", "evaluation, s", "sweep, s",
          "peak memory, MB", "hardware"]
MEDIAN = """
Images/s: the median of a training's log, without its start and checkpoints."""


def cost_markdown(records: Sequence[Record]) -> str:
    """Return the costs as Markdown.

    Raises:
        ConfigError: as `group_rows` does.
    """
    rows = group_rows(records)
    parts = {name: seconds for name, seconds in cost_seconds(records).items() if name != "sweeps" or seconds}
    median = MEDIAN if any("images_per_second" in record.training for record in records) else ""
    scale, images = records[0].scale, records[0].sampling["num_samples"]
    total = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in parts.items())
    return f"""{format_table([HEADER, *(_cells(same) for same in rows.values())])}

Scale {scale}, means over seeds. {images} images are drawn and measured; a sweep does so at each threshold.
Rows that share a checkpoint show its one training. Seconds are wall-clock time, on machines that may have had other
work. Peak memory of one process: on a GPU that of tensors while the row ran, in training if it was the one to train; on
a CPU the most that the process had held until then, earlier rows included. `-`: not recorded.{median}

All {len(records)} records, each training once: {sum(parts.values()) / 60:.1f} minutes ({total}), one after another.
"""


def images_per_second(record: Record) -> float:
    """Return the throughput of a training: the median of its log; of an old record all images in all its seconds."""
    training = record.training
    return training.get("images_per_second") or training["images"] / training["seconds"]


def training_minutes(record: Record) -> float:
    """Return the wall-clock minutes of a training at its throughput, without start and checkpoints."""
    return record.training["images"] / images_per_second(record) / 60


def counted_sweep(record: Record) -> list[dict[str, float]]:
    """Return the points of a sweep, each with the strict count and GFLOPs at its capacity."""
    count, fixed, routed = _counts(from_dict(ModelConfig, record.config["model"]))
    return [{"activated_params_strict": count.activated_strict(point["capacity"]),
             "gflops": (fixed + routed * point["capacity"]) / 1e9} | point for point in record.threshold_sweep]


@functools.cache
def _counts(model: ModelConfig) -> tuple[ParameterCount, float, float]:
    """Return a model's parameters, and the FLOPs of a call: of all but the experts, and of them at C = 1."""
    fixed = flops_per_call(model, 0.0)
    return count_parameters(model), fixed, flops_per_call(model, 1.0) - fixed


def cost_seconds(records: Sequence[Record]) -> dict[str, float]:
    """Return the seconds of each part of the work; each training once, up to the last of its budgets."""
    trainings: dict[tuple[str, int], float] = {}
    for record in records:
        key = record.training_digest, record.seed
        trainings[key] = max(trainings.get(key, 0.0), record.training["seconds"])
    return {"training": sum(trainings.values()), "sampling": sum(record.sampling["seconds"] for record in records),
            "evaluation": sum(record.evaluation["seconds"] for record in records),
            "sweeps": sum(_sweep_seconds(record) or 0.0 for record in records)}


def _cells(records: Sequence[Record]) -> list[str]:
    return [records[0].label, str(len(records)),
            _mean(records, lambda record: record.training["seconds"]),
            _mean(records, images_per_second),
            _mean(records, lambda record: record.sampling["seconds"]),
            _mean(records, lambda record: record.sampling["num_samples"] / record.sampling["seconds"]),
            _mean(records, lambda record: record.evaluation["seconds"]), _mean(records, _sweep_seconds),
            _mean(records, _peak_memory), "; ".join(sorted({_hardware(record) for record in records}))]


def _mean(records: Sequence[Record], value: Callable[[Record], float | None]) -> str:
    values = [found for record in records if (found := value(record)) is not None]
    if not values:
        return "-"
    mean = fmean(values)
    return f"{mean:.2g}" if mean < 10 else f"{mean:,.0f}"


def _sweep_seconds(record: Record) -> float | None:
    seconds = [point["seconds"] for point in record.threshold_sweep if "seconds" in point]
    return sum(seconds) if seconds else None


def _peak_memory(record: Record) -> float | None:
    peak = record.environment.get("peak_memory_bytes")
    return None if peak is None else peak / 1e6


def _hardware(record: Record) -> str:
    found, threads = record.environment.get("hardware", "-"), record.environment.get("threads")
    if "CPU" in found:
        return f"{found}, {threads} thread{'s' if threads > 1 else ''}" if threads else found
    cards = max(done.get("processes", 1) for done in (record.training, record.sampling))
    return f"{cards} x {found}" if cards > 1 else found
