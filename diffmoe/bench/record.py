"""The record of one call of the bench: what was timed, where, and every sample; one JSON file.

Tables and figures are made from records alone. Numbers that follow from others are properties, never stored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffmoe.bench.cases import Case
from diffmoe.bench.timing import spread
from diffmoe.config import ConfigError
from diffmoe.training.checkpoint import write_whole

SCHEMA = 1
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
"""Dense bf16 of the vendor's data sheet, by what the device's name holds."""
OK, OUT_OF_MEMORY, ERROR, SKIPPED = "ok", "out of memory", "error", "skipped"


@dataclass(kw_only=True)
class Result:
    """What was measured of one case."""

    case: Case
    status: str
    """ok, out of memory, error or skipped (the time was over)."""
    message: str = ""
    """One line for what is not ok."""
    num_params: int = 0
    flops_per_image: float = 0.0
    """Of activated parameters: of a training step, a whole sampling run or one forward."""
    capacity: float | None = None
    """Experts a token: of training by its rule, of inference measured."""
    build_s: float = 0.0
    warm_up_s: float = 0.0
    """Seconds to build the case and to warm it up, compilation included if its cache was cold."""
    peak_bytes: int = 0
    """Allocated at the most, beyond what other cases held."""
    reserved_bytes: int = 0
    """Taken from the device."""
    wave: int = 0
    """Cases of one wave were in memory together and took turns."""
    samples_ms: list[list[float]] = field(default_factory=list)
    """Milliseconds of each call, one list a visit."""
    parts: list[dict[str, Any]] = field(default_factory=list)
    """`name`, `count` (of a call), `ms`, `flops`, `bytes`, `how` (or `error`) of the parts of a call."""
    relative_error: float | None = None
    """Of the reference's output against ours with the same weights, float32."""

    @property
    def quartiles_ms(self) -> tuple[float, float, float]:
        """Return the quartiles of a call's milliseconds; the middle one is the median."""
        return spread([sample for visit in self.samples_ms for sample in visit])

    @property
    def images_per_second(self) -> float:
        """Return the median's."""
        return 1e3 * self.case.images / self.quartiles_ms[1]

    @property
    def flops(self) -> float:
        """Return activated operations a second."""
        return self.flops_per_image * self.images_per_second


@dataclass(kw_only=True)
class BenchRecord:
    """One call of the bench."""

    id: str
    started: str
    """UTC."""
    environment: dict[str, Any]
    """`commit`, `dirty`, `versions`, `hardware`, `threads`."""
    settings: dict[str, Any]
    ceilings: dict[str, float] = field(default_factory=dict)
    """`matmul_flops` (bf16 8192 cubed; CPU: float32 512 cubed) and `copy_bytes` (read plus written), a second."""
    peak_flops: float | None = None
    """What MFU is relative to."""
    probes: list[float] = field(default_factory=list)
    """The product's FLOP/s before each wave: whether the machine stayed the same."""
    reference: dict[str, Any] = field(default_factory=dict)
    """`digest` of the authors' files and `differences` of the work."""
    startup: list[dict[str, Any]] = field(default_factory=list)
    """`size`, `system`, `batch`, `cache` (cold or warm), seconds by part and their sum `total`."""
    results: list[Result] = field(default_factory=list)
    schema: int = SCHEMA

    def mfu(self, result: Result) -> float | None:
        """Return a result's activated operations over the peak."""
        return None if self.peak_flops is None else result.flops / self.peak_flops

    def least_ms(self, part: dict[str, Any]) -> float:
        """Return the milliseconds of one time of a part at the ceiling that bounds it."""
        return 1e3 * max(part["flops"] / self.ceilings["matmul_flops"], part["bytes"] / self.ceilings["copy_bytes"])

    def find(self, **wanted: Any) -> list[Result]:
        """Return the timed results whose case has these fields; a call that was stopped has one that is not."""
        return [result for result in self.results if result.status == OK and result.samples_ms and
                all(getattr(result.case, name) == value for name, value in wanted.items())]

    def ratio(self, result: Result, **changes: Any) -> float | None:
        """Return a result's images/s over those of the same work with `changes` (system, implementation).

        A system without dynamic inference has one load; cases at the largest batch that fits compare across batches.
        """
        wanted = dataclasses.asdict(result.case) | changes
        searched = self.settings.get("largest", False)
        for load in (wanted["load"], ""):
            fixed = {name: value for name, value in wanted.items() if not (name == "batch" and searched)}
            others = self.find(**fixed | {"load": load})
            if others:
                return result.images_per_second / others[0].images_per_second
        return None


def peak_of(hardware: str) -> float | None:
    """Return the peak of a device by its name, or None for one that is not listed."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in hardware), None)


def record_id(workload: str, environment: dict[str, Any], settings: dict[str, Any], started: str) -> str:
    """Return a name without host: the workload and what identifies this call."""
    content = json.dumps([environment, settings, started], sort_keys=True, default=str)
    return f"bench-{workload}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def write_bench(folder: Path, record: Any) -> Path:
    """Write a record, whole or not at all; a call writes its own again and again as it grows.

    Args:
        record: any dataclass with an `id`, which names the file.

    Raises:
        ConfigError: when the folder cannot be written.
    """
    path = folder / f"{record.id}.json"
    text = json.dumps(dataclasses.asdict(record), indent=1) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda aside: aside.write_text(text))
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error})") from None
    return path


def read_benches(folder: Path) -> list[BenchRecord]:
    """Return the records of a folder in order of time.

    Raises:
        ConfigError: when there is none, or one is not of this schema.
    """
    records = []
    for path in sorted(folder.glob("bench-*.json")):
        try:
            content = json.loads(path.read_text())
            if content.get("schema") != SCHEMA:
                raise ValueError(f"schema {content.get('schema')}, this version reads {SCHEMA}")
            content["results"] = [Result(**line | {"case": Case(**line["case"])}) for line in content["results"]]
            records.append(BenchRecord(**content))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path}: not a record of the bench ({error})") from None
    if not records:
        raise ConfigError(f"{folder}: no records (bench-*.json); run python -m diffmoe.bench --out {folder}")
    return sorted(records, key=lambda record: record.started)
