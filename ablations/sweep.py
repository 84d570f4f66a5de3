"""Ablations: vary one thing of the method at a time and see what it does, on Ray Tune.

    python -m ablations.sweep --list
    python -m ablations.sweep --axis pool,predictor,experts --scale digits --seeds 3
    python -m ablations.sweep --grid pool,experts                    two axes together: a heat map
    python -m ablations.sweep --axis pool --scale cifar10 --gpus-per-trial 0.25 --address auto
    python -m ablations.sweep --scale digits --publish               the records, to results/digits/ablations

Runs and records lie under results/<scale>/local/ablations (ignored by git), with a page for each axis. What is recorded
is skipped and what was interrupted goes on: give the same command again. Rows that differ in inference alone share
one training. Any key of the configuration can be set (training.num_images=51200): it holds for every trial, and
wants a folder of its own (--out).
"""

from __future__ import annotations

import argparse
import logging
import math
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ablations.axes import DEFAULT, Axis, Design, choose_axes, load_axes
from ablations.driver import Resources, forget, run_trials, sweep_name
from ablations.estimate import describe_cost
from ablations.publishing import Publisher, Quiet
from ablations.report import write_report
from ablations.trials import Trials, Work, make_trials
from diffmoe.cells import Cell, Row, Store, check_cells
from diffmoe.cli import run_command
from diffmoe.config import ConfigError, digest, load_config, require
from diffmoe.data import ImageData, load_data
from diffmoe.records import Record, read_records
from diffmoe.report.table1 import format_table
from diffmoe.reproduce import CONFIGS, RESULTS, scales
from diffmoe.training.checkpoint import locked
from diffmoe.training.run import Interrupted
from diffmoe.workers import cpu_count


def main(arguments: list[str]) -> int:
    """Run the command line."""
    options = _parse(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    axes = load_axes()
    store = Store((options.out or RESULTS / options.scale / "local" / "ablations").absolute())
    if options.list:
        print(_axes_table(axes.values()))
        return 0
    if options.publish:
        folder = RESULTS / options.scale / "ablations"
        store.publish(folder)
        write_report(folder)
        return 0
    require(options.seeds >= 1, "--seeds", options.seeds, "use 1 or more")
    resources = Resources(address=options.address, jobs=options.jobs, gpus_per_trial=options.gpus_per_trial)
    design = _design(options.scale, options.overrides, axes)
    rows = _plan(design, options.axis, options.grid)
    data = load_data(design.base.data, design.base.model)
    trials = make_trials(rows, range(options.seeds))
    missing = _missing(trials, data, store)
    num_missing = sum(map(len, missing.values()))
    print(f"{len(rows)} rows x {options.seeds} seeds: {len(rows) * options.seeds - num_missing} recorded, "
          f"{num_missing} to run in {len(missing)} trials", flush=True)
    for key, reason in design.left_out.items():
        print(f"left out: {key} ({reason})")
    if options.dry_run:
        print(describe_cost(missing, _known_records(store, options.scale), store, data, options.jobs or cpu_count()))
        return 0
    check_cells([cell for cells in missing.values() for cell in cells], data)
    work = Work(scale=options.scale, store=store, folder=Path.cwd(), explore=options.explore,
                deadline=time.time() + 60 * options.time_budget)
    if options.explore:
        return _explore(trials, replace(work, store=Store(store.folder / "explore")), resources)
    with locked(store.folder):
        _require_one_default(store, design.default)
        return _sweep(trials, data, work, resources, _mlflow(options))


def _sweep(trials: Trials, data: ImageData, work: Work, resources: Resources, mlflow: Path | str | None) -> int:
    """Run what is missing, write the pages, publish all; return the exit code."""
    store = work.store
    publisher = Publisher(store=store, target=mlflow, table=f"{work.scale}, local ablations",
                          ids={name: [cell.record_id(data) for cell in cells] for name, cells in trials.items()})
    failed = _run(trials, data, work, resources, publisher)
    if any(store.records.glob(f"{DEFAULT}-*.json")):
        write_report(store.folder)
        publisher.publish_all(sorted((store.folder / "figures").glob("*.png")))
        print(f"a page for each axis: {store.folder / 'README.md'}")
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    if not failed and _missing(trials, data, store):
        raise Interrupted(None)
    return 1 if failed else 0


def _run(trials: Trials, data: ImageData, work: Work, resources: Resources, publisher: Publisher) -> list[str]:
    """Run the trials with cells that are not recorded; return a line for each that failed."""
    name = sweep_name(trials, explore=False)
    for _ in range(2):  # a sweep that Ray goes on with may not hold all that is missing by now
        missing = _missing(trials, data, work.store)
        if not missing or time.time() > work.deadline:
            return []
        ended = _interruptible(list(missing), trials, work, resources, name, [publisher])
        forget(work, name)
        if failed := [f"{trial['trial']}: {trial['error']}" for trial in ended if trial["error"]]:
            return failed
    return []


def _explore(trials: Trials, work: Work, resources: Resources) -> int:
    """Let ASHA drop trainings whose loss is behind, and print how far each came; nothing of it enters a table."""
    ended = _interruptible(list(trials), trials, work, resources, sweep_name(trials, explore=True), [Quiet()])
    ended.sort(key=lambda trial: (-trial.get("step", 0), trial.get("loss", math.inf)))
    print(format_table([["trial", "steps", "diffusion loss, smoothed"]] + [
        [trial["trial"], str(trial.get("step", 0)), trial["error"] or f"{trial.get('loss', math.nan):.4f}"]
        for trial in ended]))
    print("explored with ASHA: which trials were cut short depends on their order; no row of a table")
    return 0


def _interruptible(*arguments: object) -> list[dict[str, object]]:
    try:
        return run_trials(*arguments)
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT) from None


