"""Publish records to an MLflow 3 store, and open its UI.

    python -m diffmoe.tracking publish --scale digits      results/digits into results/digits/local/mlflow.db
    python -m diffmoe.tracking ui --scale digits           the same, then the UI on http://127.0.0.1:5000

A table is a parent run, a record its child. Parameters and metrics have the same names for every system, so that runs
compare: what a system lacks is the parameter "none", the loss 0, the capacity of its one expert. A record is published
once, found again by its id.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe.cli import run_command
from diffmoe.config import ConfigError, MoEConfig
from diffmoe.moe.expert_choice import ExpertChoiceConfig
from diffmoe.records import Record, read_records

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "diffmoe"
NONE = "none"
HTTP_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "4"}
"""A server that does not answer is given up after some 10 seconds; a user's own settings win."""
MOE_KEYS = tuple(f"model.moe.{spec.name}" for spec in fields(MoEConfig) if spec.name != "router") + tuple(
    f"model.moe.router.{spec.name}" for spec in fields(ExpertChoiceConfig))
BATCH = 1000
"""Most metrics of one call of MLflow's API."""


def publish(records: Sequence[Record], store: Path | str, experiment: str = EXPERIMENT, *, table: str | None = None,
            figures: Sequence[Path] = ()) -> tuple[int, int]:
    """Publish records as child runs of their table's run; what is there already stays as it is.

    Args:
        records: of one or more scales.
        store: file of an SQLite store (made when missing), or the URI of a store or server.
        experiment: name of MLflow's experiment.
        table: name of the parent run; the records' scale when left out.
        figures: files for the parent run.

    Returns:
        The number of new records and of those that were there.

    Raises:
        ConfigError: when the store cannot be used or does not answer. The records are as they were, and the same call
            publishes what is missing.
    """
    with _open_store(store) as client:
        experiment_id = _experiment(client, experiment, store)
        keys = sorted({*MOE_KEYS}.union(*(flatten(record.config) for record in records)))
        losses = sorted({name for record in records for _, values in record.training["losses"] for name in values})
        new = existing = 0
        for name in sorted({table or record.scale for record in records}):
            parent_id = _parent(client, experiment_id, name)
            done = _published(client, experiment_id, parent_id)
            for record in (record for record in records if (table or record.scale) == name):
                if record.id in done:
                    existing += 1
                    continue
                _publish_record(client, experiment_id, parent_id, record, keys, losses)
                done.add(record.id)
                new += 1
            for figure in figures:
                client.log_artifact(parent_id, str(figure), "figures")
        return new, existing


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a nested configuration as dotted keys and texts; None is "none", an absent section has no keys."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" != "model.moe":
            flat[f"{prefix}{key}"] = NONE if value is None else str(value)
    return flat


def record_params(record: Record, keys: Sequence[str]) -> dict[str, str]:
    """Return a run's parameters: what the record is, and its configuration under every key of `keys`."""
    identity = {"scale": record.scale, "row": record.row, "system": record.system, "seed": str(record.seed),
                "config_digest": record.config_digest, "training_digest": record.training_digest,
                "data_digest": record.data["digest"]}
    return dict.fromkeys(keys, NONE) | flatten(record.config) | identity


def record_metrics(record: Record, losses: Sequence[str]) -> list[tuple[str, float, int]]:
    """Return a run's metrics as (name, value, step): final ones at step 0, losses by step, capacity by call."""
    activation = record.activation
    final = record.metrics | {name: value for name, value in activation.items() if isinstance(value, int | float)}
    final |= {"training_seconds": record.training["seconds"], "sampling_seconds": record.sampling["seconds"],
              "images_per_second": record.training["images"] / max(record.training["seconds"], 1e-9)}
    points = [(name, float(value), 0) for name, value in final.items()]
    points += [(f"loss.{name}", values.get(name, 0.0), step) for step, values in record.training["losses"]
               for name in losses]
    by_call = activation.get("capacity_by_call", [activation["capacity"]])
    return points + [("capacity_by_call", value, call) for call, value in enumerate(by_call, 1)]


