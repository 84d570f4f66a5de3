"""Cells in several processes: the same records, and nothing lost when they are stopped."""

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from functools import partial

import pytest
import torch
from processes import server
from test_cells import CPU, ROWS, SMALL

from diffmoe.cells import Cell, Store, at_budgets, check_cells, load_rows, missing_cells, run_cell
from diffmoe.config import ConfigError
from diffmoe.data import load_data
from diffmoe.train import CONFIGS
from diffmoe.training.run import Interrupted
from diffmoe.training.signals import Signals
from diffmoe.workers import run_cells, visible_gpus

ROWS_TO_RUN = ("dense", "ec-static", "ec-dynamic")


@pytest.fixture(scope="module")
def rows():
    overrides = [*SMALL, "training.budgets=[32]"]
    return at_budgets([row for row in load_rows(ROWS, CONFIGS / "digits.yaml", overrides) if row.key in ROWS_TO_RUN])


@pytest.fixture(scope="module")
def data(rows):
    return load_data(rows[0].config.data, rows[0].config.model)


@pytest.fixture
def forked(monkeypatch):
    """Take processes from the server that has imported everything, in milliseconds."""
    context = server()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


def run(rows, data, folder, jobs, deadline=float("inf")):
    store = Store(folder)
    cells = missing_cells(rows, [0], data, store)
    assert [(cell.row.config.images_seen, cell.row.key) for cell in cells] == [  # the last two rows share a training
        (images, key) for images in (32, 64) for key in ROWS_TO_RUN]
    run_one = partial(run_cell, scale="digits", data=data, store=store, device=CPU, deadline=deadline)
    records = run_cells(cells, run_one, jobs, lambda *_: None)
    return {(record.training["images"], record.row): record for record in records}


def results(records):
    def untimed(part):
        return {name: value for name, value in part.items() if "second" not in name}

    return {key: [untimed(part) if isinstance(part, dict) else part for name, part in dataclasses.asdict(record).items()
                  if name != "environment"] for key, record in records.items()}


@pytest.mark.usefixtures("forked")
def test_two_processes_write_the_records_of_one(rows, data, tmp_path):
    one, two = (run(rows, data, tmp_path / str(jobs), jobs) for jobs in (1, 2))
    assert results(one) == results(two)
    assert {path.name for path in (tmp_path / "1" / "records").iterdir()} == {
        path.name for path in (tmp_path / "2" / "records").iterdir()}


@pytest.mark.usefixtures("forked")
def test_a_deadline_stops_every_process_with_its_state_saved(rows, data, tmp_path):
    with pytest.raises(Interrupted):
        run(rows, data, tmp_path, 2, deadline=time.monotonic())
    assert list(tmp_path.glob("runs/*/checkpoint-*.safetensors"))
    assert len(run(rows, data, tmp_path, 1)) == 2 * len(ROWS_TO_RUN)


def own_gpu(cell, progress):
    time.sleep(0.5)  # long enough for the other process to take the next cell
    return os.environ["CUDA_VISIBLE_DEVICES"]


@pytest.mark.parametrize("start", ["forked", pytest.param("spawned", marks=pytest.mark.slow)])
def test_each_process_has_a_gpu_of_its_own_of_those_that_the_user_left(rows, monkeypatch, request, start):
    if start == "forked":
        request.getfixturevalue("forked")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert visible_gpus() == ["5", "7"]
    cells = [Cell(rows[0], seed) for seed in range(4)]
    assert set(run_cells(cells, own_gpu, 2, lambda *_: None)) == {"5", "7"}


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(("jobs", "count", "used"), [(8, 4, ["5", "5", "7", "7"]), (3, 2, ["5", "7"])])
def test_cells_fewer_than_processes_are_spread_over_the_gpus(rows, monkeypatch, jobs, count, used):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    cells = [Cell(rows[0], seed) for seed in range(count)]
    assert sorted(run_cells(cells, own_gpu, jobs, lambda *_: None)) == used


def when_trained(cell, progress, folder):
    """Each budget of a run waits for what may run beside it: until the other has begun, or for too long."""
    budget, row = cell.row.config.images_seen, cell.row.key
    (folder / f"{budget}-{row}-begun").touch()
    awaited = {"ec-static": "32-ec-dynamic-begun", "ec-dynamic": "64-ec-static-begun"}[row] if budget == 32 else None
    deadline = time.monotonic() + 20
    while awaited and not (folder / awaited).exists():
        if time.monotonic() > deadline:
            return "waited in vain"
        time.sleep(0.02)
    return f"{budget}-{row}"


@pytest.mark.usefixtures("forked")
def test_what_is_trained_is_measured_at_once_and_trained_on(rows, tmp_path):
    cells = [cell for cell in (Cell(row, 0) for row in rows) if cell.row.key != "dense"]
    cells.sort(key=lambda cell: cell.row.config.images_seen)
    names = [f"{cell.row.config.images_seen}-{cell.row.key}" for cell in cells]

    def is_trained(cell):  # the first cell is training; then its budget is there for all
        return cell.row.config.images_seen == 32 and (tmp_path / "32-ec-static-begun").exists()

    run_one = partial(when_trained, folder=tmp_path)
    assert sorted(run_cells(cells, run_one, 3, lambda *_: None, is_trained=is_trained)) == sorted(names)


def one_fails(cell, progress):
    """Of four processes: the first fails while the second trains and the others have nothing to do."""
    if cell.seed == 0:
        time.sleep(0.5)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if cell.seed == 1:
        with Signals() as signals:
            while signals.received is None:
                time.sleep(0.05)
            time.sleep(0.3)  # it saves itself
        raise Interrupted(signals.received)


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("forked")
def test_a_cell_that_does_not_fit_is_one_line_once_the_others_are_saved(rows):
    cells = [Cell(rows[0], seed) for seed in range(4)]
    with pytest.raises(ConfigError, match="--jobs"):
        list(run_cells(cells, one_fails, 4, lambda *_: None))
    assert not multiprocessing.active_children()


def never_ends(cell, progress, folder):
    with Signals():
        (folder / str(cell.seed)).touch()
        time.sleep(100)


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("forked")
def test_a_second_signal_ends_processes_that_do_not(rows, tmp_path):
    cells = [Cell(rows[0], seed) for seed in range(2)]
    sent = []

    def interrupt_twice():
        while len(list(tmp_path.iterdir())) < 2:  # both are at work
            time.sleep(0.05)
        for pause in (0.5, 1.0):
            time.sleep(pause)
            sent.append(pause)
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt_twice, daemon=True).start()
    with pytest.raises(Interrupted):
        list(run_cells(cells, partial(never_ends, folder=tmp_path), 2, lambda *_: None))
    assert len(sent) == 2 and not multiprocessing.active_children()


def test_what_cannot_be_measured_is_refused_before_training(data, tmp_path):
    rows = load_rows(ROWS, CONFIGS / "digits.yaml",
                     [*SMALL, "evaluation.num_samples=2000", "evaluation.kid_subset_size=1900"])
    with pytest.raises(ConfigError, match="kid_subset_size=1900: there are only 1797 reference images"):
        check_cells(missing_cells(rows, [0], data, Store(tmp_path)), data)
