"""Write the tables and figures of an ablations folder from its records, or check that they follow from them.

    python -m ablations.report results/digits/ablations           reads records/*.json; writes README.md, a page for
                                                                  each axis or grid, and figures/ (PNG, data as CSV)
    python -m ablations.report results/digits/ablations --check   exit 1 when a file does not follow from the records

An axis is compared with the default configuration, and its records are found by their configuration: a record that
differs from the default in anything but the axis is in no table.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from ablations.axes import DEFAULT, Axis, Design, Value, load_axes
from ablations.figures import draw_axis, draw_grid, save_figure
from diffmoe.cells import Row
from diffmoe.cli import run_command
from diffmoe.config import ConfigError, RunConfig, digest, from_dict
from diffmoe.records import Record, read_records
from diffmoe.report.command import report_command
from diffmoe.report.comparison import Comparison, compare
from diffmoe.report.figures import data_digest, drawn_from
from diffmoe.report.table import (
    group_rows,
    last_loss,
    log_distance,
    mean_log_distance,
    mean_sd,
    percent,
    protocol,
    second_distances,
)
from diffmoe.report.table1 import format_table
from diffmoe.report.verdicts import NOT_EVIDENCE

ABOUT = """\
To default: relative difference of the geometric means of the distance, with its 95 % interval over seeds; not adjusted
for the number of values. Values whose checkpoints are the default's, or trained with its losses to the last bit, are
compared on the seeds that both have (paired t), the others by Welch. Loss to default: relative difference of the
diffusion loss in training, mean of the last quarter of the steps, to that of the default with the same seed, whose
steps drew the same images, times and noise: less luck than in a distance; =: the default's own training. C: experts a
token, measured over all sampling calls. Activated: parameters that work on an average token, in millions, by the
paper's Eq. 40. Seconds: of one run; values that share a checkpoint share its training. ★: the paper's choice."""


class Ablations:
    """The records of a folder, by axis.

    Raises:
        ConfigError: for records without the default configuration, or with several.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        rows = group_rows(records)
        if DEFAULT not in rows:
            raise ConfigError(f"no record of the row {DEFAULT}, which every axis is compared with; run the sweep first")
        self.default = rows[DEFAULT]
        first = self.default[0]
        self.design = Design(from_dict(RunConfig, first.config), first.scale, load_axes())
        self._found = {same[0].config_digest: same for same in rows.values()}
        self.axes = [axis for axis in self.design.axes.values() if self._is_swept(axis)]
        """Axes that were varied."""
        pairs = {tuple(axis.name for axis in self.design.axes_of(row)): self.design.axes_of(row) for row in rows}
        self.grids = [pairs[names] for names in sorted(pairs) if len(names) == 2]
        """Pairs of axes that were varied together."""

    def of(self, row: Row) -> list[Record]:
        """Return the records of a row, by seed."""
        return self._found.get(digest(row.config), [])

    def _is_swept(self, axis: Axis) -> bool:
        """Say whether two values beside the default have records (one, of one): one may belong to another axis too."""
        others = [row for _, row in self.design.axis_rows(axis) if row.key != DEFAULT]
        return sum(bool(self.of(row)) for row in others) >= min(2, len(others)) > 0

    def measured(self, axis: Axis) -> list[tuple[Value, list[Record]]]:
        """Return the values of an axis that have records; the default is among them, as a value if it is one."""
        pairs = [(value, self.of(row)) for value, row in self.design.axis_rows(axis) if self.of(row)]
        if not any(records is self.default for _, records in pairs):
            pairs.insert(0, (Value(name=DEFAULT, label=DEFAULT), self.default))
        return pairs

    def is_default_training(self, record: Record) -> bool:
        """Say whether a record's network was trained as the default's; inference alone differs."""
        return record.training_digest == self.default[0].training_digest

    def loss_effect(self, record: Record) -> float:
        """Return the log ratio of the training loss to the default's of the same seed; NaN without, or where shared."""
        theirs = [other for other in self.default if other.seed == record.seed]
        if not theirs or self.is_default_training(record):
            return math.nan
        return math.log(last_loss(record) / last_loss(theirs[0]))

    def opponents(self, records: Sequence[Record]) -> tuple[list[Record], bool]:
        """Return the default's records that a row is compared with, and whether that is seed by seed.

        It is where both went through the same training: a row of the default's checkpoints, or of the same losses.
        """
        seeds = {record.seed for record in records} & {record.seed for record in self.default}
        paired = bool(seeds) and all(self.is_default_training(record) or self.loss_effect(record) == 0
                                     for record in records if record.seed in seeds)
        return ([record for record in self.default if record.seed in seeds], True) if paired else (self.default, False)

    def compare(self, records: Sequence[Record], metric: str = "distance") -> Comparison:
        """Compare a row's distances with the default's."""
        theirs, paired = self.opponents(records)
        seeds = {record.seed for record in theirs}
        ours = [record for record in records if not paired or record.seed in seeds]
        return compare(*([log_distance(record.metrics[metric], record.id) for record in group]
                         for group in (ours, theirs)), paired=paired)


