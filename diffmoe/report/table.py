"""The results table: one line a row of the benchmark, mean and sd over seeds, the paper's numbers beside ours.

Made from records alone. A table holds one scale, one way to sample and one way to measure; a mixture is refused.
Inference options that a row is about (thresholds, static or dynamic, selection) belong to its router and may differ.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from diffmoe.config import ConfigError, TrainingConfig, digest, from_dict
from diffmoe.records import Record
from diffmoe.report.table1 import format_table

PAPER = Path(__file__).with_name("paper_results.yaml")
ROW_ORDER = ("tc", "dense", "ec-static", "ec-dynamic", "diffmoe-static", "diffmoe", "diffmoe-predictor", "expert-race",
             "dense-large")
"""Lines of the table from the top; rows of other names follow in alphabetical order."""
BASELINE = "dense"
CORE_METRICS = ("distance", "distance_se", "kid", "kid_std", "precision", "recall")
DISTANCES = ("FD-", "FID")
"""How the names of distances begin; see `distance_name`."""
MEASURED = ("capacity", "activated_params", "activated_params_strict", "gflops", "total_params")
CHANCE = 1.96 * math.sqrt(2)
"""Two independent runs differ by less than this many standard deviations of one, 19 times in 20."""


def group_rows(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the records of each row in the table's order, sorted by seed, once they are known to be comparable.

    Raises:
        ConfigError: for no records, a mixture, a row with two configurations, or a cell that is there twice.
    """
    require_one_protocol(records)
    rows: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: (row_order(record.row), record.seed, record.id)):
        same = rows.setdefault(record.row, [])
        if same and same[0].config_digest != record.config_digest:
            raise ConfigError(f"row {record.row}: mixed configurations {same[0].config_digest} and "
                              f"{record.config_digest}; move the records of one of them away")
        if same and same[-1].seed == record.seed:
            raise ConfigError(f"row {record.row}: seed {record.seed} is there twice, in {same[-1].id} and {record.id}")
        same.append(record)
    return rows


