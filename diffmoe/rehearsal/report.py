"""The record of a rehearsal, and the page that is made of all records of a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffmoe.config import ConfigError
from diffmoe.report.table1 import format_table
from diffmoe.training.checkpoint import write_whole

TABLE = "table.md"


@dataclass(frozen=True)
class Check:
    """One thing that must hold."""

    name: str
    found: float
    limit: str
    """For a reader: `<= 0.0001`."""
    ok: bool


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What one rehearsal found."""

    started: str
    """UTC."""
    environment: dict[str, Any]
    """`commit`, `dirty`, `versions`, `hardware`, `threads`."""
    processes: int
    settings: dict[str, Any]
    """`size` (width), `experts`, `bf16_steps`, `run_steps`."""
    checks: list[Check]
    runs: list[dict[str, Any]]
    """`name`, `processes`, `batch`, `images_per_second`, `peak_memory_bytes` of the process that held most."""
    metrics: dict[str, float]
    """By Inception without training: that they can be computed is all that they say."""


def write_record(folder: Path, record: Rehearsal) -> Path:
    """Write a record under the digest of its content."""
    text = json.dumps(dataclasses.asdict(record), indent=1)
    path = folder / f"rehearsal-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    write_whole(path, lambda aside: aside.write_text(text))
    return path


def read_rehearsals(folder: Path) -> list[Rehearsal]:
    """Read all records of a folder, oldest first.

    Raises:
        ConfigError: when there is none, or a file is none.
    """
    records = []
    for path in sorted(folder.glob("rehearsal-*.json")):
        try:
            content = json.loads(path.read_text())
            records.append(Rehearsal(**content | {"checks": [Check(**check) for check in content["checks"]]}))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: not a record of a rehearsal ({error})") from None
    if not records:
        raise ConfigError(f"{folder}: no record of a rehearsal in it")
    return sorted(records, key=lambda record: record.started)


def markdown(records: list[Rehearsal]) -> str:
    """Return the page: of each record its checks, and what its runs took."""
    sections = ["# Rehearsals of the paper's scale\n\nMade from the records beside it by `python -m diffmoe.rehearsal "
                "--report`. Pictures, autoencoder and Inception are untrained."]
    for record in records:
        found, settings = record.environment, record.settings
        sections.append(
            f"## {record.started}\n\n{record.processes} processes, {found['hardware']}, torch "
            f"{found['versions']['torch']}, commit {found['commit'][:12]}{' with changes' if found['dirty'] else ''}; "
            f"DiffMoE of width {settings['size']} with {settings['experts']} experts, its pool the batch of all "
            f"processes; {settings['bf16_steps']} steps in bf16, {settings['run_steps']} of the killed run.")
        sections.append(format_table([["what must hold", "found", "limit", ""], *(
            [check.name, f"{check.found:.3g}", check.limit, "holds" if check.ok else "**does not hold**"]
            for check in record.checks)]))
        sections.append(format_table([["run", "processes", "batch", "images/s", "peak of a process, GiB"], *(
            [run["name"], str(run["processes"]), str(run["batch"]), f"{run['images_per_second']:,.0f}",
             f"{run['peak_memory_bytes'] / 2**30:.2f}"] for run in record.runs)]))
    return "\n\n".join(sections) + "\n"


def write_report(folder: Path) -> list[Path]:
    """Write the page of a folder's records and return its path.

    Raises:
        ConfigError: as `read_rehearsals` does.
    """
    text = markdown(read_rehearsals(folder))
    write_whole(folder / TABLE, lambda aside: aside.write_text(text))
    return [folder / TABLE]


def check_report(folder: Path) -> list[str]:
    """Return a line for what does not follow from the records.

    Raises:
        ConfigError: as `read_rehearsals` does.
    """
    table = folder / TABLE
    if not table.is_file():
        return [f"{table}: missing"]
    return [] if table.read_text() == markdown(read_rehearsals(folder)) else [
        f"{table}: does not follow from the records"]
