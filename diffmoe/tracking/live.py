"""Follow training runs while they train: a thread reads each run's losses.jsonl and sends its lines to MLflow.

The file is the truth and training knows nothing of MLflow: it never waits for it and never fails because of it. When a
store does not answer, one line says so, the thread asks again ever less often, and once it answers everything since is
sent. A training run is found again by its tag `training_id` (training digest, seed, data digest), and goes on behind
the last line that was sent: after an interruption, an outage, in another process, nothing is lost or sent twice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from diffmoe.config import RunConfig, digest, from_dict, shareable, to_dict
from diffmoe.records import Record
from diffmoe.tracking.publish import publish_records
from diffmoe.tracking.store import (
    BATCH,
    EXPERIMENT,
    LOSSES,
    NONE,
    connect,
    experiment,
    flatten,
    open_store,
    parameter_names,
    parent,
    parse_store,
    public,
    training_id,
)
from diffmoe.training.checkpoint import load_weights
from diffmoe.training.run import LOG_FIELDS, LOG_FILE, Interrupted
from diffmoe.training.trainer import GRADIENT_NORM

if TYPE_CHECKING:
    from mlflow import MlflowClient

WEIGHTS = "ema.safetensors"
"""What a finished run leaves in its folder."""
TRAINING = "training"
"""The tag `kind` of a training's run."""
POLL_S = 2.0
"""Seconds between two looks at the files."""
RETRY_S = (1.0, 60.0)
"""Seconds until a store is asked again, at first and at most; each failure doubles them."""
FLUSH_S, INTERRUPTED_FLUSH_S = 10.0, 4.0
"""Longest wait at the end for what is not sent yet; an interrupted process has 10 s for everything."""
FLUSH_TRIES = 3
"""Calls at the end, of a store that does not answer."""
STATUS = {None: "FINISHED", Interrupted: "KILLED", KeyboardInterrupt: "KILLED"}
"""What MLflow calls the end of a run, by exception; FAILED for any other."""

log = logging.getLogger(__name__)


class _Connection:
    """A store that answers: its client, and the run that all runs of a scale belong to."""

    def __init__(self, client: MlflowClient, store: Path | str, scale: str) -> None:
        self.client = client
        self.experiment_id = experiment(client, EXPERIMENT, store)
        self.parent_id = parent(client, self.experiment_id, f"{scale}, local")


class _Task(Protocol):
    """Something to send."""

    later: str
    """Arguments of `python -m diffmoe.tracking` that send it."""

    def send(self, connection: _Connection) -> bool:
        """Send what there is; say whether that was all. After any exception the same call goes on."""


def add_track_option(parser: argparse.ArgumentParser) -> None:
    """Give a command line the option `--track`."""
    parser.add_argument("--track", metavar="URI", default=os.environ.get("MLFLOW_TRACKING_URI"),
                        help="MLflow server or SQLite file that is told (default: $MLFLOW_TRACKING_URI, if set)")


