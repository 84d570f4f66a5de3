"""Sweeps on Ray: what they record, how they go on after a kill, MLflow, clusters; the fast tests share one cluster."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ablations import driver, report, sweep
from ablations.axes import Design, load_axes
from diffmoe.cells import Cell, Store, run_cell
from diffmoe.config import load_config
from diffmoe.data import load_data
from diffmoe.records import read_records
from diffmoe.reproduce import CONFIGS
from diffmoe.training.run import Interrupted

SMALL = ["training.batch_size=16", "training.num_images=64", "sampling.num_steps=2", "evaluation.num_samples=40",
         "evaluation.kid_subset_size=20"]
LONG = [*SMALL, "training.num_images=9600"]
"""Trainings of some seconds."""
SHORTER = "training.num_images=4800"
GATE = ["--axis", "gate", "--seeds", "1"]
ROWS = {"default", "gate-sigmoid", "gate-identity"}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine with one core, for all tests of this file."""
    with driver.started_ray(driver.Resources(jobs=1)):
        yield


def gate_cells(options):
    """Return the cells of GATE."""
    base = load_config([CONFIGS / "digits.yaml", CONFIGS / "diffmoe.yaml"], options)
    design = Design(base, "digits", load_axes())
    return [Cell(row, 0) for row in design.plan([design.axes["gate"]], [])]


def data_of(cell):
    return load_data(cell.row.config.data, cell.row.config.model)


def mlflow_runs(store):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store}")
    runs = client.search_runs([client.get_experiment_by_name("diffmoe").experiment_id])
    return [run for run in runs if "table" in run.data.tags], [run for run in runs if "record_id" in run.data.tags]


def test_a_sweep_stopped_by_a_broken_run_and_a_silent_mlflow_server_is_completed_by_the_same_command(
        cluster, tmp_path, capsys, caplog, monkeypatch):
    for name, value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}.items():
        monkeypatch.setenv(name, value)
    cells = {cell.row.key: cell for cell in gate_cells(SMALL)}
    store = Store(tmp_path)
    folder = store.run_folder(cells["gate-sigmoid"], data_of(cells["default"]))
    folder.mkdir(parents=True)
    (folder / "ema.safetensors").write_text("damaged")

    command = ["--axis", "gate,threshold", "--seeds", "1", "--out", str(tmp_path), *SMALL]
    assert sweep.main([*command, "--mlflow", f"http://127.0.0.1:{free_port()}"]) == 1
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and "gate-sigmoid-s0" in error and "not a checkpoint" in error
    assert "cannot be used" in caplog.text
    records = {record.row: record for record in read_records(store.records)}
    assert len(records) == 3 + 8 - 1 and records.keys() > ROWS - {"gate-sigmoid"}
    assert len(list((tmp_path / "runs").iterdir())) == 3  # thresholds share the default's training
    assert records["default"].environment["threads"] == 1

    shutil.rmtree(folder)
    lost = records["threshold-0.9"]
    (store.records / f"{lost.id}.json").unlink()
    assert sweep.main(command) == 0
    assert "9 recorded, 2 to run in 2 trials" in capsys.readouterr().out
    records = {record.row: record for record in read_records(store.records)}
    assert len(records) == 3 + 8 and result(records["threshold-0.9"]) == result(lost)
    assert report.check_report(tmp_path) == []
    assert not any((tmp_path / "ray").iterdir())  # nothing is left to go on with

    monkeypatch.setattr(sweep, "run_trials", None)  # nothing to run: Ray is not asked
    assert sweep.main(command) == 0
    assert "11 recorded, 0 to run" in capsys.readouterr().out
    (parent,), children = mlflow_runs(tmp_path / "mlflow.db")
    assert parent.data.tags["table"] == "digits, local ablations"
    assert sorted(run.data.tags["record_id"] for run in children) == sorted(record.id for record in records.values())
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}


def test_another_default_in_the_same_folder_is_refused(tmp_path):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "default-0123456789ab-s0-126fbed1fcaf.json").touch()
    with pytest.raises(sweep.ConfigError, match=r"another default configuration .*--out"):
        sweep.main([*GATE, "--out", str(tmp_path), *SMALL])


def test_out_of_time_is_an_orderly_stop(tmp_path):
    with pytest.raises(Interrupted):
        sweep.main([*GATE, "--out", str(tmp_path), "--mlflow", "none", *SMALL, "--time-budget", "0"])
    assert not list(tmp_path.glob("records/*"))


