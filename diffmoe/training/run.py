"""One training run in one folder: started, interrupted, gone on with, finished; the same command does all of it.

The folder holds config.yaml, losses.jsonl, checkpoint.safetensors while it runs, and at the end ema.safetensors.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml

from diffmoe.config import ConfigError, RunConfig, digest, to_dict
from diffmoe.data import ImageData
from diffmoe.models.dit import DiT, build_model
from diffmoe.training.checkpoint import load_weights, locked, save_weights
from diffmoe.training.distributed import ALONE, World
from diffmoe.training.trainer import Trainer

LOG_EVERY = 25
"""Steps between two lines of losses.jsonl; reading losses waits for the device."""
LOG_FILE = "losses.jsonl"
LOG_FIELDS = ("step", "images", "seconds", "images_per_second", "learning_rate")
"""What a line of losses.jsonl holds besides the losses; the throughput is that since the line before."""
SAVE_EVERY_S = 60.0
"""Seconds between checkpoints."""

log = logging.getLogger(__name__)
Progress = Callable[[int, dict[str, float]], None]
"""Told the steps done and the latest losses, after each step."""


class Interrupted(Exception):
    """The run was asked to stop and has saved itself; `signum` says by which signal, None for a time budget."""

    def __init__(self, signum: int | None) -> None:
        super().__init__("interrupted")
        self.signum = signum


@dataclass(frozen=True)
class TrainedRun:
    """What a finished run left in its folder."""

    folder: Path
    description: dict[str, Any]
    """config, config_digest, seed, data_digest, step, seconds."""

    def load_average(self, config: RunConfig, device: torch.device) -> DiT:
        """Return the averaged network in eval mode, with the inference options of `config`."""
        weights, _ = load_weights(self.folder / "ema.safetensors")
        model = build_model(config.model).to(device).eval()
        model.load_state_dict(weights)
        return model.set_backend(config.runtime.backend)

    def losses(self) -> list[list[Any]]:
        """Return [step, {name: loss}] of each line of the log."""
        lines = [json.loads(line) for line in (self.folder / LOG_FILE).read_text().splitlines()]
        return [[line["step"], {name: value for name, value in line.items() if name not in LOG_FIELDS}]
                for line in lines]


def train_run(config: RunConfig, seed: int, data: ImageData, folder: Path, device: torch.device, *,
              world: World = ALONE, deadline: float = math.inf,
              progress: Progress = lambda step, losses: None) -> TrainedRun:
    """Train to the end, going on from the folder's checkpoint if it has one; a finished run is only returned.

    Args:
        deadline: value of `time.monotonic()` at which to save and stop.

    Raises:
        ConfigError: when the folder is in use, cannot be written or belongs to another run, or a loss is not finite.
        Interrupted: after SIGTERM, SIGINT or the deadline, with the state saved.
    """
    identity = {"config_digest": digest(config, scope="training"), "seed": seed, "data_digest": data.digest}
    if not world.is_main:
        return _train(config, seed, data, folder, device, world, deadline, progress, identity)
    with locked(folder):
        finished = folder / "ema.safetensors"
        if finished.exists():
            _, description = load_weights(finished)
            _check_identity(finished, description, identity)
            return TrainedRun(folder, description)
        return _train(config, seed, data, folder, device, world, deadline, progress, identity)


def _train(config: RunConfig, seed: int, data: ImageData, folder: Path, device: torch.device, world: World,
           deadline: float, progress: Progress, identity: dict[str, Any]) -> TrainedRun:
    trainer = Trainer(config, seed, data, device, world)
    saved = folder / "checkpoint.safetensors"
    seconds = 0.0
    if saved.exists():
        state, description = load_weights(saved)
        _check_identity(saved, description, identity)
        trainer.load_state(state, description["step"])
        seconds = description["seconds"]
    started = last_save = time.monotonic()

    def describe() -> dict[str, Any]:
        return identity | {"config": to_dict(config), "step": trainer.step,
                           "seconds": seconds + time.monotonic() - started}

    def save() -> None:
        if world.is_main:
            save_weights(saved, trainer.state(), describe())

    if world.is_main:
        (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    lines = _LossLog(folder / LOG_FILE, trainer.step, config.training.batch_size, enabled=world.is_main)
    values: dict[str, float] = {}
    with lines, _Signals() as signals:
        while trainer.step < config.training.num_steps:
            losses = trainer.train_step()
            if trainer.step % LOG_EVERY == 0 or trainer.step == config.training.num_steps:
                means = world.mean(list(losses.values()))
                values = {name: mean.item() for name, mean in zip(losses, means, strict=True)}
                if not all(map(math.isfinite, values.values())):
                    raise ConfigError(f"step {trainer.step}: the loss is {values}; lower training.learning_rate, or go "
                                      f"on from an earlier state in {folder}")
                lines.write(trainer.step, describe()["seconds"], trainer.optimizer.param_groups[0]["lr"], values)
                if time.monotonic() - last_save > SAVE_EVERY_S:
                    save()
                    last_save = time.monotonic()
            progress(trainer.step, values)
            if world.size == 1 or trainer.step % LOG_EVERY == 0:  # several processes agree when they meet anyway
                stop = world.any(signals.received is not None or time.monotonic() > deadline, device)
                if stop and trainer.step < config.training.num_steps:
                    save()
                    raise Interrupted(signals.received)
    description = describe()
    if world.is_main:
        save_weights(folder / "ema.safetensors", trainer.ema.model.state_dict(), description)
        saved.unlink(missing_ok=True)
    return TrainedRun(folder, description)


def _check_identity(path: Path, description: dict[str, Any], identity: dict[str, Any]) -> None:
    for key, value in identity.items():
        if description.get(key) != value:
            raise ConfigError(f"{path}: of another run ({key} {description.get(key)}, not {value}); use another folder")


class _LossLog:
    """losses.jsonl, cut back on resume to what the checkpoint has seen."""

    def __init__(self, path: Path, step: int, batch_size: int, *, enabled: bool) -> None:
        self.file = None
        self.step, self.batch_size, self.written = step, batch_size, time.monotonic()
        if enabled:
            kept = [line for line in path.read_text().splitlines()
                    if json.loads(line)["step"] <= step] if path.exists() else []
            self.file = path.open("w")
            self.file.writelines(line + "\n" for line in kept)

    def __enter__(self) -> _LossLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, step: int, seconds: float, learning_rate: float, losses: dict[str, float]) -> None:
        if self.file is not None:
            now = time.monotonic()
            speed = (step - self.step) * self.batch_size / (now - self.written)
            line = zip(LOG_FIELDS, (step, step * self.batch_size, seconds, speed, learning_rate), strict=True)
            print(json.dumps(dict(line) | losses), file=self.file, flush=True)
            self.step, self.written = step, now


class _Signals:
    """Remembers SIGTERM and the first SIGINT for the loop to act on; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        try:
            self.previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: whoever started the thread handles signals
            log.debug("signals are left to the main thread")
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
