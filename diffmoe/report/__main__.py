"""Write a results folder's table, verdicts and figures from its records, or check that they follow from them.

    python -m diffmoe.report results/digits            reads records/*.json, writes table.md, table.csv, verdicts.md,
                                                       cost.md and figures/ (PNG, and the data of each as CSV)
    python -m diffmoe.report results/digits --check    exit 1 when a file does not follow from the records
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from diffmoe.cli import run_command
from diffmoe.config import ConfigError
from diffmoe.records import Record, read_records
from diffmoe.report.command import report_command
from diffmoe.report.cost import cost_markdown
from diffmoe.report.figures import FIGURES as DRAWN
from diffmoe.report.figures import data_digest, drawn_from, figures_csv, write_figures
from diffmoe.report.table import table_csv, table_markdown
from diffmoe.report.verdicts import verdicts_markdown

FIGURES = "figures"


def report_files(records: Sequence[Record]) -> dict[str, str]:
    """Return every text file of a report, by its path in the results folder.

    Raises:
        ConfigError: for records that cannot stand in one table.
    """
    return {"table.md": table_markdown(records), "table.csv": table_csv(records),
            "verdicts.md": verdicts_markdown(records), "cost.md": cost_markdown(records)} | {
        f"{FIGURES}/{name}.csv": text for name, text in figures_csv(records).items()}


def write_report(folder: Path) -> list[Path]:
    """Write the report of `folder`/records and return the paths; figures that lost their data are removed.

    Raises:
        ConfigError: for records that cannot be read or stand in one table, or a folder that cannot be written.
    """
    records = _records(folder)
    files = report_files(records)
    try:
        for path in _strays(folder, files):
            path.unlink()
        (folder / FIGURES).mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return [folder / name for name in files] + write_figures(records, folder / FIGURES)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error})") from None


def check_report(folder: Path) -> list[str]:
    """Return a line for each file that does not follow from the records; of a picture, whether their data was drawn.

    Raises:
        ConfigError: for records that cannot be read or stand in one table.
    """
    files = report_files(_records(folder))
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
    """Return what is left of figures that these records have no data for; other files in the folder are let be."""
    paths = [folder / FIGURES / f"{name}{suffix}" for name in DRAWN for suffix in (".csv", ".png")
             if f"{FIGURES}/{name}.csv" not in files]
    return [path for path in paths if path.exists()]


def main(arguments: list[str]) -> int:
    """Run the command line."""
    return report_command(arguments, "diffmoe.report", __doc__, write_report, check_report)


if __name__ == "__main__":
    sys.exit(run_command(main))
