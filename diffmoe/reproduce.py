"""Reproduce the paper's main table at a scale: run the cells that are missing, cheapest first, then write the table.

    python -m diffmoe.reproduce --rows baselines/table1.yaml --scale digits

A user's runs and records lie under results/<scale>/local (ignored by git); what is recorded is skipped, and what was
interrupted goes on. `--publish` copies the records to results/<scale>/records.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from statistics import mean

from tqdm import tqdm

from diffmoe.cells import (
    Cell,
    Row,
    Store,
    at_budgets,
    check_cells,
    gpu_turn,
    group_by_training,
    load_rows,
    missing_cells,
    run_cell,
    run_name,
)
from diffmoe.cli import TrainingBar, choose_device, require_places, run_command
from diffmoe.config import ConfigError, require, to_dict
from diffmoe.data import load_data
from diffmoe.data.latent_data import LATENTS
from diffmoe.plan import plan
from diffmoe.records import Record, read_records
from diffmoe.report.__main__ import write_report
from diffmoe.report.budgets import by_budget
from diffmoe.report.table import configured_protocol, results_table
from diffmoe.report.table1 import format_table
from diffmoe.tracking.live import Tracker, add_track_option
from diffmoe.training.checkpoint import load_weights, save_weights
from diffmoe.training.ema import average_file
from diffmoe.workers import cpu_count, run_cells, visible_gpus

CONFIGS = Path(__file__).parent / "configs"
RESULTS = Path("results")
MAX_PUBLISHED_BYTES = 1_000_000
"""Weights above this are not for a git repository."""

LEFT_OUT = {"strict", "GFLOPs", "KID x1000", "precision", "recall"}


def main(arguments: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmoe.reproduce", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, action="append", metavar="FILE",
                        help="the table's rows (YAML); repeated: of several files in one folder")
    parser.add_argument("--scale", default="digits", help="name of a file in diffmoe/configs (default: digits)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="so many seeds (default: 3)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N",
                        help="the first of them (default: 0); machines can share a table by seeds and rows")
    parser.add_argument("--only", metavar="ROW,...", help="these rows of the files (default: all)")
    parser.add_argument("--time-budget", type=float, default=math.inf, metavar="MINUTES",
                        help="save and stop after this long; the same command goes on")
    parser.add_argument("--jobs", type=int, metavar="N",
                        help="processes at work at a time (default: one a GPU, else one a core); on one GPU they take "
                             "turns, and one measures while another trains")
    parser.add_argument("--processes", type=int, default=1, metavar="N",
                        help="train and sample each network by N processes, a GPU each, one network after another "
                             "(default: 1)")
    parser.add_argument("--out", type=Path, help="folder of runs and records (default: results/<scale>/local)")
    add_track_option(parser)
    parser.add_argument("--dry-run", action="store_true",
                        help="list the missing cells; of several tables, or without published records, what rows cost "
                             "on a GPU")
    parser.add_argument("--gpus", type=int, default=8, metavar="N",
                        help="with --dry-run: GPUs that memory is stated for (default: 8)")
    parser.add_argument("--publish", action="store_true",
                        help="copy the records of <folder>/local to <folder>/records and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    scale = CONFIGS / f"{options.scale}.yaml"
    if not scale.exists():
        raise ConfigError(f"--scale {options.scale}: there is {', '.join(scales())}")
    store = Store(options.out or RESULTS / options.scale / "local")
    published = store.folder.parent if store.folder.name == "local" else RESULTS / options.scale
    if options.publish:
        return publish(store, published)
    tables = {str(path): load_rows(path, scale, options.overrides) for path in options.rows}
    if options.only is not None:
        tables = _choose(tables, options.only.split(","))
    if options.dry_run and (len(tables) > 1 or not (published / "records").is_dir()):
        print(plan(tables, options.seeds, max(options.gpus, 1), RESULTS / "bench"))
        if len(tables) > 1 or LATENTS in {row.config.data.name for rows in tables.values() for row in rows}:
            return 0  # to list the cells would need the data
    rows = at_budgets(_together(tables))
    data = load_data(rows[0].config.data, rows[0].config.model)
    device = choose_device(rows[0].config.runtime.device)
    require_places(options.processes, device)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    cells = missing_cells(rows, seeds, data, store)
    check_cells(cells, data)
    groups = group_by_training(cells)
    processors = len(visible_gpus()) if device.type == "cuda" else cpu_count()
    jobs = min(options.jobs or processors, max(1, len(cells)))
    if options.processes > 1:
        require(options.jobs in (None, 1), "--jobs", options.jobs, "with --processes, networks train one after another")
        jobs = 1
    wanted = len(rows) * options.seeds
    print(f"{len(rows)} rows x {options.seeds} seeds: {wanted - len(cells)} cells recorded, {len(cells)} to run, "
          f"{jobs} at a time; {estimate(groups, jobs, published)}", flush=True)
    if options.dry_run:
        for cell in cells:
            print(f"  {cell.record_id(data)}")
        return 0
    if cells:
        run = partial(run_cell, scale=options.scale, data=data, store=store, device=device, processes=options.processes,
                      turn=partial(gpu_turn, store.folder, device),
                      deadline=time.monotonic() + 60 * options.time_budget)
        with Tracker(options.track, options.scale, [row.config for row in rows]) as tracker, ExitStack() as stack:
            for cell, *_ in groups:
                stack.enter_context(tracker.follow(store.run_folder(cell, data), cell.row.config, cell.seed,
                                                   data.digest, cell.row.system))
            # On a CPU always one thread, so that a result is one at any --jobs; beside a GPU they measure the samples.
            threads = max(1, cpu_count() // jobs) if device.type == "cuda" else 1
            _run(cells, partial(run_cells, run=run, jobs=jobs, threads=threads,
                                is_trained=partial(store.is_trained, data=data)), store, tracker)
    write_report(store.folder)
    for budget, records in by_budget(read_records(store.records)).items():
        print(f"\n{budget}\n\n{brief_table(records)}" if budget else brief_table(records))
    print(f"table, verdicts and figures: {store.folder}")
    return 0


def _choose(tables: dict[str, list[Row]], keys: list[str]) -> dict[str, list[Row]]:
    known = dict.fromkeys(row.key for rows in tables.values() for row in rows)
    for key in keys:
        require(key in known, "--only", key, f"use rows of the files: {', '.join(known)}")
    chosen = {path: [row for row in rows if row.key in keys] for path, rows in tables.items()}
    return {path: rows for path, rows in chosen.items() if rows}


def _together(tables: dict[str, list[Row]]) -> list[Row]:
    """Return the rows of all tables, once they can share a folder: each there once, all measured in one way."""
    rows = [row for table in tables.values() for row in table]
    for key, times in Counter(row.key for row in rows).items():
        require(times == 1, "--rows", key, "the row is in two files; give each file a run and an --out of its own")
    first = configured_protocol(to_dict(rows[0].config))
    for row in rows:
        for what, ours in configured_protocol(to_dict(row.config)).items():
            require(ours == first[what], "--rows", row.key, f"mixed {what}: {ours}, and {first[what]} of "
                    f"{rows[0].key}; give each file a run and an --out of its own")
    return rows


def _run(cells: list[Cell], run: Callable[..., Iterator[Record]], store: Store, tracker: Tracker) -> None:
    """Run the cells, show how far each is, and print the table whenever a seed is complete."""
    left = Counter((cell.row.config.images_seen, cell.seed) for cell in cells)
    bars: dict[tuple[str, int], TrainingBar] = {}

    def watch(cell: Cell, step: int, losses: dict[str, float]) -> None:
        steps = cell.row.config.images_seen // cell.row.config.training.batch_size
        bar = bars.setdefault((cell.name, steps), TrainingBar(cell.name, steps, leave=False))
        bar.update(step, losses)
        if step == steps:
            bar.close()

    with ExitStack() as stack:
        overall = stack.enter_context(tqdm(total=left.total(), desc="cells", unit="cell"))
        stack.callback(lambda: [bar.close() for bar in bars.values()])
        for record in stack.enter_context(closing(run(cells, watch=watch))):
            tracker.publish(record)
            tqdm.write(_summary(record))
            overall.update()
            budget = record.training["images"]
            left[budget, record.seed] -= 1
            if left[budget, record.seed] == 0 and left.total():
                complete = [other for other in read_records(store.records)
                            if other.training["images"] == budget and not left[budget, other.seed]]
                tqdm.write(f"\n{brief_table(complete)}\n")


def brief_table(records: list[Record]) -> str:
    """Return the results table without the columns that a terminal has no room for; table.md has them all."""
    header, *lines = results_table(records)
    shown = [index for index, name in enumerate(header) if name not in LEFT_OUT]
    return format_table([[line[index] for index in shown] for line in (header, *lines)])


def estimate(groups: list[list[Cell]], jobs: int, published: Path) -> str:
    """Say how long groups of cells take by the times of the published records of their rows at their budgets."""
    training: dict[tuple[str, int], list[float]] = {}
    measuring: dict[tuple[str, int], list[float]] = {}
    for record in read_records(published / "records"):
        key = record.row, record.training["images"]
        training.setdefault(key, []).append(record.training["seconds"])
        seconds = record.sampling["seconds"] + record.evaluation["seconds"]
        measuring.setdefault(key, []).append(seconds * (1 + len(record.threshold_sweep)))
    keys = [[(cell.row.key, cell.row.config.images_seen) for cell in group] for group in groups]
    if not all(key in training for group in keys for key in group):
        return "no published record to estimate the time from"
    total = sum(max(mean(training[key]) for key in group) + sum(mean(measuring[key]) for key in group)
                for group in keys)
    chains = max(1, min(jobs, len(groups)))  # a group's training is one process's
    return f"about {total / chains / 60:.0f} min where the published records were made"


def scales() -> list[str]:
    """Name the scales that have a configuration and a larger dense model."""
    return sorted(path.stem.removesuffix("-larger") for path in CONFIGS.glob("*-larger.yaml"))


def publish(store: Store, folder: Path) -> int:
    """Copy the user's new records beside the published ones and write the report from all of them."""
    publish_weights(store.publish(folder), store, folder / "checkpoints")
    write_report(folder)
    return 0