def axis_data(ablations: Ablations, axis: Axis) -> pd.DataFrame:
    """Return one line a value and seed; `effect` is the relative difference to the default's geometric mean.

    `loss_effect`: that of the training loss to the default's of the same seed, NaN without one or where shared.
    """
    rows = [(value, records, mean_log_distance(ablations.opponents(records)[0]))
            for value, records in ablations.measured(axis)]
    return pd.DataFrame([
        {"value": value.name, "label": value.label + " ★" * value.paper, "default": records is ablations.default,
         "paper": value.paper, "seed": record.seed, "distance": record.metrics["distance"],
         "effect": math.expm1(log_distance(record.metrics["distance"], record.id) - theirs),
         "loss_effect": math.expm1(ablations.loss_effect(record)),
         "capacity": record.activation["capacity"],
         "activated_params": record.activation["activated_params"], "training_s": record.training["seconds"],
         "sampling_s": record.sampling["seconds"]}
        for value, records, theirs in rows for record in records])


def grid_data(ablations: Ablations, first: Axis, second: Axis) -> pd.DataFrame:
    """Return one line a pair of values that has records."""
    rows = ablations.design.grid_rows(first, second)
    lines = []
    for one, two in itertools.product(first.at(ablations.design.scale), second.at(ablations.design.scale)):
        records = ablations.of(rows[one.name, two.name]) if (one.name, two.name) in rows else []
        if records:
            lines.append({first.name: one.label + " ★" * one.paper, second.name: two.label + " ★" * two.paper,
                          "default": records is ablations.default, "seeds": len(records),
                          "effect": math.expm1(ablations.compare(records).effect)})
    return pd.DataFrame(lines)


def axis_table(ablations: Ablations, axis: Axis) -> list[list[str]]:
    """Return the table of an axis as text cells, header first."""
    name = ablations.default[0].evaluation["distance_name"]
    others = second_distances([record for _, records in ablations.measured(axis) for record in records])
    distances = [cell for heading in (name, *others) for cell in (heading, "to default", "95 % interval")]
    lines = [[axis.name.replace("_", " "), "C", "activated, M", *distances, "loss to default, %", "training, s",
              "sampling, s", "seeds"]]
    for value, records in ablations.measured(axis):
        label = value.label + " ★" * value.paper
        lines.append([
            f"**{label}**" if records is ablations.default else label,
            mean_sd([record.activation["capacity"] for record in records]),
            mean_sd([record.activation["activated_params"] / 1e6 for record in records]),
            *(cell for metric in ("distance", *others) for cell in _distances(ablations, records, metric)),
            _losses(ablations, records),
            mean_sd([record.training["seconds"] for record in records]),
            mean_sd([record.sampling["seconds"] for record in records]), str(len(records))])
    return lines


def _losses(ablations: Ablations, records: Sequence[Record]) -> str:
    if ablations.is_default_training(records[0]):
        return "="
    effects = [100 * math.expm1(effect) for effect in map(ablations.loss_effect, records) if not math.isnan(effect)]
    return mean_sd(effects) if effects else "-"


def _distances(ablations: Ablations, records: Sequence[Record], metric: str) -> list[str]:
    mean = mean_sd([record.metrics[metric] for record in records])
    if records is ablations.default:
        return [mean, "(default)", "-"]
    found = ablations.compare(records, metric)
    return [mean, percent(found.effect), "-" if found.interval is None else " to ".join(map(percent, found.interval))]


