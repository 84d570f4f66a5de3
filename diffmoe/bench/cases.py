"""What is timed: a case names a workload, size, system, kind of work and batch; `run_config` is the run behind it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffmoe.config import SIZES, ConfigError, Precision, RunConfig, load_config, require
from diffmoe.data import ImageData

PACKAGE = Path(__file__).parents[1]
WORKLOADS = {"cifar10": PACKAGE / "configs" / "cifar10.yaml", "latent": Path(__file__).parent / "latent.yaml"}
SYSTEM_FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "baselines" / "configs")
WORK = ("train", "sample", "forward")
SMALLER_BATCHES = {"L": 128, "XL": 64, "XXL": 32, "XXXL": 32}
"""Images a training step where the workload's own batch does not fit one 80 GB GPU."""
NUM_IMAGES = {"cuda": 50_000, "cpu": 256}
LARGEST = 0
"""As a batch: the largest power of two, times the workload's own, that fits."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to time."""

    workload: str
    """A key of WORKLOADS."""
    size: str
    """A name of SIZES with the experts of a layer: S-E16."""
    system: str
    """dense, diffmoe, or the name of another system's YAML file."""
    work: str
    """train: the whole step. sample: all steps of some batches. forward: one call of the network."""
    batch: int
    """Images of a step, a sampling batch or a forward."""
    load: str = ""
    """Load of the experts in dynamic inference: `balanced`, or `skewed` as in a record. Empty: not dynamic."""
    implementation: str = "ours"
    """ours, reference-tf32 or reference-bf16."""
    sampling_batches: int = 2
    """Batches of one call to sample: `sample_images` compiles for no fewer than two, and its start is shared by all."""

    @property
    def images(self) -> int:
        """Return the images of a call."""
        return self.batch * (self.sampling_batches if self.work == "sample" else 1)

    @property
    def name(self) -> str:
        """Return a line that names the case."""
        parts = (self.workload, self.size, self.system, self.work, self.load, f"batch {self.batch or 'largest'}",
                 self.implementation)
        return " ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How cases are timed; the same for all cases of a record."""

    compile: bool
    """torch.compile (and with it the CUDA graph of a training step)."""
    precision: Precision
    sampling_steps: int
    """Integrator steps of one sampling batch."""
    sampling_batches: int = Case.sampling_batches
    """Sampling batches of one call."""
    rounds: int
    """Visits of each case; the cases that fit in memory together take turns."""
    visit_seconds: float
    """Length of a visit; it has at least three calls, or one where a call takes longer than this."""


def split_size(size: str) -> tuple[str, int]:
    """Return the name in SIZES and the experts of `S-E16` (of `S`: 16).

    Raises:
        ConfigError: for anything else.
    """
    match = re.fullmatch(r"(\w+?)(?:-E(\d+))?", size)
    if not match or match[1] not in SIZES:
        raise ConfigError(f"size {size}: use one of {', '.join(SIZES)}, with another number of experts as in L-E8")
    return match[1], int(match[2] or 16)


def run_config(case: Case, settings: Settings, further: Sequence[str] = ()) -> RunConfig:
    """Return the run of a case.

    Args:
        further: assignments, `key=value`, after the case's own.

    Raises:
        ConfigError: for a workload, size or system that is not there, or numbers that do not go together.
    """
    size, num_experts = split_size(case.size)
    require(case.workload in WORKLOADS, "workload", case.workload, f"use one of {', '.join(WORKLOADS)}")
    overrides = [f"model.size={size}", "data.name=random", f"training.batch_size={case.batch}",
                 f"training.num_images={1000 * case.batch}", "training.budgets=[]",
                 f"training.precision={settings.precision}", f"sampling.batch_size={case.batch}",
                 f"sampling.num_steps={settings.sampling_steps}",
                 f"runtime.compile={str(settings.compile).lower()}"]
    if case.system != "dense":
        overrides.append(f"model.moe.num_experts={num_experts}")
    return load_config([WORKLOADS[case.workload], system_file(case.system)], [*overrides, *further])


def system_file(system: str) -> Path:
    """Return the YAML file of a system: its name, or a path of one's own.

    Raises:
        ConfigError: when there is none.
    """
    if system.endswith(".yaml"):
        return Path(system)
    for folder in SYSTEM_FOLDERS:
        if (folder / f"{system}.yaml").is_file():
            return folder / f"{system}.yaml"
    known = sorted(path.stem for path in SYSTEM_FOLDERS[1].glob("*.yaml"))
    raise ConfigError(f"system {system}: use diffmoe, {', '.join(known)}, or a YAML file of your own")


def is_dynamic(config: RunConfig) -> bool:
    """Say whether inference decides how many experts a token gets."""
    return config.model.moe is not None and str(getattr(config.model.moe.router, "inference", "")) == "dynamic"


def list_groups(workload: str, sizes: Sequence[str], systems: Sequence[str], work: Sequence[str],
                batches: Sequence[int], loads: Sequence[str], references: Sequence[tuple[str, str]],
                settings: Settings) -> list[list[Case]]:
    """Return the cases in the order of the command line, those to be compared with one another in one group.

    Args:
        batches: images; LARGEST for a search, empty for the workload's own.
        loads: of systems with dynamic inference.
        references: (system, implementation) of the authors' code to time beside ours.
    """
    groups = []
    for size in sizes:
        for kind in work:
            for batch in batches or (own_batch(workload, size, kind),):
                first = Case(workload=workload, size="-E".join(map(str, split_size(size))), system="", work=kind,
                             batch=batch, sampling_batches=settings.sampling_batches)
                pairs = [(system, "ours") for system in systems] + list(references)
                cases = [dataclasses.replace(first, system=system, implementation=implementation)
                         for system, implementation in pairs]
                groups.append([case for one in cases for case in _with_loads(one, loads, settings)])
    return groups


def _with_loads(case: Case, loads: Sequence[str], settings: Settings) -> list[Case]:
    config = run_config(dataclasses.replace(case, batch=case.batch or 64), settings)
    if case.work == "train" or not is_dynamic(config):
        return [case]
    return [dataclasses.replace(case, load=load) for load in loads]


def own_batch(workload: str, size: str, work: str) -> int:
    """Return the images of a training step or a sampling batch that a workload has unless told otherwise."""
    require(workload in WORKLOADS, "workload", workload, f"use one of {', '.join(WORKLOADS)}")
    config = load_config([WORKLOADS[workload]])
    own = config.sampling.batch_size if work == "sample" else config.training.batch_size
    return min(own, SMALLER_BATCHES.get(split_size(size)[0], own))


def own_pools(images: int) -> list[str]:
    """Return the settings with which each process has a pool of its own: then its images are a part of the method."""
    return ["model.moe.pool_scope=process", f"model.moe.router.pool_images={images}"]


def random_images(config: RunConfig, device: torch.device) -> ImageData:
    """Return random bytes of the run's shape; speed does not depend on what they show, but zeros would be faster."""
    shape = (config.model.in_channels, config.model.input_size, config.model.input_size)
    generator = torch.Generator().manual_seed(0)
    count = NUM_IMAGES[device.type]
    return ImageData("random", torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator),
                     torch.randint(0, config.model.num_classes, (count,), generator=generator),
                     config.model.num_classes)
