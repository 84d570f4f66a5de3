"""The record of a scaling measurement, its table and figure.

    python -m diffmoe.bench.scaling_report results/bench            write scaling.md and scaling.png
    python -m diffmoe.bench.scaling_report results/bench --check    exit 1 when they do not follow from scaling-*.json
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from diffmoe.bench.cases import Case
from diffmoe.bench.record import OK, SKIPPED
from diffmoe.cli import run_command
from diffmoe.config import ConfigError, PoolScope
from diffmoe.records import commit_name
from diffmoe.report.command import report_command
from diffmoe.report.style import COLOURS, DASHES, MARKERS, set_theme
from diffmoe.report.table1 import format_table
from diffmoe.training.checkpoint import write_whole

SCHEMA = 1
TABLE, FIGURE = "scaling.md", "scaling.png"
WEAK = "train", "weak"
APART = "apart"
"""As `parallel`: each process trains a model of its own, beside the others."""
TARGETS = {2: 0.95, 4: 0.95, 8: 0.93}
"""Weak-scaling efficiency to reach, by the number of GPUs."""
HEADER = ["work", "network", "GPUs", "scaling", "by", "pool", "batch", "images/s", "ms", "efficiency", "of apart",
          "MFU", "peak of a process, GiB"]


@dataclass(frozen=True, kw_only=True)
class ScalingCase:
    """One work on a number of processes, a GPU each."""

    work: str
    """train: optimiser steps. sample: images from noise."""
    size: str
    system: str
    processes: int
    batch: int
    """Images of a step of all processes; of sampling, of a batch of one process."""
    scaling: str = ""
    """weak: a batch for each process. strong: the same work for any number. Empty: one process."""
    parallel: str = ""
    """ddp, fsdp or apart, in training by several."""
    pool_scope: str = ""
    """Whose tokens a pool holds, in training by several: those of a process, or of all (global)."""

    @property
    def name(self) -> str:
        """Return a line that names the case."""
        parts = (self.work, self.network, f"{self.processes} processes", self.scaling, self.parallel, self.pool_scope)
        return " ".join(part for part in parts if part)

    @property
    def network(self) -> str:
        """Name size and system."""
        return f"{self.size}/{self.system}"

    def bench_case(self) -> Case:
        """Return it as the bench knows it."""
        return Case(workload="latent", size=self.size, system=self.system, work=self.work, batch=self.batch)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of one case."""

    case: ScalingCase
    status: str
    """ok, out of memory, error or skipped (the time was over)."""
    message: str = ""
    quartiles_ms: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Of a call: a training step, or all images; each that of the slowest process."""
    calls: int = 0
    images: int = 0
    """Of a call, all processes together."""
    flops_per_image: float = 0.0
    capacity: float | None = None
    peak_bytes: int = 0
    """Of the process that held most."""
    total_s: float = 0.0
    """With building and compiling."""

    @classmethod
    def of(cls, content: dict[str, Any]) -> Measured:
        """Return what was written as plain data."""
        return cls(**content | {"case": ScalingCase(**content["case"]), "quartiles_ms": tuple(content["quartiles_ms"])})

    @property
    def images_per_second(self) -> float:
        """Return the median's, of all processes together."""
        return 1e3 * self.images / self.quartiles_ms[1]