def _publish_record(client: MlflowClient, experiment_id: str, parent_id: str, record: Record, keys: Sequence[str],
                    losses: Sequence[str]) -> None:
    from mlflow.entities import Metric, Param

    tags = {"mlflow.parentRunId": parent_id, "record_id": record.id, "label": record.label,
            "distance": record.evaluation["distance_name"],
            "commit": str(record.environment.get("commit", "")), "dirty": str(record.environment.get("dirty", ""))}
    run = client.create_run(experiment_id, tags=tags, run_name=f"{record.row} seed {record.seed}")
    run_id, now = run.info.run_id, run.info.start_time
    params = [Param(key, value) for key, value in record_params(record, keys).items()]
    metrics = [Metric(name, value, now, step) for name, value, step in record_metrics(record, losses)]
    client.log_batch(run_id, metrics[:BATCH - len(params)], params)
    for start in range(BATCH - len(params), len(metrics), BATCH):
        client.log_batch(run_id, metrics[start:start + BATCH])
    client.log_text(run_id, json.dumps(asdict(record), indent=1), f"{record.id}.json")
    client.set_terminated(run_id)  # last: a run that is not finished was interrupted and is made anew


def _published(client: MlflowClient, experiment_id: str, parent_id: str) -> set[str]:
    """Return the ids of a table's finished records; what an interrupted call left is deleted."""
    from mlflow.entities import RunStatus

    runs, token = [], ""
    while token is not None:
        children = f"tags.`mlflow.parentRunId` = '{parent_id}'"
        page = client.search_runs([experiment_id], children, page_token=token or None)
        runs += page
        token = page.token or None
    finished = {run.info.run_id for run in runs if run.info.status == RunStatus.to_string(RunStatus.FINISHED)}
    for run in runs:
        if run.info.run_id not in finished:
            client.delete_run(run.info.run_id)
    return {run.data.tags["record_id"] for run in runs if run.info.run_id in finished}


def _parent(client: MlflowClient, experiment_id: str, table: str) -> str:
    runs = client.search_runs([experiment_id], f"tags.table = '{table}'", max_results=1)
    if runs:
        return runs[0].info.run_id
    run = client.create_run(experiment_id, tags={"table": table}, run_name=f"table {table}")
    client.set_terminated(run.info.run_id)
    return run.info.run_id


def _experiment(client: MlflowClient, name: str, store: Path | str) -> str:
    found = client.get_experiment_by_name(name)
    if found:
        return found.experiment_id
    # a file store keeps its artifacts beside it; a server knows where
    location = Path(store).resolve().with_name("mlflow-artifacts").as_uri() if isinstance(store, Path) else None
    return client.create_experiment(name, artifact_location=location)


def store_uri(store: Path | str) -> str:
    """Return the URI of a store: absolute for a file, so that it holds in any working directory."""
    return f"sqlite:///{store.resolve()}" if isinstance(store, Path) else store


@contextmanager
def _open_store(store: Path | str) -> Iterator[MlflowClient]:
    for key, value in HTTP_LIMITS.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for name in ("alembic", "mlflow.store.db.utils", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if isinstance(store, Path):
            store.parent.mkdir(parents=True, exist_ok=True)
        yield MlflowClient(store_uri(store))
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise ConfigError(f"MLflow store {store}: cannot be used; start its server or name another with --store. The "
                          f"records are unharmed, and the same command publishes them ({str(error)[:200]})") from None


def main(arguments: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmoe.tracking", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("publish", "ui"))
    parser.add_argument("--scale", default="digits", help="folder of results/ (default: digits)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    parser.add_argument("--store", help="SQLite file or URI (default: <results>/<scale>/local/mlflow.db)")
    parser.add_argument("--port", type=int, default=5000, help="of the UI (default: 5000)")
    options = parser.parse_args(arguments)
    folder = options.results / options.scale
    named = options.store or str(folder / "local" / "mlflow.db")
    store = named if "://" in named else Path(named)
    tables = {options.scale: folder, f"{options.scale}, local": folder / "local"}
    tables = {table: (read_records(path / "records"), path) for table, path in tables.items()}
    if not any(records for records, _ in tables.values()):
        raise ConfigError(f"{folder}: no records here or in local/; run the cells first")
    for table, (records, path) in tables.items():
        if records:
            figures = sorted((path / "figures").glob("*.png"))
            new, existing = publish(records, store, table=table, figures=figures)
            print(f"table {table}: {new} new records, {existing} were there; {store}")
    if options.command == "ui":
        _serve(store, options.port)
    return 0


def _serve(store: Path | str, port: int) -> None:
    """Become MLflow's UI."""
    if isinstance(store, str) and store.startswith("http"):
        print(f"the server has a UI of its own: {store}")
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"port {port}: cannot be used, name another with --port ({error})") from None
    with _open_store(store) as client:
        experiment_id = _experiment(client, EXPERIMENT, store)
    # without workflowType, MLflow 3 opens an experiment in its view for language models
    page = f"http://127.0.0.1:{port}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    print(f"MLflow: {page}", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store_uri(store),
                              "--host", "127.0.0.1", "--port", str(port), "--workers", "1"])


if __name__ == "__main__":
    sys.exit(run_command(main))