class Tracker:
    """Sends what the runs of one process write; does nothing without a store.

    Args:
        store: an SQLite file, or the URI of a store or server; None: no tracking.
        scale: of the runs; their parent is the run "<scale>, local".
        configs: of the table, whose parameters every run has by name.
    """

    def __init__(self, store: str | None, scale: str, configs: Sequence[RunConfig]) -> None:
        self.store = store and parse_store(store)
        self.scale = scale
        self.names = parameter_names([to_dict(config) for config in configs])
        self._tasks: list[_Task] = []
        self._wake, self._closing = threading.Event(), threading.Event()
        self._said = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def __enter__(self) -> Tracker:
        if self.store:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if not self.store:
            return
        self._closing.set()
        self._wake.set()
        self._thread.join(FLUSH_S if kind is None else INTERRUPTED_FLUSH_S)
        if self._tasks:
            command = f"python -m diffmoe.tracking {self._tasks[0].later} --store {public(self.store)}"
            log.warning("MLflow at %s: not all was sent of %d runs; later: %s", public(self.store), len(self._tasks),
                        command if kind is None else "the same command sends the rest")

    @contextlib.contextmanager
    def follow(self, folder: Path, config: RunConfig, seed: int, data_digest: str, name: str) -> Iterator[None]:
        """Send what the training run in `folder` writes while the block runs, and how it ended.

        The run may be in another process, and begin any time. Weights in its folder say that it is finished.
        """
        if not self.store:
            yield
            return
        task = _Training(folder, self.scale, config, seed, data_digest, name, self.names)
        self._add(task)
        try:
            yield
        except BaseException as error:
            task.status = STATUS.get(type(error), "FAILED")
            raise
        else:
            task.status = STATUS[None]

    def publish(self, record: Record) -> None:
        """Send a record, once: it is a run beside the training that it was measured from."""
        if self.store:
            self._add(_Measured(record, self.names))

    def _add(self, task: _Task) -> None:
        self._tasks.append(task)
        self._wake.set()

    def _work(self) -> None:
        connection, failures, tries = None, 0, FLUSH_TRIES
        while tries:
            tries -= self._closing.is_set()  # asked before sending: what came before it is sent
            self._wake.clear()
            try:
                if self._tasks and connection is None:
                    connection = _Connection(connect(self.store), self.store, self.scale)
                for task in list(self._tasks):
                    self._tasks.append(self._tasks.pop(0))  # in turns: one that fails does not hold up the rest
                    if task.send(connection):
                        self._tasks.remove(task)
                failures = 0
            except Exception as error:  # whatever it is, work goes on
                connection, failures = None, failures + 1
                self._say_once(error)
            if not failures:
                if tries < FLUSH_TRIES:
                    return
                self._wake.wait(POLL_S)
            elif self._closing.is_set():
                time.sleep(RETRY_S[0])
            else:
                self._closing.wait(min(RETRY_S[0] * 2 ** (failures - 1), RETRY_S[1]))

    def _say_once(self, error: Exception) -> None:
        if not self._said:
            log.warning("MLflow at %s does not answer (%s); work goes on, and what it misses is sent when it does",
                        public(self.store), public(error)[:200])
        self._said = True


class _Training:
    """A training run: created or found again, then the lines of its losses.jsonl."""

    def __init__(self, folder: Path, scale: str, config: RunConfig, seed: int, data_digest: str, name: str,
                 names: Sequence[str]) -> None:
        self.later = f"send {os.path.relpath(folder)}"
        self.status: str | None = None
        """How it ended, for MLflow, if not with weights in its folder."""
        self._path = folder / LOG_FILE
        self._name = f"train {name} seed {seed}"
        self._id = training_id(digest(config, scope="training"), seed, data_digest)
        self._params = dict.fromkeys(names, NONE) | flatten(shareable(config)) | {
            "scale": scale, "system": name, "seed": str(seed)}
        self._run: Any = None
        self._sent_images = 0

    def send(self, connection: _Connection) -> bool:
        """Send the lines behind the last one sent; at the end the status too. A run that never began is none."""
        # asked before the lines are read: what the run wrote is among them
        ended = STATUS[None] if (self._path.parent / WEIGHTS).exists() else self.status
        if not self._path.exists():
            return ended is not None
        client = connection.client
        try:
            if self._run is None:
                self._find(connection)
            for lines in _batches(self._lines.read(), self._sent_images):
                self._set_status(client, "RUNNING")
                client.log_batch(self._run.info.run_id, self._metrics(lines))
                self._sent_images = lines[-1]["images"]
            if ended:
                self._set_status(client, ended)
        except Exception:
            self._run = None  # what arrived is asked anew
            raise
        return ended is not None

    def _find(self, connection: _Connection) -> None:
        from mlflow.entities import Param

        client = connection.client
        found = client.search_runs([connection.experiment_id], max_results=1, filter_string=(
            f"tags.kind = '{TRAINING}' and tags.training_id = '{self._id}'"))
        tags = {"mlflow.parentRunId": connection.parent_id, "kind": TRAINING, "training_id": self._id}
        run = found[0] if found else client.create_run(connection.experiment_id, tags=tags, run_name=self._name)
        if not run.data.params:
            client.log_batch(run.info.run_id, params=[Param(key, value) for key, value in self._params.items()])
        self._sent_images = run.data.metrics.get("images", 0)
        self._status = run.info.status
        self._lines = _Tail(self._path)
        self._run = run

    def _set_status(self, client: MlflowClient, status: str) -> None:
        if status == self._status:
            return
        if status == "RUNNING":
            client.update_run(self._run.info.run_id, status)
        else:
            client.set_terminated(self._run.info.run_id, status)
        self._status = status

    def _metrics(self, lines: Sequence[dict[str, float]]) -> list:
        """Return the metrics of lines. Their times follow from the lines, so that MLflow knows one that comes twice."""
        from mlflow.entities import Metric

        return [Metric(name, value, self._run.info.start_time + int(1000 * line.get("seconds", 0)), line["step"])
                for line in lines for name, value in line_metrics(line).items()]