def with_dense(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Return each record with Dense's of the same seed and training settings, whose steps drew the same images.

    A varied value is one of the settings. Dense's own are left out, and records without such a partner.
    """
    dense = {_draws(record): record for record in records if _is_baseline(record)}
    return [(record, dense[_draws(record)]) for record in records
            if _draws(record) in dense and not _is_baseline(record)]


def _is_baseline(record: Record) -> bool:
    return re.fullmatch(rf"{BASELINE}(-[\d.e-]+)?", record.row) is not None


def _draws(record: Record) -> tuple[int, str]:
    training = from_dict(TrainingConfig, record.config["training"])  # what an old record lacks has its default
    return record.seed, digest(replace(training, expert_rate=1.0))  # Dense has no experts


def require_one_protocol(records: Sequence[Record]) -> None:
    """Refuse records that were not sampled and measured in one way.

    Raises:
        ConfigError: for no records, or a mixture.
    """
    if not records:
        raise ConfigError("no records: nothing to report; run the cells first")
    first = min(records, key=lambda record: record.id)
    for record in records:
        theirs = _protocol(record)
        for what, ours in _protocol(first).items():
            if ours != theirs[what]:
                raise ConfigError(f"mixed {what}: {first.id} has {ours}, {record.id} has {theirs[what]}; "
                                  "report them in separate folders")


def _protocol(record: Record) -> dict[str, Any]:
    """Return what the records of one table must agree in, by its name in an error."""
    evaluation = record.evaluation
    return configured_protocol(record.config) | {
        "scales": record.scale, "sample counts": record.sampling["num_samples"], "extractors": evaluation["extractor"],
        "distances": evaluation["distance_name"], "references": evaluation["reference"]}


def configured_protocol(config: dict[str, Any]) -> dict[str, Any]:
    """Return what the configurations of one table must agree in, by its name in an error."""
    evaluation, sampling = config["evaluation"], config["sampling"]
    return {"sample counts": evaluation["num_samples"], "extractors": evaluation["extractor"],
            "samplers": _sampler(sampling), "sampling steps": sampling["num_steps"], "guidance": _guidance(sampling),
            "KID subset sizes": evaluation["kid_subset_size"]}


def _sampler(sampling: dict[str, Any]) -> str:
    """Name the integrator with the options that change its steps."""
    options = [f"eta {sampling['ddim_eta']:g}"] if sampling["sampler"] == "ddim" else []
    options += ["clipped"] if sampling["clip_denoised"] else []
    return ", ".join([sampling["sampler"], *options])


def _guidance(sampling: dict[str, Any]) -> str:
    """Name the guidance; how the halves meet is nothing without one."""
    scale, channels = sampling["guidance_scale"], sampling["guided_channels"]
    if scale == 1:
        return "1"
    return f"{scale:g} ({'all' if channels is None else channels} channels, {sampling['guided_forward']})"


def row_order(row: str) -> tuple[int, list[str | float]]:
    """Return the key that sorts rows into the table's order, and other rows by name, numbers in it by their value."""
    parts = [float(part) if part[:1].isdigit() else part for part in re.split(r"(\d+(?:\.\d+)?)", row)]
    return ROW_ORDER.index(row) if row in ROW_ORDER else len(ROW_ORDER), parts


def results_table(records: Sequence[Record]) -> list[list[str]]:
    """Return the table as text cells, header first.

    Raises:
        ConfigError: as `group_rows` does.
    """
    rows = group_rows(records)
    seconds = second_distances(records)
    extras = sorted({name for record in records for name in record.metrics} - {*CORE_METRICS, *seconds})
    distance_name = records[0].evaluation["distance_name"]
    table = [["system", "C", "activated, M: paper", "strict", "GFLOPs", distance_name, *seconds, "KID x1000",
              "precision", "recall", *(name.replace("_", " ") for name in extras), "seeds",
              f"{distance_name} to Dense", "published FID", "published to Dense", "differs"]]
    for row, same in rows.items():
        table.append([
            same[0].label, _measured(same, "capacity"), _measured(same, "activated_params", 1e6),
            _measured(same, "activated_params_strict", 1e6), _measured(same, "gflops"),
            _metric(same, "distance"), *(_metric(same, name) for name in seconds), _metric(same, "kid", 1000),
            _metric(same, "precision"), _metric(same, "recall"), *(_metric(same, name) for name in extras),
            str(len(same)), *_beside_paper(row, rows)])
    return table


def second_distances(records: Sequence[Record]) -> list[str]:
    """Name the distances by further extractors that all records have."""
    shared = set.intersection(*(set(record.metrics) for record in records))
    return sorted(name for name in shared if name.startswith(DISTANCES))


def distance_names(records: Sequence[Record]) -> dict[str, str]:
    """Return the name of the extractor's distance by that of its metric, for all that all records have."""
    return {"distance": records[0].evaluation["distance_name"]} | {name: name for name in second_distances(records)}


def _beside_paper(row: str, rows: dict[str, list[Record]]) -> list[str]:
    """Return our difference to Dense, the published FID, its difference to Dense, and whether the two differ."""
    paper = yaml.safe_load(PAPER.read_text())
    fid = paper["rows"].get(row, {}).get("fid")
    ours = (mean_log_distance(rows[row]) - mean_log_distance(rows[BASELINE]) if BASELINE in rows and row != BASELINE
            else None)
    theirs = math.log(fid / paper["rows"][BASELINE]["fid"]) if fid and row != BASELINE else None
    differs = "-"
    if ours is not None and theirs is not None:
        differs = "yes" if abs(ours - theirs) > CHANCE * paper["seed_cv"] else "no"
    return [percent(ours), f"{fid:.2f}" if fid else "-", percent(theirs), differs]


def last_loss(record: Record) -> float:
    """Return the diffusion loss of training, mean of the last quarter of the steps."""
    return fmean(losses["mse"] for step, losses in record.training["losses"] if step > 0.75 * record.training["steps"])


def mean_log_distance(records: Sequence[Record]) -> float:
    """Return the mean of the log distances: differences of it are relative differences of geometric means."""
    return fmean(log_distance(record.metrics["distance"], record.id) for record in records)


def log_distance(distance: float, name: str) -> float:
    """Return the logarithm of a distance that must be finite and above 0.

    Raises:
        ConfigError: when it is not.
    """
    if not (math.isfinite(distance) and distance > 0):
        raise ConfigError(f"{name}: distance={distance}: relative differences need a distance above 0")
    return math.log(distance)


def percent(log_ratio: float | None) -> str:
    """Write the logarithm of a ratio as a relative difference."""
    return "-" if log_ratio is None else f"{100 * math.expm1(log_ratio):+.1f} %"


def mean_sd(values: Sequence[float]) -> str:
    """Write mean ± sd; the sd has two significant digits and the mean as many decimals; one value has four digits."""
    mean = fmean(values)
    sd = stdev(values) if len(values) > 1 else 0.0
    if not math.isfinite(mean) or sd < 1e-6 * abs(mean) or sd == 0:
        return f"{mean:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(sd)))
    return f"{mean:.{decimals}f} ± {sd:.{decimals}f}"


def _measured(records: Sequence[Record], name: str, unit: float = 1.0) -> str:
    return mean_sd([record.activation[name] / unit for record in records])


def _metric(records: Sequence[Record], name: str, factor: float = 1.0) -> str:
    values = [factor * record.metrics[name] for record in records if name in record.metrics]
    return mean_sd(values) if len(values) == len(records) else "-"


def table_markdown(records: Sequence[Record]) -> str:
    """Return the table with the protocol that its numbers hold for."""
    paper = yaml.safe_load(PAPER.read_text())
    models = ", ".join(entry["model"] for entry in paper["rows"].values())
    first = records[0]
    cv = paper["seed_cv"]
    return f"""{format_table(results_table(records))}

Scale {first.scale}. {protocol(records)} Mean ± sd over seeds.{_floor_sentence(records)}
C: experts a token, measured over all sampling calls. Activated: parameters that work on an average token, in millions,
by the paper's Eq. 40 and strictly (whatever runs on every token counts whole). GFLOPs of one network call on one image.

Published: FID-50K on ImageNet 256 after 700K steps without guidance, one seed each, of
{models}.
`to Dense` is the relative difference of geometric means to the row Dense. `differs` says yes where the logarithms of
our ratio to Dense and of the published one are more than {CHANCE * cv:.3f} apart: 1.96 √2 times {cv:.0%}, the upper end
of the published coefficient of variation of FID over training seeds. Two ratios within it may differ by seeds alone.
"""


def floors(records: Sequence[Record]) -> dict[str, float]:
    """Return what as many training images keep from all of them, by the distance's name, where records tell it."""
    found: dict[str, list[float]] = {}
    for record in records:
        for name, floor in record.evaluation.get("floor", {}).items():
            found.setdefault(name, []).append(floor)
    return {name: fmean(values) for name, values in found.items()}


def _floor_sentence(records: Sequence[Record]) -> str:
    found = ", ".join(f"{name} {floor:.4g}" for name, floor in floors(records).items())
    return found and f"\nThe training set's floor, as many of its images measured in place of samples: {found}."


def protocol(records: Sequence[Record]) -> str:
    """Say in sentences how the numbers were measured."""
    first = records[0]
    seeds = sorted({record.seed for record in records})
    images: dict[str, set[int]] = {}
    for record in records:
        images.setdefault(_sampling(record), set()).add(record.training["images"])
    ways = "; ".join(f"{' or '.join(map(str, sorted(images[way])))} training images, {way}" for way in sorted(images))
    return (f"{first.evaluation['distance_name']} of {first.sampling['num_samples']} samples to {first.data['name']} "
            f"({first.evaluation['reference']}), {ways}, seeds {', '.join(map(str, seeds))}.")


def _sampling(record: Record) -> str:
    sampling = record.config["sampling"]
    return (f"{record.config['diffusion']['process']}, {_sampler(sampling)}, {sampling['num_steps']} steps, "
            f"guidance {_guidance(sampling)}")


def table_csv(records: Sequence[Record]) -> str:
    """Return every number of the table in tidy form: one line a row, seed and metric, unrounded."""
    lines = []
    for row, same in group_rows(records).items():
        for record in same:
            numbers = {name: record.activation[name] for name in MEASURED} | record.metrics
            lines += [[record.scale, row, record.label, record.system, record.seed, metric, value]
                      for metric, value in numbers.items()]
    return write_csv([["scale", "row", "label", "system", "seed", "metric", "value"], *lines])


def write_csv(lines: Sequence[Sequence[Any]]) -> str:
    """Return lines of cells as CSV text."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