def _design(scale: str, overrides: Sequence[str], axes: Mapping[str, Axis]) -> Design:
    path = CONFIGS / f"{scale}.yaml"
    if scale not in scales():
        raise ConfigError(f"--scale {scale}: there is {', '.join(scales())}")
    return Design(load_config([path, CONFIGS / "diffmoe.yaml"], overrides), scale, axes)


def _plan(design: Design, names: str, grids: Sequence[str]) -> list[Row]:
    axes = choose_axes(design.axes, filter(None, names.split(",")))
    pairs = [choose_axes(design.axes, grid.split(",")) for grid in grids]
    for grid, pair in zip(grids, pairs, strict=True):
        require(len(pair) == 2 and pair[0] != pair[1], "--grid", grid, "name two axes, for example pool,experts")
    require(bool(axes or pairs), "--axis", names or "(none)", f"name one or more of {', '.join(design.axes)}")
    return design.plan(axes, [(one, two) for one, two in pairs])


def _missing(trials: Trials, data: ImageData, store: Store) -> dict[str, list[Cell]]:
    left = {name: [cell for cell in cells if not store.has(cell, data)] for name, cells in trials.items()}
    return {name: cells for name, cells in left.items() if cells}


def _known_records(store: Store, scale: str) -> list[Record]:
    folders = store.folder, RESULTS / scale / "ablations", RESULTS / scale
    return [record for folder in folders for record in read_records(folder / "records")]


def _require_one_default(store: Store, default: Row) -> None:
    for path in store.records.glob(f"{DEFAULT}-*.json"):
        if not path.name.startswith(f"{DEFAULT}-{digest(default.config)}-"):
            raise ConfigError(f"{store.folder}: holds a sweep around another default configuration ({path.stem}); "
                              "choose another folder with --out")


def _mlflow(options: argparse.Namespace) -> Path | str | None:
    if options.mlflow is None:
        return (options.out or RESULTS / options.scale / "local").absolute() / "mlflow.db"
    if options.mlflow == "none":
        return None
    return options.mlflow if "://" in options.mlflow else Path(options.mlflow).absolute()


def _axes_table(axes: Iterable[Axis]) -> str:
    lines = [["axis", "values (★: the paper's)", "what is varied"]]
    for axis in axes:
        lines.append([axis.name, ", ".join(value.name + "★" * value.paper for value in axis.values), axis.title])
    return format_table(lines)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ablations.sweep", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", default="", metavar="A,B,...", help="axes to vary, one at a time")
    parser.add_argument("--grid", action="append", default=[], metavar="A,B",
                        help="two axes to vary together; repeatable")
    parser.add_argument("--scale", default="digits", help="name of a file in diffmoe/configs (default: digits)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    parser.add_argument("--list", action="store_true", help="list the axes and their values")
    parser.add_argument("--dry-run", action="store_true", help="list the trials that are missing, and their minutes")
    parser.add_argument("--time-budget", type=float, default=math.inf, metavar="MINUTES",
                        help="save and stop after this long; the same command goes on")
    parser.add_argument("--explore", action="store_true",
                        help="train only, with ASHA dropping what falls behind; enters no table")
    parser.add_argument("--address", help="of a running Ray cluster, or auto (default: Ray on this machine)")
    parser.add_argument("--jobs", type=int, metavar="N", help="trials at once (default: a core or GPU share each)")
    parser.add_argument("--gpus-per-trial", type=float, metavar="SHARE",
                        help="for example 0.25: four take turns on a GPU, and one measures while another trains "
                             "(default: 1 if there are any)")
    parser.add_argument("--out", type=Path,
                        help="folder of runs and records (default: results/<scale>/local/ablations)")
    parser.add_argument("--mlflow", metavar="STORE",
                        help="SQLite file, URI, or none (default: results/<scale>/local/mlflow.db, or in --out)")
    parser.add_argument("--publish", action="store_true", help="copy the records to results/<scale>/ablations and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
