"""Following training runs: nothing lost, nothing twice, and no failure of MLflow's reaches training."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run_config
from fake_records import fake_record
from test_tracking import silent_server  # noqa: F401 (a fixture)

from diffmoe import train
from diffmoe.config import ConfigError, RunConfig, digest
from diffmoe.tracking import live
from diffmoe.tracking.live import Tracker, send_run
from diffmoe.tracking.store import EXPERIMENT, open_store, public
from diffmoe.training.checkpoint import Checkpoints
from diffmoe.training.log import read_lines
from diffmoe.training.run import LOG_FILE, Interrupted

CONFIG = run_config()
DATA = "fakedata"
NAMES = {"images", "seconds", "images_per_second", "learning_rate", "loss.mse", "loss.balance", "loss.predictor"}


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "POLL_S", 0.02)
    monkeypatch.setattr(live, "RETRY_S", (0.05, 0.1))
    monkeypatch.setattr(live, "FLUSH_S", 60.0)  # on a busy machine


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an SQLite store without runs; making one takes seconds, copying it none."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    with open_store(path) as client:
        client.create_experiment(EXPERIMENT, artifact_location=path.with_name("artifacts").as_uri())
    return path


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> Path:
    path = tmp_path / "mlflow.db"
    path.write_bytes(empty_store.read_bytes())
    return path


def write(folder: Path, *steps: int, mode: str = "a", loss: float = 1.0) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / LOG_FILE).open(mode) as file:
        for step in steps:
            line = {"step": step, "images": 4 * step, "seconds": step / 8, "images_per_second": 32.0,
                    "learning_rate": 1e-4, "mse": loss / step, "predictor": 0.5}
            print(json.dumps(line), file=file)


def follow(tracker: Tracker, folder: Path, config: RunConfig = CONFIG, seed: int = 0) -> Any:
    return tracker.follow(folder, config, seed, DATA, "diffmoe")


def client_of(store: Path | str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(store if isinstance(store, str) else f"sqlite:///{store}")


def the_run(store: Path | str, config: RunConfig = CONFIG, seed: int = 0) -> Any:
    client = client_of(store)
    name = f"{digest(config, scope='training')}-s{seed}-{DATA}"
    [run] = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id],
                               f"tags.training_id = '{name}' and tags.kind = 'training'")
    return run


def steps_sent(store: Path | str, metric: str = "loss.mse", **which: Any) -> list[int]:
    run = the_run(store, **which)
    return [point.step for point in client_of(store).get_metric_history(run.info.run_id, metric)]


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def metrics_of(store: Path | str, seed: int = 0) -> dict[str, float]:
    try:
        return the_run(store, seed=seed).data.metrics
    except (ValueError, AttributeError):  # no run, no experiment yet
        return {}


def test_lines_arrive_while_the_run_trains_and_its_end_does_too(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Tracker(str(store), "digits", [CONFIG]) as tracker, follow(tracker, folder):
        write(folder, 25, 50)
        wait_until(lambda: metrics_of(store).get("images") == 200)
        assert the_run(store).info.status == "RUNNING"
        write(folder, 75)
    run = the_run(store)
    assert run.info.status == "FINISHED"
    assert run.data.metrics.keys() == NAMES
    assert steps_sent(store) == [25, 50, 75]
    assert run.data.metrics["loss.mse"] == 1 / 75
    assert run.data.params["model.moe.router.pool"] == "batch"
    assert (run.data.params["seed"], run.data.params["system"]) == ("0", "diffmoe")
    parent = client_of(store).get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.info.run_name == "table digits, local"


def test_all_systems_have_the_same_names(store: Path, tmp_path: Path) -> None:
    configs = [CONFIG, run_config(router="tc"), run_config(router=None)]
    with Tracker(str(store), "digits", configs) as tracker:
        for number, config in enumerate(configs):
            write(tmp_path / str(number), 25)
            with follow(tracker, tmp_path / str(number), config):
                pass
    runs = [the_run(store, config) for config in configs]
    assert len({frozenset(run.data.params) for run in runs}) == len({frozenset(run.data.metrics) for run in runs}) == 1


def test_the_gradients_norm_of_a_clipped_run_is_no_loss():
    found = live.line_metrics({"step": 25, "images": 400, "mse": 0.5, "gradient_norm": 0.2})
    assert found == {"images": 400, "gradient_norm": 0.2, "loss.mse": 0.5, "loss.balance": 0, "loss.predictor": 0}


@pytest.mark.fault("SIGTERM while MLflow follows")
def test_a_signal_ends_the_run_in_mlflow_too(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def stop() -> None:
        wait_until(lambda: read_lines(folder / LOG_FILE))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Interrupted):
        train.main(["--out", str(folder), "--track", str(store), "training.batch_size=16",
                    "training.num_images=16000000"])
    thread.join()
    client = client_of(store)
    [run] = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id], "tags.kind = 'training'")
    assert run.info.status == "KILLED"
    last = Checkpoints(folder).newest()[1]["step"]
    sent = [point.step for point in client.get_metric_history(run.info.run_id, "images")]
    assert sent == [line["step"] for line in read_lines(folder / LOG_FILE)] and sent[-1] <= last


@pytest.mark.fault("a tracked run that is stopped, and its log cut back")
def test_a_resumed_run_goes_on_behind_the_last_line_sent(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with (pytest.raises(Interrupted), Tracker(str(store), "digits", [CONFIG]) as tracker, follow(tracker, folder)):
        write(folder, 25, 50, 75)
        raise Interrupted(None)
    assert the_run(store).info.status == "KILLED"
    write(folder, 25, mode="w", loss=2.0)  # the checkpoint was older than the last lines
    with Tracker(str(store), "digits", [CONFIG]) as tracker, follow(tracker, folder):
        write(folder, 50, 75, 100)
    assert steps_sent(store) == [25, 50, 75, 100]
    assert the_run(store).info.status == "FINISHED"
    written = (tmp_path / "run" / LOG_FILE).read_bytes()
    with Tracker(str(store), "digits", [CONFIG]) as tracker, follow(tracker, folder):
        pass  # a second row of the table, from the same training
    assert steps_sent(store) == [25, 50, 75, 100]
    assert (folder / LOG_FILE).read_bytes() == written


def test_a_log_that_is_cut_back_under_the_follower_loses_nothing(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write(folder, 25, 50)
    with Tracker(str(store), "digits", [CONFIG]) as tracker, follow(tracker, folder):
        wait_until(lambda: metrics_of(store).get("images") == 200)
        write(folder, 25, mode="w")
        time.sleep(0.1)
        write(folder, 50, 75, 100)
    assert steps_sent(store) == [25, 50, 75, 100]


def test_a_broken_line_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 25)
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"step": 50, "ima\n50\n{}\n')
    write(tmp_path, 75)
    tail = live._Tail(tmp_path / LOG_FILE)
    assert [line["step"] for line in tail.read()] == [25, 75]
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"step": 100')
    assert tail.read() == []
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write(', "images": 400}\n')
    assert tail.read() == [{"step": 100, "images": 400}]
    write(tmp_path, mode="w")
    assert tail.read() == []
    write(tmp_path, 25)
    assert [line["step"] for line in tail.read()] == [25]


def test_more_lines_than_one_call_takes_are_all_sent(store: Path, tmp_path: Path) -> None:
    write(tmp_path / "run", *range(1, 301))
    with Tracker(str(store), "digits", [CONFIG]) as tracker, follow(tracker, tmp_path / "run"):
        pass
    assert steps_sent(store) == list(range(1, 301))


def test_an_answer_that_was_lost_sends_nothing_twice(store: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    send, lost = MlflowClient.log_batch, []

    def log_batch(self: Any, run_id: str, metrics: Any = (), **rest: Any) -> None:
        send(self, run_id, metrics, **rest)
        if metrics and len(lost) < 2:
            lost.append(metrics)
            raise OSError("the answer did not arrive")

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    write(tmp_path / "run", 25, 50)
    with Tracker(str(store), "digits", [CONFIG]) as tracker, follow(tracker, tmp_path / "run"):
        wait_until(lambda: lost)
        write(tmp_path / "run", 75)
    assert steps_sent(store) == [25, 50, 75]
    send(client_of(store), the_run(store).info.run_id, lost[0])  # and what a slow server does with it later
    assert steps_sent(store) == [25, 50, 75]


@pytest.mark.fault("a locked SQLite store")
def test_a_locked_store_is_asked_again(store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock = sqlite3.connect(store, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    write(tmp_path / "run", 25)
    with Tracker(f"sqlite:///{store}?timeout=0.1", "digits", [CONFIG]) as tracker, follow(tracker, tmp_path / "run"):
        wait_until(lambda: caplog.records)
        lock.execute("ROLLBACK")
        lock.close()
        write(tmp_path / "run", 50)
        wait_until(lambda: metrics_of(store).get("images") == 200)
    assert steps_sent(store) == [25, 50]
    assert [record.levelno for record in caplog.records if record.name == live.__name__] == [logging.WARNING]


@pytest.mark.fault("MLflow server, connection {answer}; no password is told")
@pytest.mark.parametrize("answer", ["refused", "silent"])
def test_a_server_that_does_not_answer_is_one_line_and_soon_done(
        answer: str, silent_server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "FLUSH_S", 1.0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = silent_server if answer == "silent" else f"http://127.0.0.1:{unused.getsockname()[1]}"
        started = time.monotonic()
        with (Tracker(uri.replace("//", "//me:secret@"), "digits", [CONFIG]) as tracker,
              follow(tracker, tmp_path / "run")):
            if answer == "refused":
                wait_until(lambda: caplog.records)
            write(tmp_path / "run", 25)
        assert time.monotonic() - started < 8
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (1 if answer == "silent" else 2)
    assert f"diffmoe.tracking send {os.path.relpath(tmp_path / 'run')} --store {uri}" in lines[-1]
    assert all(uri in line and "secret" not in line and "\n" not in line for line in lines)


def test_a_failed_run_is_called_failed_and_its_error_arrives(store: Path, tmp_path: Path) -> None:
    with (pytest.raises(ConfigError, match="no number"), Tracker(str(store), "digits", [CONFIG]) as tracker,
          follow(tracker, tmp_path / "run")):
        write(tmp_path / "run", 25)
        raise ConfigError("the loss is no number")
    assert the_run(store).info.status == "FAILED" and steps_sent(store) == [25]


def test_of_several_runs_each_has_its_own_end_and_one_that_never_began_is_none(store: Path, tmp_path: Path) -> None:
    with (pytest.raises(Interrupted), Tracker(str(store), "digits", [CONFIG]) as tracker,
          follow(tracker, tmp_path / "0"), follow(tracker, tmp_path / "1", seed=1),
          follow(tracker, tmp_path / "2", seed=2)):
        write(tmp_path / "0", 25)
        (tmp_path / "0" / "ema.safetensors").touch()
        write(tmp_path / "1", 25)
        raise Interrupted(None)
    assert [the_run(store, seed=seed).info.status for seed in (0, 1)] == ["FINISHED", "KILLED"]
    assert metrics_of(store, seed=2) == {}


def test_a_record_stands_beside_its_training_once(store: Path, tmp_path: Path) -> None:
    record = fake_record("diffmoe", 0)
    for _ in range(2):
        with Tracker(str(store), "digits", [CONFIG]) as tracker:
            with follow(tracker, tmp_path / "run"):
                write(tmp_path / "run", 25)
            tracker.publish(record)
    client = client_of(store)
    found = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id], "tags.kind = 'record'")
    assert [run.data.tags["record_id"] for run in found] == [record.id]
    assert found[0].data.tags["training_id"] == f"{record.training_digest}-s0-fakedata"
    assert found[0].data.tags["mlflow.parentRunId"] == the_run(store).data.tags["mlflow.parentRunId"]


def test_what_cannot_be_sent_does_not_hold_up_the_rest(store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "publish_records", lambda *_: 1 / 0)
    with Tracker(str(store), "digits", [CONFIG]) as tracker:
        tracker.publish(fake_record("diffmoe", 0))
        with follow(tracker, tmp_path / "run"):
            write(tmp_path / "run", 25)
    assert steps_sent(store) == [25] and the_run(store).info.status == "FINISHED"
    assert "diffmoe.tracking publish --scale digits --store" in caplog.records[-1].getMessage()


def test_without_a_store_there_is_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with Tracker(None, "digits", [CONFIG]) as tracker, follow(tracker, tmp_path):
        tracker.publish(fake_record("diffmoe", 0))
        assert threading.active_count() == before


def test_the_command_tracks_a_run_and_sends_a_finished_one(store: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    small = ["--out", str(tmp_path / "run"), "training.batch_size=16", "training.num_images=480",
             "sampling.num_steps=1"]
    assert train.main(small) == 0
    client = client_of(store)
    [run] = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id],
                               "tags.kind = 'training' and params.system = 'diffmoe'")
    assert [point.step for point in client.get_metric_history(run.info.run_id, "images_per_second")] == [25, 30]
    assert run.data.metrics["images_per_second"] > 0 and run.data.metrics["learning_rate"] == 4e-3
    client.delete_run(run.info.run_id)
    send_run(tmp_path / "run", store, "digits")
    with pytest.raises(ConfigError, match="not a checkpoint"):
        send_run(tmp_path, store, "digits")


def test_a_store_that_is_new_appears_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(uri: str) -> None:
        Path(uri.removeprefix("sqlite:///")).touch()
        raise OSError("stopped")

    monkeypatch.setattr("mlflow.MlflowClient", half)
    (tmp_path / "mlflow.db.1234.partial").touch()  # of a process that was killed
    with pytest.raises(ConfigError, match=r"mlflow\.db: cannot be used"), open_store(tmp_path / "mlflow.db"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_no_text_shows_name_and_password() -> None:
    assert public("cannot reach http://me:pass@word@host:1/x\nand http://host/a@b") == (
        "cannot reach http://host:1/x and http://host/a@b")


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def server(port: int, tmp_path: Path) -> Iterator[Any]:
    """Return a function that starts MLflow's server, always on the same port and file."""
    started: list[subprocess.Popen] = []

    def start() -> subprocess.Popen:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path}/server.db",
                   "--artifacts-destination", str(tmp_path / "artifacts"), "--port", str(port), "--workers", "1"]
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        start_new_session=True))
        wait_until(lambda: _answers(port), 120)
        return started[-1]

    yield start
    for process in started:
        _kill(process)


def _answers(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.fault("MLflow server that dies for a while")
def test_a_server_that_dies_for_a_while_has_every_line_afterwards(
        server: Any, port: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = f"http://127.0.0.1:{port}"
    first = server()
    with Tracker(uri, "digits", [CONFIG]) as tracker:
        with follow(tracker, tmp_path / "run"):
            write(tmp_path / "run", 25, 50)
            wait_until(lambda: metrics_of(uri).get("images") == 200)
            _kill(first)
            write(tmp_path / "run", 75)
            wait_until(lambda: caplog.records)
            write(tmp_path / "run", 100)
            server()
            write(tmp_path / "run", 125)
            wait_until(lambda: metrics_of(uri).get("images") == 500)
        tracker.publish(fake_record("diffmoe", 0))
    assert steps_sent(uri) == [25, 50, 75, 100, 125]
    assert the_run(uri).info.status == "FINISHED"
    assert len([record for record in caplog.records if record.name == live.__name__]) == 1
