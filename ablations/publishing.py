"""Tell the user and MLflow of each trial that ends; a store that is down stops nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.progress_reporter import TrialProgressCallback

from diffmoe.cells import Store
from diffmoe.config import ConfigError
from diffmoe.records import read_records
from diffmoe.tracking.publish import publish

RETRY_S = 300.0
"""Seconds until a store that did not answer is asked again."""

log = logging.getLogger(__name__)


class Quiet(TrialProgressCallback):
    """Stands where Ray would print of each trial, and prints nothing."""

    def on_trial_result(self, *arguments: Any, **info: Any) -> None:
        """Pass over a report."""

    def on_trial_error(self, *arguments: Any, **info: Any) -> None:
        """Pass over a failure; the driver returns it."""

    def on_trial_complete(self, *arguments: Any, **info: Any) -> None:
        """Pass over an end."""


class Publisher(Quiet):
    """Prints each trial that ended and publishes its records to MLflow, as children of one parent run.

    A record is published once, found again by its id, whichever command or process made it.

    Args:
        store: where the records are.
        target: MLflow's SQLite file or URI; None publishes nothing.
        table: name of the parent run.
        ids: record ids of each trial.
    """

    def __init__(self, *, store: Store, target: Path | str | None, table: str,
                 ids: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.store = store
        self.target = target
        self.table = table
        self.ids = ids
        self.silent_until = 0.0

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Say what the trial found and publish it."""
        records = {record.id: record for record in read_records(self.store.records)}
        wanted = [record_id for ids in self.ids.values() for record_id in ids]
        name = trial.config["trial"]
        found = [records[record_id] for record_id in self.ids[name] if record_id in records]
        print(f"[{len(records.keys() & wanted)}/{len(wanted)}] {name}" + ("" if found else ": nothing recorded"))
        for record in found:
            print(f"    {record.row}: {record.evaluation['distance_name']} {record.metrics['distance']:.3f}, "
                  f"C {record.activation['capacity']:.3f}; trained {record.training['seconds']:.0f} s, sampled "
                  f"{record.sampling['seconds']:.0f} s", flush=True)
        if found and time.monotonic() > self.silent_until:
            self.publish_all()

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Say that a trial is taken up again."""
        print(f"{trial.config['trial']}: its worker died; another goes on from the run's last checkpoint", flush=True)

    def publish_all(self, figures: Sequence[Path] = ()) -> None:
        """Publish what the store lacks; a store that cannot be used is a warning."""
        records = read_records(self.store.records)
        if self.target is None or not records:
            return
        try:
            publish(records, self.target, table=self.table, figures=figures)
            self.silent_until = 0.0
        except ConfigError as error:
            self.silent_until = time.monotonic() + RETRY_S
            log.warning("warning: %s", error)