def publish_weights(records: list[Record], store: Store, folder: Path) -> None:
    """Copy the small averaged networks of seed 0 in half precision, each under its shortest row's name.

    Those of whole runs that lie here; records may have come from another machine without their weights.
    """
    shortest: dict[str, Record] = {}
    for record in sorted(records, key=lambda record: len(record.row), reverse=True):
        if record.seed == 0 and record.config["evaluation"].get("budget_images") is None:
            shortest[record.training_digest] = record
    for record in shortest.values():
        path = store.folder / "runs" / run_name(record) / average_file()
        if not path.exists():
            continue
        weights, description = load_weights(path)
        half = {name: value.half() for name, value in weights.items()}
        if sum(2 * value.numel() for value in half.values()) <= MAX_PUBLISHED_BYTES:
            folder.mkdir(exist_ok=True)
            save_weights(folder / f"{record.row}.safetensors", half, description | {"config": record.config})


def _summary(record: Record) -> str:
    distance = f"{record.evaluation['distance_name']} {record.metrics['distance']:.2f}"
    return (f"{record.label}, seed {record.seed}: {distance}, C {record.activation['capacity']:.3f}; trained "
            f"{record.training['seconds']:.0f} s, sampled {record.sampling['num_samples']} images in "
            f"{record.sampling['seconds']:.0f} s, measured in {record.evaluation['seconds']:.0f} s")


if __name__ == "__main__":
    sys.exit(run_command(main))
