"""What tables cost before any of it runs: parameters, operations, memory a GPU and GPU hours, for each row and in all.

Throughput is the median of a measured training in the bench's records (`results/bench/bench-*.json`) where one has the
row's size and system; elsewhere it follows from ASSUMED_MFU of ASSUMED_PEAK, and the line says so. Rows of the same
training settings are trained once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from diffmoe.cells import Row
from diffmoe.config import SIZES, ConfigError, ModelConfig, RunConfig, Sampler, digest
from diffmoe.data.latent_data import LATENTS
from diffmoe.models.counting import count_parameters, flops_per_call, state_bytes
from diffmoe.report.table1 import format_table

ASSUMED_MFU, ASSUMED_PEAK = 0.30, 989e12
"""Share of an H100's dense bf16 peak, operations a second."""
ACTIVATION_BYTES = 34
"""A token, width and block in 16 bits without the attention matrix (Korthikanti et al. 2022, arXiv 2205.05198, eq. 1);
an estimate, which leaves out adaLN and the experts' gathered copies."""
HEADER = ["row", "parameters, M", "activated, M", "GFLOPs", "state, GiB", "activations, GiB", "images/s a GPU",
          "training, GPU h", "sampling, GPU h"]
DOPRI5_CALLS = 130
"""Network calls of an adaptive solver, roughly, where no number of steps says."""


@dataclass(frozen=True)
class Cost:
    """What one row costs."""

    row: Row
    throughput: float
    """Images a second and GPU in training."""
    measured: bool

    @property
    def training_hours(self) -> float:
        """Return GPU hours of training."""
        return self.row.config.training.num_images / self.throughput / 3600

    @property
    def sampling_hours(self) -> float:
        """Return GPU hours of sampling: forwards at three times the images a second of a training step."""
        calls = calls_an_image(self.row.config) * self.row.config.evaluation.num_samples
        return calls / (3 * self.throughput) / 3600


def calls_an_image(config: RunConfig) -> int:
    """Return the network calls of one sample, both halves of guidance counted."""
    sampling = config.sampling
    steps = {Sampler.HEUN: 2 * sampling.num_steps, Sampler.DOPRI5: DOPRI5_CALLS}.get(
        sampling.sampler, sampling.num_steps)
    return steps * (2 if sampling.guidance_scale != 1 else 1)


def size_name(model: ModelConfig) -> str:
    """Return the name of a model's size as the bench writes it, L-E16; empty for a size of no name."""
    shape = {"hidden_size": model.hidden_size, "depth": model.depth, "num_heads": model.num_heads}
    name = next((name for name, known in SIZES.items() if known == shape), "")
    return f"{name}-E{model.moe.num_experts}" if name and model.moe else name


def measured_throughputs(folder: Path) -> dict[tuple[str, str, str], float]:
    """Return images a second of our measured training by (workload, size, system), the fastest batch of each.

    Raises:
        ConfigError: for a file that is no record of the bench.
    """
    found: dict[tuple[str, str, str], float] = {}
    for path in sorted(folder.glob("bench-*.json")):
        try:
            for result in json.loads(path.read_text())["results"]:
                case = result["case"]
                if (case["work"], case["implementation"], result["status"]) != ("train", "ours", "ok"):
                    continue
                milliseconds = median(sample for visit in result["samples_ms"] for sample in visit)
                dense = case["system"] == "dense"  # beside a mixture it is timed under that one's size
                size = case["size"].partition("-")[0] if dense else case["size"]
                key = case["workload"], size, case["system"]
                found[key] = max(found.get(key, 0.0), 1e3 * case["batch"] / milliseconds)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: not a record of the bench ({type(error).__name__}: {error})") from None
    return found


def costs(rows: Sequence[Row], bench: Path) -> list[Cost]:
    """Return what each row costs, by the bench's records in the folder `bench` or by the assumption."""
    measured = measured_throughputs(bench)
    found = []
    for row in rows:
        model, data = row.config.model, row.config.data.name
        speed = measured.get(("latent" if data == LATENTS else data, size_name(model), row.system))
        assumed = ASSUMED_MFU * ASSUMED_PEAK / (3 * flops_per_call(model))
        found.append(Cost(row, speed or assumed, speed is not None))
    return found


def plan(tables: Mapping[str, Sequence[Row]], seeds: int, gpus: int, bench: Path) -> str:
    """Return what tables cost as text: each by its name, all of them, and what the numbers rest on.

    Args:
        seeds: runs of each row.
        gpus: data-parallel processes that a batch is divided over.
        bench: folder of the bench's records.
    """
    trained: dict[str, float] = {}
    sampling_hours, parts = 0.0, []
    for name, rows in tables.items():
        lines = [HEADER]
        for cost in costs(rows, bench):
            key = digest(cost.row.config, scope="training")
            lines.append(_line(cost, seeds, gpus, shared=key in trained))
            trained.setdefault(key, seeds * cost.training_hours)
            sampling_hours += seeds * cost.sampling_hours
        parts.append(f"{name}\n\n{format_table(lines)}\n")
    return "\n".join([
        *parts, f"In all: {_hours(sum(trained.values()))} GPU hours of training, {_hours(sampling_hours)} of sampling; "
        f"{sum(map(len, tables.values()))} rows x {seeds} seeds, {len(trained)} trainings a seed.", "",
        f"Memory: of one of {gpus} GPUs. State: weights and gradients in bf16, and its share of weights, AdamW's "
        "moments and averages in",
        f"float32. Activations: an estimate for its share of the batch, {ACTIVATION_BYTES} bytes a token, width and "
        "block. images/s:",
        f"measured (results/bench) or, marked ?, assumed: {ASSUMED_MFU:.0%} of {ASSUMED_PEAK / 1e12:.0f} TFLOP/s at "
        "C = 1. A call of sampling: a third of a training step."])


def _line(cost: Cost, seeds: int, gpus: int, *, shared: bool) -> list[str]:
    config = cost.row.config
    count, capacity = count_parameters(config.model), config.model.moe.capacity if config.model.moe else 1.0
    return [cost.row.label, f"{count.total / 1e6:,.1f}", f"{count.activated_paper(capacity) / 1e6:,.1f}",
            f"{flops_per_call(config.model, capacity) / 1e9:,.1f}",
            f"{state_bytes(config, count.total, gpus) / 2**30:,.1f}",
            f"{activation_bytes(config, gpus) / 2**30:,.1f}", f"{cost.throughput:,.0f}{'' if cost.measured else ' ?'}",
            "shared" if shared else _hours(seeds * cost.training_hours), _hours(seeds * cost.sampling_hours)]


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2f}"


def activation_bytes(config: RunConfig, gpus: int) -> int:
    """Return an estimate of the bytes that a forward keeps for its backward on each of `gpus`."""
    images = config.runtime.micro_batch_size or -(-config.training.batch_size // gpus)
    model = config.model
    return ACTIVATION_BYTES * images * model.num_tokens * model.hidden_size * model.depth
