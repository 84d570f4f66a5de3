"""Table, targets and figures of a folder of records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from diffmoe.bench.gaps import gaps_markdown
from diffmoe.bench.record import OK, BenchRecord, Result, read_benches
from diffmoe.bench.targets import NAMES, format_value, judge
from diffmoe.config import ConfigError
from diffmoe.records import commit_name
from diffmoe.report.style import COLOURS, SYSTEMS

DPI = 150
OTHER, LIGHTER = "#56b4e9", "#eba3a0"
"""Colours of a system that a user adds, and of DiffMoE under a skewed load."""
IMPLEMENTATIONS = {"ours": "ours", "reference-tf32": "authors, TF32", "reference-bf16": "authors, bf16"}


def write_bench_report(folder: Path) -> list[Path]:
    """Write table.md, targets.md (for the README), gaps.md and the figures of a folder's records; return their paths.

    Raises:
        ConfigError: for records that cannot be read, or a folder that cannot be written.
    """
    records = read_benches(folder)
    paths = []
    try:
        for name, text in _texts(records).items():
            paths.append(folder / name)
            paths[-1].write_text(text, encoding="utf-8")
        for name, figure in figures(records).items():
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=DPI, metadata={"Software": None})
            plt.close(figure)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error})") from None
    return paths


def check_bench_report(folder: Path) -> list[str]:
    """Return a line for each file of the report that is missing or does not follow from the records."""
    records = read_benches(folder)
    problems = []
    for name, text in _texts(records).items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.read_text(encoding="utf-8") != text:
            problems.append(f"{path}: does not follow from the records")
    drawn = figures(records)
    for figure in drawn.values():
        plt.close(figure)
    return problems + [f"{path}: missing" for name in drawn if not (path := folder / f"{name}.png").is_file()]


def table_markdown(records: Sequence[BenchRecord]) -> str:
    """Return all tables: targets first, then each record's results, parts and start-up."""
    sections = ["# Speed\n\nMade from the records beside it by `python -m diffmoe.bench --report`. Medians, with the "
                "quartiles of a call in brackets; ratios are within one record, so within one run on one device.",
                "## Targets\n\n" + targets_table(records)]
    for record in records:
        environment, ceilings = record.environment, record.ceilings
        head = (f"## {record.id}\n\n{environment['hardware']}, torch {environment['versions']['torch']}, "
                f"{record.started}, commit {commit_name(environment)}; ")
        head += (f"ceilings measured in this run: {ceilings['matmul_flops'] / 1e12:.3g} TFLOP/s, "
                 f"{ceilings['copy_bytes'] / 1e12:.3g} TB/s. " if ceilings else "")
        head += _settings_line(record)
        sections.append(head + "\n\n" + results_table(record))
        sections += [f"### Parts of a {'step' if result.case.work == 'train' else 'call'}: {result.case.name}\n\n"
                     + parts_table(record, result) for result in record.results if result.parts]
        if record.startup:
            sections.append("### Start-up, seconds\n\n" + startup_table(record))
        if record.reference:
            sections.append("### Differences between the two sides\n\n" + "\n".join(
                f"- {line}" for line in record.reference["differences"]))
    return "\n\n".join(sections) + "\n"


def targets_table(records: Sequence[BenchRecord]) -> str:
    """Return each target with what was measured, and in which record."""
    lines = [(target.name, f"{target.limit} {NAMES[target.against]}", "" if value is None else format_value(value),
              "not measured" if value is None else "met" if target.is_met(value) else "not met", source)
             for target, value, source in judge(records)]
    return _markdown(("what", "target", "measured", "", "record"), lines)


def measured_targets(records: Sequence[BenchRecord]) -> str:
    """Return what was measured of the targets, a row for each kind of work and a column for each size."""
    judged = [(target, value, value is not None and target.is_met(value)) for target, value, _ in judge(records)]
    sizes = list(dict.fromkeys(target.size for target, *_ in judged))
    rows: dict[str, dict[str, str]] = {}
    for target, value, met in judged:
        work = f"{dataclasses.replace(target, size='').name}, {NAMES[target.against]}"
        number = "not measured" if value is None else f"**{format_value(value)}**" if met else format_value(value)
        rows.setdefault(work, {})[target.size] = f"{number} ({target.limit})"
    lines = [(work, *(cells.get(size, "") for size in sizes)) for work, cells in rows.items()]
    return (f"{sum(met for *_, met in judged)} of {len(judged)} targets, in parentheses, are met: bold.\n\n"
            + _markdown(("", *sizes), lines) + "\n")


