"""One training run in one folder: started, interrupted, gone on with, finished; the same command does all of it.

The folder holds config.yaml, losses.jsonl, events.jsonl (what `Watch` noticed), while it runs some
checkpoint-<step>.safetensors, and at the end ema.safetensors and ema-<half-life>.safetensors of each further average.
Whenever a process dies, the newest whole checkpoint and the log lines up to its step are there; the next start repeats
the steps after it, on a CPU bit for bit.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from torch import Tensor

from diffmoe.config import ConfigError, RunConfig, digest, shareable, to_dict
from diffmoe.data import TrainingData
from diffmoe.models.dit import DiT, build_model
from diffmoe.training.checkpoint import Checkpoints, load_weights, locked, reason, save_weights, write_whole
from diffmoe.training.distributed import ALONE, HANG_S, LONG_S, Heartbeat, World
from diffmoe.training.ema import average_file
from diffmoe.training.graph import EAGER_CALLS, release_memory
from diffmoe.training.log import JsonLines, read_lines
from diffmoe.training.signals import Signals
from diffmoe.training.trainer import Trainer
from diffmoe.training.watch import Watch

LOG_EVERY = 25
"""Steps between two lines of losses.jsonl; reading losses waits for the device."""
LOG_FILE, CONFIG_FILE = "losses.jsonl", "config.yaml"
LOG_FIELDS = ("step", "images", "seconds", "images_per_second", "learning_rate")
"""What a line of losses.jsonl holds besides the losses; the throughput is that since the line before."""
SAVE_EVERY_S = 60.0
"""Seconds between checkpoints."""
MEET_S = 2.0
"""Seconds after which several processes agree whether to stop, `LOG_EVERY` steps at most."""

log = logging.getLogger(__name__)
Progress = Callable[[int, dict[str, float]], None]
"""Told the steps done and the latest losses, after each step."""
Turn = Callable[[], contextlib.AbstractContextManager[Any]]
"""Gives what waits for a device that others use, and holds it."""


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
        chosen = average_file(config.evaluation.ema_half_life_images, config.evaluation.budget_images)
        return load_network(self.folder / chosen, config, device)

    def losses(self) -> list[list[Any]]:
        """Return [step, {name: loss}] of each line of the log up to the step of the average."""
        return [[line["step"], {name: value for name, value in line.items() if name not in LOG_FIELDS}]
                for line in self._log()]

    def images_per_second(self) -> float:
        """Return the median throughput of the log's lines: that of training alone, start and checkpoints left out."""
        return median(line["images_per_second"] for line in self._log())

    def _log(self) -> list[dict[str, Any]]:
        return [line for line in read_lines(self.folder / LOG_FILE) if line["step"] <= self.description["step"]]


def train_run(config: RunConfig, seed: int, data: TrainingData, folder: Path, device: torch.device, *,
              world: World = ALONE, deadline: float = math.inf, turn: Turn = contextlib.nullcontext,
              progress: Progress = lambda step, losses: None) -> TrainedRun:
    """Train, going on from the folder's newest checkpoint; a run that got there before is only returned.

    With `evaluation.budget_images` training pauses at that budget, to go on when a later one is asked for.

    Args:
        deadline: value of `time.monotonic()` at which to save and stop.
        turn: entered after the first `EAGER_CALLS` steps, which compile, until the end; waiting is no training.

    Raises:
        ConfigError: when the folder is in use, cannot be written or belongs to another run, when too many losses or
            gradients are not finite, or when the processes were started differently.
        Interrupted: after SIGTERM, SIGINT or the deadline, with the state saved.
    """
    identity = {"config_digest": digest(config, scope="training"), "seed": seed, "data_digest": data.digest}
    runtime = {f"runtime.{key}": value for key, value in to_dict(config.runtime).items() if key != "device"}
    world.require_agreement(identity | runtime | {"torch": torch.__version__})
    if finished := _finished(config, folder, world, identity):  # others may read it, or train on to a later budget
        return finished
    with locked(folder) if world.is_main else contextlib.nullcontext():
        if finished := _finished(config, folder, world, identity):  # by who held the folder until now
            return finished
        try:
            run = _Run(config, seed, data, folder, device, world, identity)
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be written ({reason(error)}); choose another with --out") from None
        return run.train(deadline, turn, progress)


