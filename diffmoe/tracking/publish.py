"""Publish records to MLflow: a table is a parent run, a record its child, published once and found again by its id."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.records import Record
from diffmoe.report.cost import images_per_second, training_minutes
from diffmoe.tracking.store import (
    BATCH,
    EXPERIMENT,
    LOSSES,
    NONE,
    experiment,
    flatten,
    open_store,
    parameter_names,
    parent,
    training_id,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

RECORD = "record"
"""The tag `kind` of a record's run; a training's is `training`."""


def publish(records: Sequence[Record], store: Path | str, *, table: str | None = None,
            figures: Sequence[Path] = ()) -> tuple[int, int]:
    """Publish records as child runs of their table's run; what is there already stays as it is.

    Args:
        records: of one or more scales.
        store: file of an SQLite store (made when missing), or the URI of a store or server.
        table: name of the parent run; the records' scale when left out.
        figures: files for the parent run.

    Returns:
        The number of new records and of those that were there.

    Raises:
        ConfigError: when the store cannot be used or does not answer. The records are as they were, and the same call
            publishes what is missing.
    """
    with open_store(store) as client:
        experiment_id = experiment(client, EXPERIMENT, store)
        names = parameter_names([record.config for record in records])
        new = 0
        for name in sorted({table or record.scale for record in records}):
            parent_id = parent(client, experiment_id, name)
            of_table = [record for record in records if (table or record.scale) == name]
            new += publish_records(client, experiment_id, parent_id, of_table, names)
            for figure in figures:
                client.log_artifact(parent_id, str(figure), "figures")
        return new, len(records) - new


def publish_records(client: MlflowClient, experiment_id: str, parent_id: str, records: Sequence[Record],
                    names: Sequence[str]) -> int:
    """Publish those records that are not there yet, with these parameters; return how many they were."""
    losses = sorted({*LOSSES}.union(*(values for record in records for _, values in record.training["losses"])))
    done = _published(client, experiment_id, parent_id)
    new = {record.id: record for record in records if record.id not in done}
    for record in new.values():
        _publish_record(client, experiment_id, parent_id, record, names, losses)
    return len(new)


def record_params(record: Record, names: Sequence[str]) -> dict[str, str]:
    """Return a run's parameters: what the record is, and its configuration under every one of `names`."""
    # Digests are in the tags `record_id` and `training_id`: among parameters they differ first when runs are compared.
    identity = {"scale": record.scale, "row": record.row, "system": record.system, "seed": str(record.seed)}
    return dict.fromkeys(names, NONE) | flatten(record.config) | identity


def record_metrics(record: Record, losses: Sequence[str]) -> list[tuple[str, float, int]]:
    """Return a run's metrics as (name, value, step): final ones at step 0, losses by step, capacity by call."""
    activation = record.activation
    final = record.metrics | {name: value for name, value in activation.items() if isinstance(value, int | float)}
    final |= {"training_images": record.training["images"], "training_seconds": record.training["seconds"],
              "training_minutes": training_minutes(record), "images_per_second": images_per_second(record),
              "sampling_seconds": record.sampling["seconds"]}
    points = [(name, float(value), 0) for name, value in final.items()]
    points += [(f"loss.{name}", values.get(name, 0.0), step) for step, values in record.training["losses"]
               for name in losses]
    by_call = activation.get("capacity_by_call", [activation["capacity"]])
    return points + [("capacity_by_call", value, call) for call, value in enumerate(by_call, 1)]


def _publish_record(client: MlflowClient, experiment_id: str, parent_id: str, record: Record, names: Sequence[str],
                    losses: Sequence[str]) -> None:
    from mlflow.entities import Metric, Param

    tags = {"mlflow.parentRunId": parent_id, "kind": RECORD, "record_id": record.id, "label": record.label,
            "training_id": training_id(record.training_digest, record.seed, record.data["digest"]),
            "distance": record.evaluation["distance_name"],
            "commit": str(record.environment.get("commit", "")), "dirty": str(record.environment.get("dirty", ""))}
    steps = f" {record.training['steps']} steps" if record.config["training"].get("budgets") else ""
    run = client.create_run(experiment_id, tags=tags, run_name=f"{record.row}{steps} seed {record.seed}")
    run_id, now = run.info.run_id, run.info.start_time
    params = [Param(key, value) for key, value in record_params(record, names).items()]
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
        runs += [run for run in page if "record_id" in run.data.tags]
        token = page.token or None
    finished = {run.info.run_id for run in runs if run.info.status == RunStatus.to_string(RunStatus.FINISHED)}
    for run in runs:
        if run.info.run_id not in finished:
            client.delete_run(run.info.run_id)
    return {run.data.tags["record_id"] for run in runs if run.info.run_id in finished}
