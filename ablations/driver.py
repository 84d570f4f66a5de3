"""Run trials on Ray Tune: started, killed, gone on with, on this machine or on a running cluster.

Ray keeps the order of work and replaces workers that die. Results are in records and run folders alone, so that Ray's
own state is thrown away once nothing is left to do.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ.update({  # read when ray is imported
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_AIR_NEW_OUTPUT": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt is ours: everything worth keeping is on disk
    "RAY_worker_niceness": "0"})  # a trial is timed as it would be by hand

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler

from ablations.trials import Trials, Work, run_trial
from diffmoe.config import ConfigError, digest, require
from diffmoe.workers import cpu_count

OBJECT_STORE_BYTES = 100 * 2**20
"""Nothing but configurations passes through it; Ray's own default is a third of the memory."""
MAX_FAILURES = 3
"""Times that a trial whose worker died is taken up again."""
GRACE_SHARE, REDUCTION = 16, 4
"""Exploring: nobody is stopped in the first 1/16 of the steps, and at 1/16 and 1/4 the best quarter goes on."""

log = logging.getLogger(__name__)
for name in ("ray.tune", "ray._private.authentication"):  # a worker that died is a page there, and a line of callbacks
    logging.getLogger(name).setLevel(logging.CRITICAL)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Where trials run, and how many at once."""

    address: str | None = None
    """Of a running Ray cluster, or `auto`; None starts Ray on this machine."""
    jobs: int | None = None
    """Trials at once; None: as many as there are CPUs, or GPU shares."""
    gpus_per_trial: float | None = None
    """A share of a GPU, or a number of them; None: one where there are any and the configuration allows it."""

    def __post_init__(self) -> None:
        require(self.jobs is None or self.jobs >= 1, "--jobs", self.jobs, "use 1 or more")
        gpus = self.gpus_per_trial or 0
        require(gpus >= 0 and (gpus <= 1 or gpus == int(gpus)), "--gpus-per-trial", gpus,
                "use a share of a GPU up to 1, or a whole number")


@contextmanager
def started_ray(resources: Resources) -> Iterator[None]:
    """Join or start Ray, and leave it as it was.

    Raises:
        ConfigError: when there is no cluster at the address, or Ray does not start.
    """
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "configure_logging": False}
    try:
        if resources.address:
            ray.init(address=resources.address, **quiet)
        else:
            ray.init(address="local", num_cpus=max(resources.jobs or 1, cpu_count()), include_dashboard=False,
                     object_store_memory=OBJECT_STORE_BYTES, **quiet)
    except Exception as error:  # a node that starts too slowly is a bare one
        where = f"no Ray cluster answers at --address {resources.address}" if resources.address else "Ray did not start"
        raise ConfigError(f"{where} ({str(error)[:200]}); start one with ray start --head (with a token: set "
                          "RAY_AUTH_MODE=token here too), or leave --address out to run on this machine") from None
    try:
        yield
    finally:
        ray.shutdown()


def gpus_of_a_trial(resources: Resources, device: str) -> float:
    """Return the GPUs that each trial gets of the cluster joined, for configurations with `runtime.device: device`.

    Raises:
        ConfigError: when there are fewer than asked for.
    """
    found = ray.cluster_resources().get("GPU", 0)
    wanted = resources.gpus_per_trial
    if wanted is None:
        wanted = 1 if device.startswith("cuda") or (device == "auto" and found) else 0
    if wanted > found:
        raise ConfigError(f"--gpus-per-trial {wanted:g}: Ray sees {found:g} GPUs; use --gpus-per-trial 0 with "
                          "runtime.device=auto, or a machine that has them")
    if device.startswith("cuda") and not wanted:
        raise ConfigError(f"runtime.device={device}: trials without a GPU cannot use it; leave --gpus-per-trial out")
    return wanted


def cpus_of_a_trial(gpus: float) -> int:
    """Return the CPUs that each trial gets: one, for a small network gains nothing from more, or its GPUs' share.

    What a GPU has drawn is measured on the CPU.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    shares = [node.get("CPU", 0) * gpus / node["GPU"] for node in nodes if gpus and node.get("GPU")]
    return max(1, int(min(shares, default=1)))


def run_trials(names: Sequence[str], trials: Trials, work: Work, resources: Resources, sweep: str,
               callbacks: Sequence[tune.Callback]) -> list[dict[str, object]]:
    """Run trials to their end, going on with those of an earlier call that was killed.

    Args:
        names: of the trials to run, unless Ray goes on with an earlier call's.
        trials: all of the sweep's.
        sweep: name of the sweep, the same for the same command.

    Returns:
        What each trial last reported, with its name as `trial`, and `error`: None, or why it failed for good.

    Raises:
        ConfigError: for resources that are not there.
    """
    storage = work.store.folder / "ray"
    with started_ray(resources):
        gpus = gpus_of_a_trial(resources, trials[names[0]][0].row.config.runtime.device)
        trainable = tune.with_resources(tune.with_parameters(run_trial, trials=trials, work=work),
                                        {"cpu": cpus_of_a_trial(gpus), "gpu": gpus})
        run = tune.RunConfig(name=sweep, storage_path=str(storage), verbose=0,
                             failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                             callbacks=[JsonLoggerCallback(), *callbacks])
        tuner = _restore(storage / sweep, trainable) or tune.Tuner(
            trainable, param_space={"trial": tune.grid_search(list(names))}, run_config=run,
            tune_config=_tune_config(trials, work, resources))
        results = tuner.fit()
    return [{"error": None} | (result.metrics or {}) | _failure(result) for result in results]


def _failure(result: tune.Result) -> dict[str, object]:
    error = {"error": str(result.error).strip().splitlines()[-1]} if result.error else {}
    return error | {"trial": Path(result.path).name}


def forget(work: Work, name: str) -> None:
    """Throw Ray's state of a sweep away."""
    shutil.rmtree(work.store.folder / "ray" / name, ignore_errors=True)


def sweep_name(trials: Trials, *, explore: bool) -> str:
    """Name a sweep by its cells, so that the same command finds its state."""
    cells = sorted(f"{name}:{digest(cell.row.config)}" for name, cells in trials.items() for cell in cells)
    kind = "explore" if explore else "sweep"
    return f"{kind}-{hashlib.sha256(' '.join(cells).encode()).hexdigest()[:12]}"


def _restore(path: Path, trainable: object) -> tune.Tuner | None:
    """Return the sweep at `path`, or None where there is none that can be gone on with."""
    if not (tune.Tuner.can_restore(str(path)) and any(path.glob("experiment_state-*.json"))):
        return None
    try:
        return tune.Tuner.restore(str(path), trainable=trainable, resume_errored=True)
    except Exception as error:  # cut short while it was written: the records say what is left
        log.warning("Ray's state in %s cannot be read (%s); planning anew", path, error)
        shutil.rmtree(path)
        return None


def _tune_config(trials: Trials, work: Work, resources: Resources) -> tune.TuneConfig:
    asha = {}
    if work.explore:
        steps = max(cells[0].row.config.training.num_steps for cells in trials.values())
        asha = {"metric": "loss", "mode": "min", "scheduler": ASHAScheduler(
            time_attr="step", max_t=steps, grace_period=max(1, steps // GRACE_SHARE), reduction_factor=REDUCTION)}
    return tune.TuneConfig(max_concurrent_trials=resources.jobs, reuse_actors=True, trial_name_creator=_trial_name,
                           trial_dirname_creator=_trial_name, **asha)


def _trial_name(trial: Trial) -> str:
    return trial.config["trial"]