def report_files(ablations: Ablations) -> dict[str, str]:
    """Return every text file of the report, by its path in the folder."""
    files = {"README.md": _index(ablations)}
    for axis in ablations.axes:
        files[f"{axis.name}.md"] = _page(ablations, axis.title, axis.name, [
            axis.question, f"**The paper**: {axis.paper}", format_table(axis_table(ablations, axis)), ABOUT])
        files[f"figures/{axis.name}.csv"] = _csv(axis_data(ablations, axis))
    for one, two in ablations.grids:
        name = _grid_name(one, two)
        files[f"{name}.md"] = _page(ablations, _grid_title(one, two), name, [
            "Relative difference of the distance to the default configuration; ★: the paper's choice on each axis."])
        files[f"figures/{name}.csv"] = _csv(grid_data(ablations, one, two))
    return files


def _page(ablations: Ablations, title: str, name: str, paragraphs: Sequence[str]) -> str:
    return "\n\n".join([f"# {title}", *paragraphs, f"![{title}](figures/{name}.png)", _protocol(ablations)]) + "\n"


def _index(ablations: Ablations) -> str:
    pages = [(axis.title, axis.name, axis_data(ablations, axis)) for axis in ablations.axes]
    pages += [(_grid_title(*axes), _grid_name(*axes), grid_data(ablations, *axes)) for axes in ablations.grids]
    lines = [["axis", "values", "to default, from", "to"]]
    for title, name, data in pages:
        column = "value" if "value" in data else data.columns[0]
        means = data[~data.default].groupby([column, *(["seeds"] if "seeds" in data else [])]).effect.mean()
        lines.append([f"[{title}]({name}.md)", str(len(data.drop_duplicates(list(data.columns[:2])))),
                      percent(math.log1p(means.min())), percent(math.log1p(means.max()))])
    heading = f"# Ablations, scale {ablations.design.scale}"
    return "\n\n".join([heading, format_table(lines), _protocol(ablations)]) + "\n"


def _protocol(ablations: Ablations) -> str:
    caution = f" A {NOT_EVIDENCE}." if ablations.design.scale == "digits" else ""
    return f"Scale {ablations.design.scale}. {protocol(ablations.default)}{caution}"


def _grid_name(one: Axis, two: Axis) -> str:
    return f"{one.name}-by-{two.name}"


def _grid_title(one: Axis, two: Axis) -> str:
    return f"{one.title}, by {two.title[0].lower()}{two.title[1:]}"


def _csv(data: pd.DataFrame) -> str:
    return data.to_csv(index=False, lineterminator="\n")


def write_report(folder: Path) -> list[Path]:
    """Write the report of `folder`/records and return the paths.

    Raises:
        ConfigError: for records that cannot be read or compared, or a folder that cannot be written.
    """
    ablations = Ablations(read_records(folder / "records"))
    files = report_files(ablations)
    paths = [folder / name for name in files]
    note = _protocol(ablations)
    distance = ablations.default[0].evaluation["distance_name"]

    def save(figure: Figure, name: str) -> Path:
        return save_figure(figure, folder / "figures" / f"{name}.png", data_digest(files[f"figures/{name}.csv"]))

    try:
        (folder / "figures").mkdir(exist_ok=True)
        for path, text in zip(paths, files.values(), strict=True):
            path.write_text(text, encoding="utf-8")
        for axis in ablations.axes:
            paths.append(save(draw_axis(axis_data(ablations, axis), axis.title, note, distance), axis.name))
        for one, two in ablations.grids:
            data, title = grid_data(ablations, one, two), _grid_title(one, two)
            paths.append(save(draw_grid(data, title, note, distance), _grid_name(one, two)))
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error})") from None
    return paths


def check_report(folder: Path) -> list[str]:
    """Return a line for each file that does not follow from the records; of a figure, its data and that it is there.

    Raises:
        ConfigError: for records that cannot be read or compared.
    """
    problems = []
    for name, expected in report_files(Ablations(read_records(folder / "records"))).items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != expected:
            problems.append(f"{path}: does not follow from the records")
        if path.suffix == ".csv" and drawn_from(path.with_suffix(".png")) != data_digest(expected):
            problems.append(f"{path.with_suffix('.png')}: was not drawn from these records")
    return problems


def main(arguments: list[str]) -> int:
    """Run the command line."""
    return report_command(arguments, "python -m ablations.report", __doc__, write_report, check_report)


if __name__ == "__main__":
    sys.exit(run_command(main))