def load_network(path: Path, config: RunConfig, device: torch.device) -> DiT:
    """Return the network of a file of weights in eval mode, with the inference options of `config`."""
    weights, _ = load_weights(path)
    model = build_model(config.model).to(device).eval()
    model.load_state_dict(weights)
    return model.set_backend(config.runtime.backend)


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the configuration of a folder's run.

    Raises:
        OSError: when it cannot be written.
    """
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    write_whole(folder / CONFIG_FILE, lambda aside: aside.write_text(text))


def is_trained(config: RunConfig, folder: Path) -> bool:
    """Say whether the folder holds the network at the budget of `config`, or at the end."""
    return _average_of(config, folder).exists()


def _average_of(config: RunConfig, folder: Path) -> Path:
    """Return the file that is written last, when the run has got to the budget of `config`."""
    return folder / average_file(budget_images=config.evaluation.budget_images)


def _finished(config: RunConfig, folder: Path, world: World, identity: dict[str, Any]) -> TrainedRun | None:
    path = _average_of(config, folder)
    description = world.from_main(load_weights(path)[1] if world.is_main and path.exists() else None)
    if description is None:
        return None
    _check_identity(path, description, identity)
    return TrainedRun(folder, description)


class _Run:
    """A run that is under way: the trainer with what it writes and watches."""

    def __init__(self, config: RunConfig, seed: int, data: TrainingData, folder: Path, device: torch.device,
                 world: World, identity: dict[str, Any]) -> None:
        self.config, self.folder, self.device, self.world, self.identity = config, folder, device, world, identity
        self.trainer = Trainer(config, seed, data, device, world)
        self.checkpoints = Checkpoints(folder, asynchronous=device.type == "cuda")
        description = self._go_on()
        self.num_steps = config.images_seen // config.training.batch_size
        if self.trainer.step > self.num_steps:
            missing = folder / average_file(budget_images=config.images_seen)
            raise ConfigError(f"{missing}: missing, and the run is past it; put it back, or use another folder")
        self.watch = Watch(description.get("watch"))
        self.seconds = description.get("seconds", 0.0)
        self.objectives: list[Tensor] = []  # of the steps since the last look, still on the device
        self.next_meeting, self.last_meeting = 0, (self.trainer.step, time.monotonic())
        if world.is_main:
            write_config(folder, config)
        self.losses, self.events = (JsonLines(folder / name if world.is_main else None, self.trainer.step)
                                    for name in (LOG_FILE, "events.jsonl"))

    def train(self, deadline: float, turn: Turn, progress: Progress) -> TrainedRun:
        """Train to the end or budget, see `train_run`."""
        trainer, num_steps = self.trainer, self.num_steps
        batch_size, budgets = self.config.training.batch_size, self.config.training.budgets
        passed = {images // batch_size: images for images in budgets if images // batch_size < num_steps}
        self.started = last_save = time.monotonic()
        self.last_line = trainer.step, self.started
        values: dict[str, float] = {}
        stop = False
        with self.losses, self.events, Signals() as signals:
            if trainer.step in passed:  # a process that died may have saved this step and not its averages
                kept = self.folder / average_file(budget_images=passed[trainer.step])
                if not self.world.from_main(kept.exists()):
                    self._keep_averages(passed[trainer.step])
            if trainer.step == 0:
                self._save()  # now is when to learn that the disk is full
            with Heartbeat(self.world, HANG_S) as heart, contextlib.ExitStack() as held:
                trainer.before_compiling = lambda: heart.beat(LONG_S)
                compiling = EAGER_CALLS
                while trainer.step < num_steps and not stop:
                    losses = trainer.train_step()
                    heart.beat()
                    self.objectives.append(trainer.objective)
                    compiling -= 1
                    if compiling == 0:
                        self._take(turn, held, signals)
                    if trainer.step % LOG_EVERY == 0 or trainer.step == num_steps:
                        values, good = self._look(losses)
                        unsaved_s, busy = self.world.largest(
                            [time.monotonic() - last_save, float(self.checkpoints.busy)], self.device)
                        if good and unsaved_s > SAVE_EVERY_S and not busy:
                            heart.beat(LONG_S)
                            self._save()
                            heart.beat()
                            last_save = time.monotonic()
                        heart.start()
                    if trainer.step in passed:
                        self._notice()
                        heart.beat(LONG_S)
                        self._save(final=True)  # as below
                        self._keep_averages(passed[trainer.step])
                    progress(trainer.step, values)
                    stop = self._asked_to_stop(signals.received is not None or time.monotonic() > deadline)
            if trainer.step < num_steps:
                self._notice()
                self._save(final=True)
                self.world.from_main(None)  # nobody leaves before it is saved: torchrun would end the rest
                raise Interrupted(signals.received)
            if self.config.evaluation.budget_images is not None:
                self._save(final=True)  # first: a restart goes on from here and cuts no line of what is trained
            description = self._keep_averages(self.config.evaluation.budget_images)
        if signals.received is not None:  # too late for the training, not for what comes after it
            raise Interrupted(signals.received)
        return TrainedRun(self.folder, description)

    def _take(self, turn: Turn, held: contextlib.ExitStack, signals: Signals) -> None:
        """Wait for the turn or a signal, and take the time for none of the training's."""
        release_memory(self.device)  # before the capture takes what a step needs
        before = time.monotonic()
        with signals.ending_waits():
            if signals.received is None:
                held.enter_context(turn())
        waited = time.monotonic() - before
        self.started += waited
        self.last_line = self.last_line[0], self.last_line[1] + waited

    def _go_on(self) -> dict[str, Any]:
        """Load the newest whole checkpoint, the main process's choice; return its description, empty without one."""
        found = self.checkpoints.newest() if self.world.is_main else None
        name = self.world.from_main(found[2].name if found else None)
        if name is None:
            return {}
        state, description = found[:2] if found else load_weights(self.folder / name)
        _check_identity(self.folder / name, description, self.identity)
        self.trainer.load_state(state, description["step"])
        return description

    def _look(self, losses: dict[str, Tensor]) -> tuple[dict[str, float], bool]:
        """Read what the device has: log the losses, and say whether every step since the last look changed something.

        Raises:
            ConfigError: after too many steps that did not.
        """
        step, skipped = self.trainer.step, self.watch.skipped
        means = self.world.mean(list(losses.values()))
        values = {name: mean.item() for name, mean in zip(losses, means, strict=True)}
        self._notice()
        for event in self.watch.experts(step, self.world.least(self.trainer.idle_LE).tolist()):
            self._tell(event)
        if all(map(math.isfinite, values.values())):
            self._write_losses(values)
        if self.watch.skipped > self.config.runtime.max_skipped_steps:
            raise ConfigError(f"step {step}: {self.watch.skipped} steps changed nothing, for the loss or a gradient was"
                              f" not finite (now {values}); lower training.learning_rate, or look at the images that "
                              f"{self.folder / 'events.jsonl'} names. The checkpoints are from before")
        return values, self.watch.skipped == skipped

    def _write_losses(self, values: dict[str, float]) -> None:
        (before, at), step, now = self.last_line, self.trainer.step, time.monotonic()
        batch_size, rate = self.config.training.batch_size, self.trainer.optimizer.param_groups[0]["lr"]
        speed = (step - before) * batch_size / (now - at)
        fields = (step, step * batch_size, self.seconds + now - self.started, speed, rate)
        self.losses.write(dict(zip(LOG_FIELDS, fields, strict=True)) | values)
        self.last_line = step, now

    def _notice(self) -> None:
        """Look at the objectives of the steps since the last time."""
        if not self.objectives:
            return
        first, batch_size = self.trainer.step - len(self.objectives) + 1, self.config.training.batch_size
        for event in self.watch.steps(first, torch.stack(self.objectives).tolist()):
            if event["event"] == "not finite":
                event["images"] = self.trainer.order.indices((event["step"] - 1) * batch_size, batch_size).tolist()
            self._tell(event)
        self.objectives.clear()

    def _tell(self, event: dict[str, Any]) -> None:
        self.events.write(event)
        if self.world.is_main:
            log.warning("step %d: %s, see %s", event["step"], event["event"], self.events.path)

    def _asked_to_stop(self, asked: bool) -> bool:
        """Say whether any process was asked to stop; several agree every few steps, since that waits for the device."""
        if self.world.size == 1:
            return asked
        step, now = self.trainer.step, time.monotonic()
        if step < self.next_meeting:
            return False
        met, at = self.last_meeting
        stop, step_s = self.world.largest([float(asked), (now - at) / (step - met)], self.device)
        self.next_meeting = step + max(1, min(LOG_EVERY, int(MEET_S / max(step_s, 1e-6))))
        self.last_meeting = step, now
        return stop > 0

    def _describe(self) -> dict[str, Any]:
        return self.identity | {"config": shareable(self.config), "step": self.trainer.step,
                                "watch": self.watch.state(), "processes": self.world.size,
                                "seconds": self.seconds + time.monotonic() - self.started}

    def _save(self, *, final: bool = False) -> None:
        """Write a checkpoint, after the log lines up to its step; `final`: or stop with one line."""
        tensors = self.trainer.state().items() if final else self.trainer.tensors()
        if self.world.is_main:
            error = self._sync_logs()
            if final and error is not None:
                raise ConfigError(f"{self.folder}: cannot be written ({reason(error)}); make room, and the same "
                                  "command goes on from the last checkpoint")
            if final:
                self.checkpoints.save_now(dict(tensors), self._describe())
            elif error is None:
                self.checkpoints.save(tensors, self._describe())
        collections.deque(tensors, maxlen=0)  # every process gives its share of all, wanted or not

    def _sync_logs(self) -> OSError | None:
        return self.losses.flush(sync=True) or self.events.flush(sync=True)

    def _keep_averages(self, budget_images: int | None) -> dict[str, Any]:
        """Write the averaged networks, last the one whose file says that all is done; return their description.

        At the end of the run they take the place of the checkpoints.
        """
        description, averages = self._describe(), self.trainer.averages()  # every process gives its share
        if not self.world.is_main:
            return description
        try:
            if error := self._sync_logs():
                raise error
            for half_life, average in reversed(averages.items()):
                save_weights(self.folder / average_file(half_life, budget_images), average, description)
        except OSError as error:
            raise ConfigError(f"{self.folder}: the trained weights cannot be written ({reason(error)}); make room, and "
                              "the same command goes on from the last checkpoint") from None
        if budget_images is None:
            self.checkpoints.clear()
        return description


def _check_identity(path: Path, description: dict[str, Any], identity: dict[str, Any]) -> None:
    for key, value in identity.items():
        if description.get(key) != value:
            raise ConfigError(f"{path}: of another run ({key} {description.get(key)}, not {value}); use another folder")
