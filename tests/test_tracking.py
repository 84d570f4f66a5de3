"""Publishing to MLflow: once a record, the same names for every system, one line when a store does not answer."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import one_line
from fake_records import NUM_CALLS, at_budget, fake_record, fake_records

from diffmoe.config import ConfigError
from diffmoe.records import read_records, write_record
from diffmoe.tracking import __main__ as command_line
from diffmoe.tracking.publish import publish, record_params
from diffmoe.tracking.store import EXPERIMENT, MOE_KEYS, flatten, store_uri

ROWS_HERE = ("dense", "tc", "diffmoe", "expert-race")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store that holds one seed of four rows and one figure, published at once."""
    folder = tmp_path_factory.mktemp("tracking")
    figure = folder / "figure.png"
    figure.write_bytes(b"a figure")
    assert publish(fake_records(ROWS_HERE, [0]), folder / "mlflow.db", figures=[figure]) == (4, 0)
    return folder / "mlflow.db"


def runs_of(store: Path) -> list:
    from mlflow import MlflowClient

    client = MlflowClient(store_uri(store))
    return client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])


def children(store: Path) -> dict[str, object]:
    return {run.data.tags["record_id"]: run for run in runs_of(store) if "record_id" in run.data.tags}


def test_publishing_again_adds_nothing_and_a_new_seed_adds_itself(store: Path) -> None:
    before = {run.info.run_id for run in runs_of(store)}
    assert publish(fake_records(ROWS_HERE, [0]), store) == (0, 4)
    assert {run.info.run_id for run in runs_of(store)} == before
    assert publish([*fake_records(ROWS_HERE, [0]), fake_record("diffmoe", 1)], store) == (1, 4)
    assert len(runs_of(store)) == len(before) + 1


def test_every_run_is_the_child_of_its_table(store: Path) -> None:
    parents = [run for run in runs_of(store) if "table" in run.data.tags]
    assert [run.info.run_name for run in parents] == ["table digits"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children(store).values()} == {parents[0].info.run_id}


def test_all_systems_have_the_same_parameter_and_metric_names(store: Path) -> None:
    runs = children(store).values()
    assert len({run.data.params["system"] for run in runs}) == len(ROWS_HERE)
    for names in ({frozenset(run.data.params) for run in runs}, {frozenset(run.data.metrics) for run in runs}):
        assert len(names) == 1
    wanted = {"distance", "kid", "precision", "recall", "capacity", "activated_params", "activated_params_strict",
              "gflops", "loss.mse", "loss.balance", "loss.predictor", "capacity_by_call"}
    assert wanted <= next(iter({frozenset(run.data.metrics) for run in runs}))


def test_names_do_not_depend_on_what_else_is_published() -> None:
    alone = {frozenset(record_params(fake_record(row, 0), MOE_KEYS)) for row in ("dense", "diffmoe")}
    assert len(alone) == 1


def test_values_are_those_of_the_record(store: Path) -> None:
    from mlflow import MlflowClient

    record = fake_record("diffmoe", 0)
    run = children(store)[record.id]
    assert run.data.metrics["distance"] == record.metrics["distance"]
    assert run.data.metrics["activated_params"] == record.activation["activated_params"]
    assert run.data.params["model.moe.router.pool"] == "batch" and run.data.params["seed"] == "0"
    assert children(store)[fake_record("dense", 0).id].data.params["model.moe.router.pool"] == "none"
    client = MlflowClient(store_uri(store))
    losses = client.get_metric_history(run.info.run_id, "loss.mse")
    assert [(point.step, point.value) for point in losses] == [
        (step, values["mse"]) for step, values in record.training["losses"]]
    calls = client.get_metric_history(run.info.run_id, "capacity_by_call")
    assert [point.step for point in calls] == list(range(1, NUM_CALLS + 1))
    assert [point.value for point in calls] == record.activation["capacity_by_call"]


def test_the_budgets_of_a_row_are_told_apart_and_have_the_axes_of_cost(tmp_path: Path) -> None:
    whole = fake_record("dense", 0)
    whole = replace(whole, config=whole.config | {"training": whole.config["training"] | {"budgets": [8000]}},
                    training=whole.training | {"images_per_second": 3200.0})
    publish([whole, at_budget(whole, 8000)], tmp_path / "mlflow.db")
    runs = {run.info.run_name: run.data.metrics for run in children(tmp_path / "mlflow.db").values()}
    assert runs.keys() == {"dense 62 steps seed 0", "dense 1000 steps seed 0"}
    assert runs["dense 62 steps seed 0"]["training_images"] == 8000
    assert runs["dense 1000 steps seed 0"]["images_per_second"] == 3200
    assert runs["dense 1000 steps seed 0"]["training_minutes"] == pytest.approx(128_000 / 3200 / 60)


def test_the_record_and_the_figures_are_artifacts_beside_the_store(store: Path) -> None:
    record = fake_record("tc", 0)
    [copy] = store.parent.glob(f"mlflow-artifacts/*/artifacts/{record.id}.json")
    assert read_records(copy.parent) == [record]
    assert [path.read_bytes() for path in store.parent.glob("mlflow-artifacts/*/artifacts/figures/figure.png")] == [
        b"a figure"]


def test_an_interrupted_record_is_published_anew(store: Path) -> None:
    from mlflow import MlflowClient

    record = fake_record("dense", 0)
    left = children(store)[record.id].info.run_id
    MlflowClient(store_uri(store)).set_terminated(left, "KILLED")
    assert publish([record], store) == (1, 0)
    assert children(store)[record.id].info.run_id != left
    assert children(store)[record.id].data.metrics["distance"] == record.metrics["distance"]


def test_flatten_keeps_none_and_drops_the_absent_section() -> None:
    assert flatten({"a": {"b": 1, "c": None}, "model": {"moe": None}}) == {"a.b": "1", "a.c": "none"}


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Listen, take connections and never answer."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        taken: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
    for connection in taken:
        connection.close()


@pytest.mark.parametrize("answer", ["refused", "silent"])
def test_a_server_that_does_not_answer_is_one_line_soon(answer: str, silent_server: str,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    if answer == "silent":  # the default, 4 s twice, would only make the test slow
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: refused
        uri = silent_server if answer == "silent" else f"http://127.0.0.1:{unused.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ConfigError, match=uri) as error:
            publish(fake_records(["dense"], [0]), uri)
    assert time.monotonic() - started < 10
    assert "the runs and records are unharmed" in one_line(error.value).lower()


def test_a_file_that_is_no_store_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("not a database" * 100)
    with pytest.raises(ConfigError, match=r"mlflow\.db"):
        publish(fake_records(["dense"], [0]), path)
    assert path.read_text().startswith("not a database")


def test_the_command_line_publishes_a_scales_table_its_ablations_and_what_is_local(tmp_path: Path, capsys) -> None:
    for seed, part in enumerate(["", "ablations", "local"]):
        for record in fake_records(["dense"], [seed]):
            write_record(tmp_path / "digits" / part / "records", record)
    assert command_line.main(["publish", "--results", str(tmp_path)]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "table digits", "table digits, ablations", "table digits, local"]


def test_the_command_line_without_records_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no records"):
        command_line.main(["publish", "--results", str(tmp_path)])


def test_importing_the_package_and_the_tracker_imports_no_mlflow() -> None:
    code = "import sys, diffmoe, diffmoe.tracking.__main__; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