@dataclass(kw_only=True)
class ScalingRecord:
    """One call of the command, or several that went on with it."""

    id: str
    environment: dict[str, Any]
    """`commit`, `dirty`, `versions`, `hardware`, `threads`."""
    settings: dict[str, Any]
    """Those of the bench, `sampled` images and `cards` of the machine."""
    peak_flops: float | None
    """Of one device."""
    results: list[Measured] = field(default_factory=list)
    schema: int = SCHEMA

    def has(self, case: ScalingCase) -> bool:
        """Say whether a case was run to its end, whatever that was."""
        return any(result.case == case and result.status != SKIPPED for result in self.results)

    def efficiency(self, result: Measured) -> float | None:
        """Return images/s of a process over those of the same work alone; None where alone was not measured."""
        alone = [one for one in self.results if one.status == OK and one.case.processes == 1
                 and (one.case.work, one.case.network) == (result.case.work, result.case.network)]
        return result.images_per_second / result.case.processes / alone[0].images_per_second if alone else None

    def of_apart(self, result: Measured) -> float | None:
        """Return images/s over those of as many models apart with a batch each; None where there are none."""
        apart = [one for one in self.results if one.status == OK and one.case.parallel == APART
                 and one.case == dataclasses.replace(result.case, parallel=APART, pool_scope="")]
        return result.images_per_second / apart[0].images_per_second if apart and result not in apart else None

    def mfu(self, result: Measured) -> float | None:
        """Return activated operations of a process over the peak of its device."""
        if self.peak_flops is None:
            return None
        return result.flops_per_image * result.images_per_second / result.case.processes / self.peak_flops

    def describe(self, result: Measured) -> str:
        """Return a result in one line."""
        if result.status != OK:
            return f"{result.status} {result.message}".strip()
        named = zip(HEADER[7:], self.cells(result)[7:], strict=True)
        return ", ".join(f"{name} {value}" for name, value in named if value != "-")

    def cells(self, result: Measured) -> list[str]:
        """Return a result's line of the table."""
        case = result.case
        first = [case.work, case.network, str(case.processes), case.scaling or "-", case.parallel or "-",
                 case.pool_scope or "-", str(case.batch)]
        if result.status != OK:
            return [*first, " ".join([result.status, result.message]).strip(), *["-"] * 5]
        low, middle, high = result.quartiles_ms
        shares = [None if case.processes == 1 else self.efficiency(result), self.of_apart(result), self.mfu(result)]
        return [*first, f"{result.images_per_second:,.1f}", f"{middle:,.1f} [{low:,.1f}, {high:,.1f}]",
                *("-" if share is None else f"{share:.1%}" for share in shares), f"{result.peak_bytes / 2**30:.1f}"]


def read_scaling(path: Path) -> ScalingRecord:
    """Read one record.

    Raises:
        ConfigError: when it is none.
    """
    try:
        content = json.loads(path.read_text())
        if content.get("schema") != SCHEMA:
            raise ValueError(f"schema {content.get('schema')}, this version reads {SCHEMA}")
        return ScalingRecord(**content | {"results": [Measured.of(result) for result in content["results"]]})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a record of scaling ({error})") from None


def read_all(folder: Path) -> list[ScalingRecord]:
    """Read all records of a folder.

    Raises:
        ConfigError: when there is none, or a file is none.
    """
    records = [read_scaling(path) for path in sorted(folder.glob("scaling-*.json"))]
    if not records:
        raise ConfigError(f"{folder}: no records (scaling-*.json); run python -m diffmoe.bench.scaling --out {folder}")
    return records


def markdown(records: Sequence[ScalingRecord]) -> str:
    """Return the page: a table a record."""
    goal = ", ".join(f"{share:.0%} at {count}" for count, share in TARGETS.items())
    sections = ["# Scaling over the GPUs of one machine\n\nMade from the records beside it by `python -m "
                "diffmoe.bench.scaling_report`. Efficiency: images/s of a GPU over those of one GPU alone, whose step "
                f"has no word for others to wait for; weak scaling is to reach {goal}. Apart: each GPU trains a model "
                "of its own, so that what is lost is not lost to communication; images/s are compared with those, too, "
                "for cards differ by some percent, and the one that is timed alone may be a slow one. Milliseconds: "
                "medians with quartiles, of the slowest process. MFU: of each GPU."]
    for record in records:
        found, settings = record.environment, record.settings
        sections.append(
            f"## {record.id}\n\n{settings['cards']} x {found['hardware']}, torch {found['versions']['torch']}, commit "
            f"{commit_name(found)}; {settings['precision']}"
            + (f", {settings['sampled']:,} images a process sampled in {settings['sampling_steps']} Euler steps."
               if any(result.case.work == "sample" for result in record.results) else "."))
        sections.append(format_table([HEADER, *map(record.cells, record.results)]))
    return "\n\n".join(sections) + "\n"


