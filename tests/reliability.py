"""The record of a soak, and the table of all records: faults tried, survived, lost.

    python tests/reliability.py results/reliability            write table.md
    python tests/reliability.py results/reliability --check    exit 1 when it does not follow from the records
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffmoe.cli import run_command
from diffmoe.config import ConfigError
from diffmoe.records import commit_name
from diffmoe.report.command import report_command
from diffmoe.report.table1 import format_table

SCHEMA = 1
ABOUT = """\
# Reliability

Made from the records beside it by `python tests/reliability.py`; `make soak` makes such a record. A fault is done for
real, and survived when nothing was lost: training that goes on ends bit for bit as if nothing had happened, what cannot
go on says so in one line, and every checkpoint and log line from before is there. How each is done and judged is the
test of that name (`@pytest.mark.fault`).
"""


@dataclass
class Fault:
    """What became of one kind of fault."""

    name: str
    survived: int = 0
    lost: int = 0
    losses: list[str] = field(default_factory=list)
    """The first line of each loss."""
    measured: str = ""

    @property
    def tried(self) -> int:
        """Return how often it was done."""
        return self.survived + self.lost


@dataclass(kw_only=True)
class Soak:
    """One soak."""

    id: str
    started: str
    """UTC."""
    seed: int
    """Of the first round; each has the next one."""
    rounds: int
    minutes: float
    environment: dict[str, Any]
    """`commit`, `dirty`, `versions`, `hardware`, `threads`, `peak_memory_bytes` of the process that watches."""
    faults: list[Fault]
    schema: int = SCHEMA


def read_soaks(folder: Path) -> list[Soak]:
    """Return the records of a folder in order of time.

    Raises:
        ConfigError: when there is none, or one is not of this schema.
    """
    soaks = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            if content.get("schema") != SCHEMA:
                raise ValueError(f"schema {content.get('schema')}, this version reads {SCHEMA}")
            soaks.append(Soak(**content | {"faults": [Fault(**fault) for fault in content["faults"]]}))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path}: not a record of a soak ({error})") from None
    if not soaks:
        raise ConfigError(f"{folder}: no records; run make soak")
    return sorted(soaks, key=lambda soak: soak.started)


def faults_table(faults: list[Fault]) -> str:
    """Return the table of faults, with what was lost below it."""
    everything = Fault("all", sum(fault.survived for fault in faults), sum(fault.lost for fault in faults))
    lines = [[fault.name, *(f"{count:,}" for count in (fault.tried, fault.survived, fault.lost)), fault.measured]
             for fault in (*faults, everything)]
    losses = [f"- {fault.name}: {loss}" for fault in faults for loss in fault.losses]
    return "\n".join([format_table([["fault", "tried", "survived", "lost", "measured"], *lines]),
                      *(["", "Lost:", "", *losses] if losses else [])])


def report(folder: Path) -> str:
    """Return the page of a folder's records."""
    sections = [ABOUT]
    for soak in read_soaks(folder / "records"):
        environment = soak.environment
        state = commit_name(environment)
        sections.append(f"## {soak.id}\n\n{environment['hardware']}, torch {environment['versions']['torch']}, "
                        f"{soak.started}, commit {state}; {soak.rounds} rounds in {soak.minutes:.0f} minutes, seeds "
                        f"from {soak.seed}.\n\n{faults_table(soak.faults)}\n")
    return "\n".join(sections)


def write_report(folder: Path) -> list[Path]:
    """Write the page."""
    text = report(folder)
    (folder / "table.md").write_text(text, encoding="utf-8")
    return [folder / "table.md"]


def check_report(folder: Path) -> list[str]:
    """Return a line when the page does not follow from the records."""
    page = folder / "table.md"
    same = page.is_file() and page.read_text(encoding="utf-8") == report(folder)
    return [] if same else [f"{page}: does not follow from the records"]


def main(arguments: list[str]) -> int:
    """Run the command line."""
    return report_command(arguments, "python tests/reliability.py", __doc__, write_report, check_report)


if __name__ == "__main__":
    sys.exit(run_command(main))