def _texts(records: Sequence[BenchRecord]) -> dict[str, str]:
    return {"table.md": table_markdown(records), "targets.md": measured_targets(records),
            "gaps.md": gaps_markdown(records)}


def results_table(record: BenchRecord) -> str:
    """Return a line a result."""
    lines = []
    for result in record.results:
        case = result.case
        keys = (case.workload, case.size, SYSTEMS.get(case.system, case.system), IMPLEMENTATIONS[case.implementation],
                " ".join(filter(None, (case.work, case.load))), str(case.batch))
        if result.status != OK or not result.samples_ms:
            reason = "stopped before it was timed" if result.status == OK else result.message or result.status
            lines.append((*keys, reason, *[""] * 6))
            continue
        low, middle, high = result.quartiles_ms
        mfu = record.mfu(result)
        lines.append((*keys, f"{result.images_per_second:,.0f}", f"{middle:.4g} [{low:.4g}, {high:.4g}]",
                      _ratio(record.ratio(result, system="dense")),
                      _ratio(record.ratio(result, implementation="reference-tf32")),
                      "" if mfu is None else f"{mfu:.1%}", "" if result.capacity is None else f"{result.capacity:.3f}",
                      f"{result.peak_bytes / 2**30:.1f}" if result.peak_bytes else ""))
    return _markdown(("workload", "size", "system", "code", "work", "batch", "images/s", "ms a call", "of dense",
                      "times authors, TF32", "MFU", "C", "peak GiB"), lines)


def parts_table(record: BenchRecord, result: Result) -> str:
    """Return a line a part, with what it reaches of the ceiling that bounds it."""
    step_ms = result.quartiles_ms[1]
    lines = []
    for part in result.parts:
        if "error" in part:
            lines.append((part["name"], str(part["count"]), part["error"], *[""] * 5))
            continue
        total = part["count"] * part["ms"]
        costs = ("", "", "")
        if part["flops"]:
            costs = (f"{part['flops'] / part['ms'] / 1e9:.3g}", f"{part['bytes'] / part['ms'] / 1e9:.3g}",
                     f"{record.least_ms(part) / part['ms']:.0%}")
        lines.append((part["name"], str(part["count"]), f"{total:.3g}", f"{total / step_ms:.0%}", *costs, part["how"]))
    return _markdown(("part", "times", "ms together", "share", "TFLOP/s", "TB/s", "of its ceiling", "ran"), lines)


def startup_table(record: BenchRecord) -> str:
    """Return a line a start."""
    names = list(record.startup[0]["seconds"])
    lines = [(line["workload"], line["size"], line["system"], line["cache"],
              *(f"{line['seconds'][name]:.1f}" for name in names), f"{line['total']:.1f}") for line in record.startup]
    return _markdown(("workload", "size", "system", "cache", *names, "total"), lines)


def figures(records: Sequence[BenchRecord]) -> dict[str, Figure]:
    """Return the figures that the records have data for, by name."""
    sns.set_theme(style="whitegrid", rc={"grid.color": "0.9", "axes.edgecolor": "0.4"})
    drawn = {}
    for name, draw, data in (("relative_speed", relative_speed, ratios_data(records)),
                             ("roofline", roofline, parts_data(records))):
        if not data.empty:
            drawn[name] = draw(data)
    return drawn


def ratios_data(records: Sequence[BenchRecord]) -> pd.DataFrame:
    """Return images/s relative to dense and to the authors' code, a line each; of equal cases the latest record's."""
    latest: dict[tuple, dict[str, object]] = {}
    for record in records:
        for result in record.find(implementation="ours"):
            for against, changes in (("dense", {"system": "dense"}),
                                     ("authors, TF32", {"implementation": "reference-tf32"}),
                                     ("authors, bf16", {"implementation": "reference-bf16"})):
                ratio = record.ratio(result, **changes)
                case = result.case
                if ratio is None or (against == "dense" and case.system == "dense"):
                    continue
                batch = "largest batches" if record.settings.get("largest") else f"batch {case.batch}"
                name = f"{case.workload} {case.size} {case.work}\n{batch}"
                system = SYSTEMS.get(case.system, case.system) + (", skewed load" if case.load == "skewed" else "")
                colour = LIGHTER if case.load == "skewed" else COLOURS.get(case.system, OTHER)
                latest[name, system, against] = {"case": name, "system": system, "colour": colour, "against": against,
                                                 "ratio": ratio}
    return pd.DataFrame(latest.values())