class _Measured:
    """A record."""

    def __init__(self, record: Record, names: Sequence[str]) -> None:
        self.later = f"publish --scale {record.scale}"
        self._record, self._names = record, names

    def send(self, connection: _Connection) -> bool:
        """Publish it, unless it is there."""
        publish_records(connection.client, connection.experiment_id, connection.parent_id, [self._record], self._names)
        return True


def line_metrics(line: dict[str, float]) -> dict[str, float]:
    """Return the metrics of a line of losses.jsonl, by the same names for every system."""
    losses = dict.fromkeys(LOSSES, 0.0) | {name: value for name, value in line.items() if name not in LOG_FIELDS}
    known = {name: line[name] for name in LOG_FIELDS if name in line and name != "step"}
    norm = {GRADIENT_NORM: losses.pop(GRADIENT_NORM)} if GRADIENT_NORM in losses else {}
    return known | norm | {f"loss.{name}": value for name, value in losses.items()}


def _batches(lines: Sequence[dict[str, float]], sent_images: float) -> Iterator[list[dict[str, float]]]:
    """Cut the lines that are new into parts that one call takes."""
    new = [line for line in lines if line["images"] > sent_images]
    size = BATCH // max((len(line_metrics(line)) for line in new), default=1)
    return (new[start:start + size] for start in range(0, len(new), size))


class _Tail:
    """The whole lines that a file of JSON lines gained since the last look; all of them, if it was cut back since."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.last = b""
        """The last line seen, which ends at `offset`."""

    def read(self) -> list[dict[str, float]]:
        """Return the lines; one that is cut off, such as a crash leaves, is passed over."""
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self.offset - len(self.last))
            if file.read(len(self.last)) != self.last:
                self.offset = 0
            file.seek(self.offset)
            whole = file.read().splitlines(keepends=True)
            if whole and not whole[-1].endswith(b"\n"):
                whole.pop()  # still being written
            self.offset += sum(map(len, whole))
            self.last = whole[-1] if whole else self.last if self.offset else b""
            return list(_parsed(whole))
        return []


def _parsed(lines: Sequence[bytes]) -> Iterator[dict[str, float]]:
    for line in lines:
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and "images" in found:
                yield found


def send_run(folder: Path, store: Path | str, scale: str) -> None:
    """Send what a store lacks of a finished training run.

    Raises:
        ConfigError: when the folder holds no finished run, or the store cannot be used.
    """
    _, description = load_weights(folder / WEIGHTS)
    config = from_dict(RunConfig, description["config"])
    task = _Training(folder, scale, config, description["seed"], description["data_digest"], folder.name,
                     parameter_names([description["config"]]))
    task.status = STATUS[None]
    with open_store(store) as client:
        task.send(_Connection(client, store, scale))