def test_asking_for_a_gpu_where_there_is_none_is_refused_before_any_trial(cluster, tmp_path):
    for arguments in (["--gpus-per-trial", "0.5"], ["runtime.device=cuda"]):
        with pytest.raises(sweep.ConfigError, match=r"GPU"):
            sweep.main([*GATE, "--out", str(tmp_path), "--mlflow", "none", *SMALL, *arguments])
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_exploring_trains_only_and_records_nothing(cluster, tmp_path, capsys):
    assert sweep.main([*GATE, "--explore", "--out", str(tmp_path), *SMALL, "training.num_images=1600"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "-s0" in line]
    assert len(lines) == 3
    assert "| 100 " in lines[0].replace("  ", " ")  # the one that came furthest is first
    assert not (tmp_path / "records").exists()


# ---------------------------------------------------------------- kills


def result(record):
    """What a record says of its result: no times."""
    losses = [[step, {name: value for name, value in line.items() if name != "seconds"}]
              for step, line in record.training["losses"]]
    return record.id, record.metrics, record.activation, record.training["steps"], losses


def by_hand(folder, options):
    """Run the cells of GATE one after another in this process, without Ray."""
    store = Store(folder)
    for cell in gate_cells(options):
        run_cell(cell, "digits", data_of(cell), store, torch.device("cpu"))
    return [result(record) for record in read_records(store.records)]


def start_sweep(folder, *arguments, **environment):
    command = [sys.executable, "-m", "ablations.sweep", *GATE, "--out", str(folder), *LONG, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, cwd=folder.parent, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def wait_for(condition, process, seconds=240):
    """Return the first true value of `condition()`."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


def workers_in_training(folder):
    """Return the processes that work in runs that have begun and are not finished, by the runs' locks."""
    return [int((log.parent / "lock").read_text() or 0) for log in folder.glob("runs/*/losses.jsonl")
            if log.stat().st_size and not (log.parent / "ema.safetensors").exists()]


def is_of(node, process_id):
    """Say whether a process descends from a node's."""
    while process_id > 1 and process_id != node.pid:
        process_id = int(Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[1])
    return process_id == node.pid


def finish(process):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_workers_and_drivers_change_no_record(tmp_path):
    folder = tmp_path / "killed"
    folder.mkdir()
    first = start_sweep(folder, "--jobs", "1")
    (worker,) = wait_for(lambda: workers_in_training(folder), first)
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: set(workers_in_training(folder)) - {worker}, first)  # taken up by another
    wait_for(lambda: list(folder.glob("records/*.json")), first)
    wait_for(lambda: workers_in_training(folder), first)
    first.kill()
    first.wait()
    assert 0 < len(list(folder.glob("records/*.json"))) < 3
    assert list(folder.glob("ray/*/experiment_state-*.json"))  # to be restored
    output = finish(start_sweep(folder, "--jobs", "1"))
    assert "3 recorded" not in output
    assert [result(record) for record in read_records(folder / "records")] == by_hand(tmp_path / "hand", LONG)
    assert report.check_report(folder) == []
    _, children = mlflow_runs(folder / "mlflow.db")
    assert len(children) == len({run.data.tags["record_id"] for run in children}) == 3


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_node(folder, environment, *arguments):
    """Start a node of a Ray cluster of our own; it ends with its process."""
    command = [shutil.which("ray", path=str(Path(sys.executable).parent)), "start", "--block", "--num-cpus", "1",
               "--object-store-memory", str(driver.OBJECT_STORE_BYTES), "--disable-usage-stats", *arguments]
    return subprocess.Popen(command, env=os.environ | environment, stdout=(folder / "node.log").open("a"),
                            stderr=subprocess.STDOUT, start_new_session=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_of_which_one_dies_lose_nothing(tmp_path):
    folder = tmp_path / "cluster"
    folder.mkdir()
    address = f"127.0.0.1:{free_port()}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # as the nodes of a cluster share one
    nodes = [start_node(tmp_path, token, "--head", "--port", address.split(":")[1], "--include-dashboard", "false")]
    try:
        wait_for(lambda: "runtime started" in (tmp_path / "node.log").read_text(), nodes[0])
        nodes.append(start_node(tmp_path, token, "--address", address))
        process = start_sweep(folder, "--address", address, "--mlflow", "none", SHORTER, **token)
        wait_for(lambda: any(is_of(nodes[1], worker) for worker in workers_in_training(folder)), process)
        os.killpg(nodes[1].pid, signal.SIGKILL)
        finish(process)
    finally:
        for node in nodes:
            os.killpg(node.pid, signal.SIGKILL)
    records = [result(record) for record in read_records(folder / "records")]
    assert records == by_hand(tmp_path / "hand", [*LONG, SHORTER])
