"""An MLflow store or server, and what all that is written there shares: names, parents, parameters.

Parameters and metrics have the same names for every system, so that runs compare: what a system lacks is the parameter
"none", the loss 0, the capacity of its one expert. No URI is printed with the name and password in it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe.config import ConfigError, MoEConfig
from diffmoe.moe.expert_choice import ExpertChoiceConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "diffmoe"
NONE = "none"
SETTINGS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
            "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
"""A server that does not answer is given up after some 10 seconds, nothing else is told of a run, and no URI is printed
by MLflow; a user's own settings win."""
MOE_KEYS = tuple(f"model.moe.{spec.name}" for spec in fields(MoEConfig) if spec.name != "router") + tuple(
    f"model.moe.router.{spec.name}" for spec in fields(ExpertChoiceConfig))
LOSSES = ("balance", "mse", "predictor")
"""Losses that every run has in MLflow, 0 where its system has none of that name."""
BATCH = 1000
"""Most metrics of one call of MLflow's API."""


def parse_store(text: str) -> Path | str:
    """Return what a user wrote as a store: the path of an SQLite file, or the URI of a store or server."""
    text = text.removeprefix("sqlite:///") if "?" not in text else text
    return text if "://" in text else Path(text)


def store_uri(store: Path | str) -> str:
    """Return the URI of a store: absolute for a file, so that it holds in any working directory."""
    return f"sqlite:///{store.resolve()}" if isinstance(store, Path) else store


def public(text: object) -> str:
    """Return a text with the user's name and password taken out of every URI in it, and on one line."""
    return re.sub(r"(?<=://)[^\s/]*@", "", " ".join(str(text).split()))


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a nested configuration as dotted keys and texts; None is "none", an absent section has no keys."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" != "model.moe":
            flat[f"{prefix}{key}"] = NONE if value is None else str(value)
    return flat


def parameter_names(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the parameters of every run of a table that has these configurations."""
    return sorted({*MOE_KEYS}.union(*map(flatten, configs)))


def training_id(training_digest: str, seed: int, data_digest: str) -> str:
    """Name a training run, which several records may share; so is its folder named."""
    return f"{training_digest}-s{seed}-{data_digest}"


def experiment(client: MlflowClient, name: str, store: Path | str) -> str:
    """Return the id of an experiment, made when missing."""
    found = client.get_experiment_by_name(name)
    if found:
        return found.experiment_id
    # a file store keeps its artifacts beside it; a server knows where
    location = Path(store).resolve().with_name("mlflow-artifacts").as_uri() if isinstance(store, Path) else None
    return client.create_experiment(name, artifact_location=location)


def parent(client: MlflowClient, experiment_id: str, table: str) -> str:
    """Return the id of a table's run, made when missing."""
    runs = client.search_runs([experiment_id], f"tags.table = '{table}'", max_results=1)
    if runs:
        return runs[0].info.run_id
    run = client.create_run(experiment_id, tags={"table": table}, run_name=f"table {table}")
    client.set_terminated(run.info.run_id)
    return run.info.run_id


def connect(store: Path | str) -> MlflowClient:
    """Return a client that gives up soon; MLflow is imported here, since that takes seconds.

    Raises:
        Exception: any, of MLflow, SQLAlchemy or the system.
    """
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if isinstance(store, Path) and not store.exists():
        _create(store)
    return MlflowClient(store_uri(store))


def _create(store: Path) -> None:
    """Make an SQLite store aside and rename it: one that a process left half made could never be used."""
    from mlflow import MlflowClient

    store.parent.mkdir(parents=True, exist_ok=True)
    for left in store.parent.glob(f"{store.name}.*.partial*"):  # of a process that was stopped
        left.unlink(missing_ok=True)
    aside = store.with_name(f"{store.name}.{os.getpid()}.partial")
    try:
        MlflowClient(store_uri(aside)).search_experiments()
        with suppress(FileExistsError):  # another process was faster
            os.link(aside, store)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def open_store(store: Path | str) -> Iterator[MlflowClient]:
    """Give a client; whatever fails in the block becomes one line.

    Raises:
        ConfigError: when the store cannot be used or does not answer.
    """
    try:
        client = connect(store)
    except Exception as error:
        raise _unusable(store, error) from None
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield client
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise _unusable(store, error) from None


def _unusable(store: Path | str, error: Exception) -> ConfigError:
    return ConfigError(f"MLflow store {public(store)}: cannot be used; start its server or name another with --store. "
                       "The runs and records are unharmed, and the same command publishes them "
                       f"({public(error)[:200]})")
