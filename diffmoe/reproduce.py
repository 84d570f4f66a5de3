"""Reproduce the paper's main table at a scale: run the cells that are missing, seed by seed, then write the table.

    python -m diffmoe.reproduce --rows baselines/table1.yaml --scale digits

A user's runs and records lie under results/<scale>/local (ignored by git); what is recorded is skipped, and what was
interrupted goes on. `--publish` copies the records to results/<scale>/records.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from pathlib import Path

from diffmoe.cells import Cell, Store, load_rows, missing_cells, run_cell, run_name
from diffmoe.cli import TrainingBar, choose_device, run_command
from diffmoe.config import ConfigError
from diffmoe.data import load_data
from diffmoe.records import Record, read_records
from diffmoe.report.__main__ import write_report
from diffmoe.report.table import results_table
from diffmoe.report.table1 import format_table
from diffmoe.training.checkpoint import load_weights, save_weights
from diffmoe.training.run import Interrupted

CONFIGS = Path(__file__).parent / "configs"
RESULTS = Path("results")
MAX_PUBLISHED_BYTES = 1_000_000
"""Weights above this are not for a git repository."""


def main(arguments: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmoe.reproduce", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE", help="the table's rows (YAML)")
    parser.add_argument("--scale", default="digits", help="name of a file in diffmoe/configs (default: digits)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    parser.add_argument("--time-budget", type=float, default=math.inf, metavar="MINUTES",
                        help="save and stop after this long; the same command goes on")
    parser.add_argument("--out", type=Path, help="folder of runs and records (default: results/<scale>/local)")
    parser.add_argument("--dry-run", action="store_true", help="list the missing cells")
    parser.add_argument("--publish", action="store_true", help="copy the records to results/<scale>/records and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    scale = CONFIGS / f"{options.scale}.yaml"
    if not scale.exists():
        raise ConfigError(f"--scale {options.scale}: there is no {scale}")
    store = Store(options.out or RESULTS / options.scale / "local")
    if options.publish:
        return publish(store, RESULTS / options.scale)
    rows = load_rows(options.rows, scale, options.overrides)
    data = load_data(rows[0].config.data, rows[0].config.model)
    cells = missing_cells(rows, range(options.seeds), data, store)
    wanted = len(rows) * options.seeds
    print(f"{len(rows)} rows x {options.seeds} seeds: {wanted - len(cells)} cells recorded, {len(cells)} to run")
    if options.dry_run:
        for cell in cells:
            print(f"  {cell.record_id(data)}")
        return 0
    deadline = time.monotonic() + 60 * options.time_budget
    device = choose_device(rows[0].config.runtime.device)
    for index, cell in enumerate(cells):
        if time.monotonic() > deadline:
            raise Interrupted(None)
        print(f"[{index + 1}/{len(cells)}] {cell.row.label}, seed {cell.seed}", flush=True)
        with TrainingBar(f"{cell.row.system} seed {cell.seed}", cell.row.config.training.num_steps) as bar:
            record = run_cell(cell, options.scale, data, store, device, deadline=deadline, progress=bar.update)
        print(_summary(record), flush=True)
        if _ends_a_seed(cells, index):
            _print_table(store)
    write_report(store.folder)
    if not cells:
        _print_table(store)
    print(f"table, verdicts and figures: {store.folder}")
    return 0


def publish(store: Store, folder: Path) -> int:
    """Copy the user's records beside the published ones and write the report from all of them."""
    records = read_records(store.records)
    if not records:
        raise ConfigError(f"{store.records}: no record to publish; run make reproduce-table1 first")
    (folder / "records").mkdir(parents=True, exist_ok=True)
    for record in records:
        shutil.copy2(store.records / f"{record.id}.json", folder / "records")
    publish_weights(records, store, folder / "checkpoints")
    write_report(folder)
    print(f"published {len(records)} records to {folder}")
    return 0


def publish_weights(records: list[Record], store: Store, folder: Path) -> None:
    """Copy the small averaged networks of seed 0 in half precision, each under its shortest row's name."""
    shortest: dict[str, Record] = {}
    for record in sorted(records, key=lambda record: len(record.row), reverse=True):
        if record.seed == 0:
            shortest[record.training_digest] = record
    for record in shortest.values():
        weights, description = load_weights(store.folder / "runs" / run_name(record) / "ema.safetensors")
        half = {name: value.half() for name, value in weights.items()}
        if sum(2 * value.numel() for value in half.values()) <= MAX_PUBLISHED_BYTES:
            folder.mkdir(exist_ok=True)
            save_weights(folder / f"{record.row}.safetensors", half, description | {"config": record.config})


def _ends_a_seed(cells: list[Cell], index: int) -> bool:
    return index + 1 == len(cells) or cells[index + 1].seed != cells[index].seed


def _print_table(store: Store) -> None:
    print(f"\n{format_table(results_table(read_records(store.records)))}\n", flush=True)


def _summary(record: Record) -> str:
    return (f"    {record.evaluation['distance_name']} {record.metrics['distance']:.2f}, "
            f"C {record.activation['capacity']:.3f}; trained {record.training['seconds']:.0f} s, sampled "
            f"{record.sampling['num_samples']} images in {record.sampling['seconds']:.0f} s, measured in "
            f"{record.evaluation['seconds']:.0f} s")


if __name__ == "__main__":
    sys.exit(run_command(main))
