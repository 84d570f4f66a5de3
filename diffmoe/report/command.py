"""The command line of a report: write it, or check that it follows from its records."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def report_command(arguments: list[str], command: str, about: str | None, write: Callable[[Path], list[Path]],
                   check: Callable[[Path], list[str]]) -> int:
    """Run the command line of a report.

    Args:
        command: what calls it, for the usage line.
        about: its docstring.
        write: makes the files of a folder and returns their paths.
        check: returns a line for each file of a folder that does not follow from the records.
    """
    parser = argparse.ArgumentParser(prog=command, description=about,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="records/*.json lie in it")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a file does not follow")
    options = parser.parse_args(arguments)
    if not options.check:
        for path in write(options.folder):
            print(path)
        return 0
    problems = check(options.folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{options.folder}: everything in it follows from the records")
    return 1 if problems else 0