def relative_speed(data: pd.DataFrame) -> Figure:
    """Draw bars of images/s, one panel a base of comparison."""
    bases = list(dict.fromkeys(data.against))
    rows = max(data[data.against == base].groupby("case", sort=False).size().sum() for base in bases)
    figure, panels = plt.subplots(1, len(bases), figsize=(4.6 * len(bases) + 1, 1.6 + 0.36 * rows),
                                  layout="constrained", squeeze=False)
    legend: dict[str, object] = {}
    for axes, base in zip(panels[0], bases, strict=True):
        part = data[data.against == base]
        palette = dict(zip(part.system, part.colour, strict=True))
        sns.barplot(part, y="case", x="ratio", hue="system", palette=palette, ax=axes, errorbar=None)
        legend |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.get_legend().remove()
        for bars in axes.containers:
            axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axes.axvline(1, color="0.3", lw=1)
        axes.set(xlabel=f"images/s over {base}", ylabel="")
        axes.margins(x=0.12)
    figure.legend(legend.values(), legend.keys(), loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle("Speed relative to dense and to the authors' implementation, same run", x=0.01, ha="left")
    sns.despine(figure)
    return figure


def parts_data(records: Sequence[BenchRecord]) -> pd.DataFrame:
    """Return each part's intensity (FLOP/byte) and rate (TFLOP/s), with the ceilings, of the latest equal cases."""
    latest = {}
    for record in records:
        for result in record.results:
            for part in result.parts:
                if part.get("ms") and part["flops"] and result.case.work == "train":
                    case = result.case
                    name = f"{case.workload} {case.size} {SYSTEMS.get(case.system, case.system)}, batch {case.batch}"
                    latest[case, part["name"]] = {
                        "case": name,
                        "part": part["name"], "intensity": part["flops"] / part["bytes"],
                        "rate": part["flops"] / part["ms"] / 1e9, "ms": part["count"] * part["ms"],
                        "matmul": record.ceilings["matmul_flops"] / 1e12, "copy": record.ceilings["copy_bytes"] / 1e12,
                        "hardware": record.environment["hardware"]}
    return pd.DataFrame(latest.values())


def roofline(data: pd.DataFrame) -> Figure:
    """Draw where each part stands against the measured ceilings; a larger point takes more of its step."""
    data = data[data.hardware == data.hardware.iloc[-1]]
    figure, axes = plt.subplots(figsize=(10, 5.5), layout="constrained")
    matmul, copy = data["matmul"].max(), data["copy"].max()
    x = np.geomspace(data.intensity.min() / 3, max(data.intensity.max(), matmul / copy) * 3, 200)
    axes.plot(x, np.minimum(x * copy, matmul), color="0.3", lw=1.5)
    axes.annotate(f"{matmul:.3g} TFLOP/s, matrix product", (x[-1], matmul), (0, 4), textcoords="offset points",
                  ha="right", fontsize=8)
    axes.annotate(f"{copy:.3g} TB/s, copy", (x[20], x[20] * copy), (-4, 4), textcoords="offset points", ha="right",
                  fontsize=8)
    sns.scatterplot(data, x="intensity", y="rate", hue="part", style="case", size="ms", sizes=(40, 220), ax=axes,
                    palette="colorblind", edgecolor="white", zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte that must move", ylabel="TFLOP/s reached")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    axes.set_title(f"Parts of a training step against the measured ceilings, {data.hardware.iloc[-1]}", loc="left",
                   fontsize=11)
    sns.despine(figure)
    return figure


def _settings_line(record: BenchRecord) -> str:
    settings = record.settings
    return (f"{settings['precision']}, {'compiled' if settings['compile'] else 'eager'}, "
            f"{settings['sampling_steps']} sampling steps, {settings.get('sampling_batches', 2)} batches a sampling "
            f"call, {settings['rounds']} rounds.")


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [tuple(head), ("---",) * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
