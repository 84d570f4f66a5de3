"""What Ray runs: a trial trains once with one seed, then samples and measures every row that shares the checkpoint.

A thin adapter over diffmoe.cells. The run's folder is the checkpoint: a trial that comes back after a crash, on any
worker that sees the folder, goes on from it, and what is recorded is skipped. The folder must be shared by all nodes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from ray import tune

from diffmoe.cells import Cell, Row, Store, gpu_turn, group_by_training, run_cell
from diffmoe.cli import choose_device
from diffmoe.config import ConfigError
from diffmoe.data import ImageData, load_data
from diffmoe.training.run import Interrupted, train_run

LOSS_DECAY = 0.9
"""Of the average of the diffusion loss that exploring compares, a line of the loss log."""

Trials = Mapping[str, Sequence[Cell]]
"""The cells of each trial, by the trial's name."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every trial of a sweep needs to know."""

    scale: str
    store: Store
    folder: Path
    """Working directory, for relative paths in a configuration."""
    deadline: float
    """Value of `time.time()` at which to save and stop; infinity for none."""
    explore: bool
    """Train only, and report the diffusion loss as it goes."""


def make_trials(rows: Sequence[Row], seeds: Sequence[int]) -> dict[str, list[Cell]]:
    """Group the cells of a sweep by the training that they share, seed by seed, and name each by its first row."""
    groups = group_by_training([Cell(row, seed) for seed in seeds for row in rows])
    return {f"{cells[0].row.key}-s{cells[0].seed}": cells for cells in groups}


def run_trial(config: Mapping[str, Any], *, trials: Trials, work: Work) -> None:
    """Run the cells of the trial `config["trial"]` that are not recorded; Ray Tune's trainable.

    Input that cannot be used is reported as `error`, for it would fail again; anything else that goes wrong raises,
    and Ray tries again.
    """
    os.chdir(work.folder)
    cells = trials[config["trial"]]
    try:
        run = cells[0].row.config
        share = tune.get_context().get_trial_resources().required_resources
        torch.set_num_threads(int(share["CPU"]))
        device = choose_device(run.runtime.device if share.get("GPU") else "cpu")
        data = load_data(run.data, run.model)
        if work.explore:
            _explore(cells[0], data, device, work)
        else:
            _record(cells, data, device, work)
    except ConfigError as error:
        tune.report({"error": str(error)})
    except Interrupted:  # out of time, with the state saved
        tune.report({"error": None})


def _record(cells: Sequence[Cell], data: ImageData, device: torch.device, work: Work) -> None:
    missing = [cell for cell in cells if not work.store.has(cell, data)]
    with ExitStack() as held:
        # One turn for all rows: given up after each, it comes back after other trials' whole trainings.
        take_turn = cache(lambda: held.enter_context(gpu_turn(work.store.folder, device)))

        def turn(cell: Cell) -> AbstractContextManager[Any]:
            take_turn()
            return held.pop_all() if cell is missing[-1] else nullcontext()  # the last one measures without it

        for cell in missing:
            if time.time() > work.deadline:
                raise Interrupted(None)
            run_cell(cell, work.scale, data, work.store, device, deadline=_local(work.deadline),
                     turn=partial(turn, cell))


def _explore(cell: Cell, data: ImageData, device: torch.device, work: Work) -> None:
    average = seen = None

    def report(step: int, losses: dict[str, float]) -> None:
        nonlocal average, seen
        if losses is not seen and losses:  # new ones come every few steps
            seen = losses
            average = losses["mse"] if average is None else LOSS_DECAY * average + (1 - LOSS_DECAY) * losses["mse"]
            tune.report({"step": step, "loss": average})

    run = train_run(cell.row.config, cell.seed, data, work.store.run_folder(cell, data), device,
                    deadline=_local(work.deadline), progress=report)
    if seen is None:  # it had been trained before
        for line in run.losses():
            report(line["step"], line)


def _local(deadline: float) -> float:
    """Turn a time of day, which nodes share, into this process's monotonic clock."""
    return time.monotonic() + deadline - time.time()
