"""Write a results folder's table, verdicts and figures from its records, or check that they follow from them.

    python -m diffmoe.report results/digits            reads records/*.json, writes table.md, table.csv, verdicts.md,
                                                       cost.md, diagnosis.md and figures/ (PNG, and the data of each
                                                       as CSV)
    python -m diffmoe.report results/digits --check    exit 1 when a file does not follow from the records

Records of several budgets make such a report each, in a subfolder named by its optimiser steps (2000-steps/), and
budgets.md with the figure of all of them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from diffmoe.cli import run_command
from diffmoe.config import ConfigError
from diffmoe.records import Record, read_records
from diffmoe.report.budgets import budgets_data, budgets_markdown, by_budget, distance_against_budget
from diffmoe.report.command import report_command
from diffmoe.report.cost import cost_markdown
from diffmoe.report.diagnosis_page import diagnosis_markdown
from diffmoe.report.figures import FIGURES as DRAWN
from diffmoe.report.figures import Figures, data_digest, drawn_from, figures_csv, write_figures
from diffmoe.report.table import table_csv, table_markdown
from diffmoe.report.verdicts import of_claims, summary_markdown, verdicts_markdown

FIGURES = "figures"
PAGES = ("table.md", "table.csv", "verdicts.md", "summary.md", "cost.md", "diagnosis.md", "budgets.md")
ACROSS: Figures = {"distance_vs_budget": (budgets_data, distance_against_budget)}
"""Figures of a folder of several budgets; each budget has its own `DRAWN`."""


@dataclass(frozen=True)
class Part:
    """What a report holds in one folder."""

    records: list[Record]
    pages: dict[str, str]
    """Text by file name."""
    figures: Figures


def report_parts(records: Sequence[Record]) -> dict[str, Part]:
    """Return the parts of a report by their place in the results folder: the folder itself, or one a budget.

    Raises:
        ConfigError: for records that cannot stand in one report.
    """
    budgets = by_budget(records)
    parts = {name: Part(same, _pages(same, records), DRAWN) for name, same in budgets.items()}
    return parts if len(parts) == 1 else {
        "": Part(list(records), {"budgets.md": budgets_markdown(records)}, ACROSS)} | parts


def _pages(records: Sequence[Record], everything: Sequence[Record]) -> dict[str, str]:
    pages = {"table.md": table_markdown(records), "table.csv": table_csv(records), "cost.md": cost_markdown(records)}
    if any(record.diagnosis for record in records):
        pages["diagnosis.md"] = diagnosis_markdown(records)
    if not of_claims(records):  # runs of another kind, as those of learning rates
        return pages
    pages["verdicts.md"] = verdicts_markdown(records, everything)
    return pages if records[0].scale == "digits" else pages | {"summary.md": summary_markdown(records)}


def report_files(parts: dict[str, Part]) -> dict[str, str]:
    """Return every text file of a report, by its path in the results folder."""
    return {str(PurePosixPath(name, path)): text for name, part in parts.items() for path, text in (
        part.pages | {f"{FIGURES}/{figure}.csv": text
                      for figure, text in figures_csv(part.records, part.figures).items()}).items()}


def write_report(folder: Path) -> list[Path]:
    """Write the report of `folder`/records and return the paths; what earlier records had made is removed.

    Raises:
        ConfigError: for records that cannot be read or stand in one report, or a folder that cannot be written.
    """
    parts = report_parts(_records(folder))
    files = report_files(parts)
    try:
        for path in _strays(folder, files):
            path.unlink()
            with contextlib.suppress(OSError):  # not empty
                path.parent.rmdir()
                path.parent.parent.rmdir()
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        return [folder / name for name in files] + [
            path for name, part in parts.items()
            for path in write_figures(part.records, folder / name / FIGURES, part.figures)]
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error})") from None


def check_report(folder: Path) -> list[str]:
    """Return a line for each file that does not follow from the records; of a picture, whether their data was drawn.

    Raises:
        ConfigError: for records that cannot be read or stand in one report.
    """
    files = report_files(report_parts(_records(folder)))
    problems = []
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif (found := path.read_text(encoding="utf-8", errors="replace")) != expected:
            pairs = enumerate(zip(found.splitlines(), expected.splitlines(), strict=False), 1)
            line = next((number for number, (ours, theirs) in pairs if ours != theirs), "its end")
            problems.append(f"{path}: does not follow from the records, see line {line}")
        picture = path.with_suffix(".png")
        if path.parent.name != FIGURES:
            continue
        if not picture.is_file():
            problems.append(f"{picture}: missing")
        elif drawn_from(picture) != data_digest(expected):
            problems.append(f"{picture}: was not drawn from these records")
    return problems + [f"{path}: the records have no data for it" for path in _strays(folder, files)]


def _records(folder: Path) -> list[Record]:
    records = read_records(folder / "records")
    if not records:
        raise ConfigError(f"{folder / 'records'}: no records; run the cells first")
    return records


def _strays(folder: Path, files: dict[str, str]) -> list[Path]:
    """Return what is left of reports that these records have no data for; other files in the folder are let be."""
    known = [*PAGES, *(f"{FIGURES}/{name}{suffix}" for name in (*DRAWN, *ACROSS) for suffix in (".csv", ".png"))]
    wanted = {folder / name for name in files}
    wanted |= {path.with_suffix(".png") for path in wanted if path.parent.name == FIGURES}
    places = [folder, *sorted(folder.glob("[0-9]*-steps")), *sorted(folder.glob("[0-9]*-images"))]
    return [path for place in places for name in known if (path := place / name) not in wanted and path.exists()]


def main(arguments: list[str]) -> int:
    """Run the command line."""
    return report_command(arguments, "python -m diffmoe.report", __doc__, write_report, check_report)


if __name__ == "__main__":
    sys.exit(run_command(main))
