"""Cells in several processes: the same records, and nothing lost when they are stopped."""

import dataclasses
import time
from functools import partial

import pytest
from test_cells import CPU, ROWS, SMALL

from diffmoe.cells import Store, check_cells, group_by_training, load_rows, missing_cells, run_cell
from diffmoe.config import ConfigError
from diffmoe.data import load_data
from diffmoe.train import CONFIGS
from diffmoe.training.run import Interrupted
from diffmoe.workers import run_groups

ROWS_TO_RUN = ("dense", "ec-static", "ec-dynamic")


@pytest.fixture(scope="module")
def rows():
    return [row for row in load_rows(ROWS, CONFIGS / "digits.yaml", SMALL) if row.key in ROWS_TO_RUN]


@pytest.fixture(scope="module")
def data(rows):
    return load_data(rows[0].config.data, rows[0].config.model)


def run(rows, data, folder, jobs, deadline=float("inf")):
    store = Store(folder)
    groups = group_by_training(missing_cells(rows, [0], data, store))
    assert [[cell.row.key for cell in group] for group in groups] == [["dense"], ["ec-static", "ec-dynamic"]]
    run_one = partial(run_cell, scale="digits", data=data, store=store, device=CPU, deadline=deadline)
    return {record.row: record for record in run_groups(groups, run_one, jobs, lambda *_: None)}


def results(records):
    def untimed(part):
        return {name: value for name, value in part.items() if "second" not in name}

    return {key: [untimed(part) if isinstance(part, dict) else part for name, part in dataclasses.asdict(record).items()
                  if name != "environment"] for key, record in records.items()}


def test_two_processes_write_the_records_of_one(rows, data, tmp_path):
    one, two = (run(rows, data, tmp_path / str(jobs), jobs) for jobs in (1, 2))
    assert results(one) == results(two)
    assert {path.name for path in (tmp_path / "1" / "records").iterdir()} == {
        path.name for path in (tmp_path / "2" / "records").iterdir()}


def test_a_deadline_stops_every_process_with_its_state_saved(rows, data, tmp_path):
    with pytest.raises(Interrupted):
        run(rows, data, tmp_path, 2, deadline=time.monotonic())
    assert list(tmp_path.glob("runs/*/checkpoint-*.safetensors"))
    assert len(run(rows, data, tmp_path, 1)) == len(ROWS_TO_RUN)


def test_what_cannot_be_measured_is_refused_before_training(data, tmp_path):
    rows = load_rows(ROWS, CONFIGS / "digits.yaml",
                     [*SMALL, "evaluation.num_samples=2000", "evaluation.kid_subset_size=1900"])
    with pytest.raises(ConfigError, match="kid_subset_size=1900: there are only 1797 reference images"):
        check_cells(missing_cells(rows, [0], data, Store(tmp_path)), data)