def draw(records: Sequence[ScalingRecord]) -> Figure:
    """Draw efficiency against the number of processes: a panel each for weak, strong, and sampling, if measured.

    Args:
        records: of one commit and machine; of what is in several, the last one's is drawn.
    """
    set_theme()
    results = [(record, result) for record in records for result in record.results]
    panels = {"training, weak": WEAK, "training, strong": ("train", "strong"), "sampling": ("sample", "weak")}
    measured = {(result.case.work, result.case.scaling) for _, result in results if result.status == OK}
    panels = {title: kind for title, kind in panels.items() if kind in measured or kind == WEAK}
    figure, (grid,) = plt.subplots(1, len(panels), figsize=(11, 4.6), sharey=True, squeeze=False, layout="constrained")
    networks = list(dict.fromkeys(result.case.network for _, result in results))
    ways = sorted({(found.case.parallel, found.case.pool_scope == PoolScope.GLOBAL) for _, found in results
                   if found.case.processes > 1})
    for axes, (title, (work, scaling)) in zip(grid, panels.items(), strict=True):
        lines: dict[tuple[str, ...], dict[int, float]] = {}
        for record, result in results:
            case = result.case
            found = record.efficiency(result) if result.status == OK else None
            if found is not None and (case.work, case.scaling) == (work, scaling):
                how = (case.network, case.system, case.parallel, case.pool_scope)
                lines.setdefault(how, {1: 1.0})[case.processes] = found
        for (network, system, parallel, scope), points in lines.items():
            axes.plot(list(points), list(points.values()), color=COLOURS.get(system, "#56b4e9"), lw=1.5, ms=5,
                      marker=MARKERS[networks.index(network)],
                      dashes=DASHES[ways.index((parallel, scope == PoolScope.GLOBAL))],
                      label=" ".join(part for part in (network, parallel, scope) if part))
        counts = sorted({1, *(count for points in lines.values() for count in points)})
        if reached := [count for count in counts if (work, scaling) == WEAK and count in TARGETS]:
            axes.plot(reached, [TARGETS[count] for count in reached], "_k", ms=14, mew=1.5, label="to reach")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("GPUs")
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, map(str, counts))
        axes.set_xticks([], minor=True)
    named = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), frameon=False, fontsize=8, loc="outside lower center", ncols=4,
                  handlelength=3.5)
    grid[0].set_ylabel("efficiency: images/s of a GPU, of one alone")
    cards = f"{records[0].settings['cards']} x {records[0].environment['hardware']}"
    figure.suptitle(f"Scaling over the GPUs of one machine\n{cards}", x=0.01, ha="left", fontsize=11)
    return figure


def write_table(folder: Path) -> list[Path]:
    """Write page and figure of a folder's records and return their paths.

    The figure is of the record with most results, and of others of its commit and machine.

    Raises:
        ConfigError: as `read_all` does.
    """
    records = read_all(folder)
    text = markdown(records)
    write_whole(folder / TABLE, lambda aside: aside.write_text(text))
    same = itemgetter("commit", "hardware")
    most = max(records, key=lambda record: len(record.results))
    figure = draw([record for record in records if same(record.environment) == same(most.environment)
                   and record.settings["cards"] == most.settings["cards"]])
    figure.savefig(folder / FIGURE, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return [folder / TABLE, folder / FIGURE]


def check_table(folder: Path) -> list[str]:
    """Return a line for what does not follow from the records.

    Raises:
        ConfigError: as `read_all` does.
    """
    table = folder / TABLE
    same = table.is_file() and table.read_text() == markdown(read_all(folder))
    missing = [] if (folder / FIGURE).is_file() else [f"{folder / FIGURE}: missing"]
    return missing if same else [f"{table}: does not follow from the records", *missing]


def main(arguments: list[str]) -> int:
    """Run the command line."""
    return report_command(arguments, "diffmoe.bench.scaling_report", __doc__, write_table, check_table)


if __name__ == "__main__":
    sys.exit(run_command(main))
