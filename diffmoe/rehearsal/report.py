"""The record of a rehearsal, and the page that is made of all records of a folder.

    python -m diffmoe.rehearsal.report results/rehearsal            write table.md
    python -m diffmoe.rehearsal.report results/rehearsal --check    exit 1 when it does not follow from the records
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffmoe.cli import run_command
from diffmoe.config import ConfigError
from diffmoe.records import commit_name
from diffmoe.report.command import report_command
from diffmoe.report.table1 import format_table
from diffmoe.training.checkpoint import write_whole

TABLE = "table.md"
SHOWN = "-"
"""Limit of what is shown, whatever it is."""


@dataclass(frozen=True)
class Check:
    """One thing that must hold."""

    name: str
    found: float
    limit: str
    """For a reader: `<= 0.0001`, or `SHOWN`."""
    ok: bool


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What one rehearsal found."""

    id: str
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


def read_rehearsals(folder: Path) -> list[Rehearsal]:
    """Read all records of a folder, oldest first.

    Raises:
        ConfigError: when there is none, or a file is none.
    """
    records = []
    for path in sorted((folder / "records").glob("*.json")):
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
    sections = ["# Rehearsals of the paper's scale\n\nMade from the records beside it by `python -m "
                "diffmoe.rehearsal.report`. Pictures, autoencoder and Inception are untrained."]
    for record in records:
        found, settings = record.environment, record.settings
        sections.append(
            f"## {record.id}\n\n{record.started}, {record.processes} processes, {found['hardware']}, torch "
            f"{found['versions']['torch']}, commit {commit_name(found)}; "
            f"DiffMoE of width {settings['size']} with {settings['experts']} experts, its pool the batch of all "
            f"processes; {settings['bf16_steps']} steps in bf16, {settings['run_steps']} of the killed run.")
        sections.append(format_table([["what must hold", "found", "limit", ""], *(
            [check.name, f"{check.found:,.4g}", check.limit, _verdict(check)]
            for check in record.checks)]))
        sections.append(format_table([["run", "processes", "batch", "images/s", "peak of a process, GiB"], *(
            [run["name"], str(run["processes"]), str(run["batch"]), f"{run['images_per_second']:,.0f}",
             f"{run['peak_memory_bytes'] / 2**30:.2f}"] for run in record.runs)]))
    return "\n\n".join(sections) + "\n"


def _verdict(check: Check) -> str:
    if check.limit == SHOWN:
        return ""
    return "holds" if check.ok else "**does not hold**"


def write_report(folder: Path) -> list[Path]:
    """Write the page of a folder's records and return its path.

    Raises:
        ConfigError: as `read_rehearsals` does.
    """
    text = markdown(read_rehearsals(folder))
    write_whole(folder / TABLE, lambda aside: aside.write_text(text))
    return [folder / TABLE]


def check_report(folder: Path) -> list[str]:
    """Return a line when the page does not follow from the records.

    Raises:
        ConfigError: as `read_rehearsals` does.
    """
    table = folder / TABLE
    same = table.is_file() and table.read_text() == markdown(read_rehearsals(folder))
    return [] if same else [f"{table}: does not follow from the records"]


def main(arguments: list[str]) -> int:
    """Run the command line."""
    return report_command(arguments, "diffmoe.rehearsal.report", __doc__, write_report, check_report)


if __name__ == "__main__":
    sys.exit(run_command(main))
