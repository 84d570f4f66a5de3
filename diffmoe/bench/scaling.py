"""Measure how training and sampling speed up over the GPUs of one machine.

    python -m diffmoe.bench.scaling                        1, 2, 4 and 8 GPUs, as many as there are
    python -m diffmoe.bench.scaling --gpus 1,2 --time-budget 300 --out FOLDER

Each case is a run of its own, under torchrun where it has several processes. Training has a batch for each GPU (weak
scaling) or the one GPU's batch for all (strong), by DDP and by FSDP2, with pools of a process and of all processes; and
apart, a model for each GPU: what is lost there is lost to the host or the slowest card, and not to communication.
Sampling has as many images for each GPU, 50,000 for the most of them. One call is one record, scaling-*.json, written
again after each case; the same command on the same commit and hardware goes on with what is not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffmoe.bench.cases import Settings, is_dynamic, own_batch, own_pools, run_config
from diffmoe.bench.profile import profile_subject
from diffmoe.bench.record import ERROR, OK, OUT_OF_MEMORY, SKIPPED, peak_of, write_bench
from diffmoe.bench.scaling_report import APART, Measured, ScalingCase, ScalingRecord, read_scaling, write_table
from diffmoe.bench.subjects import WARM_UP, Sampling, Shared, Training
from diffmoe.bench.timing import spread, time_calls
from diffmoe.cli import choose_device, run_command
from diffmoe.config import Parallel, PoolScope, Precision, RunConfig, from_dict, require, to_dict
from diffmoe.launch import run_module
from diffmoe.records import environment, peak_memory_bytes
from diffmoe.training.distributed import ALONE, World, join_world

GPUS = (1, 2, 4, 8)
RUNS = {"cuda": ("L/dense", "B-E16/diffmoe", "L-E16/diffmoe"), "cpu": ("nano/dense", "nano-E4/diffmoe")}
"""What is measured unless told otherwise: size/system."""
SAMPLED = {"cuda": 50_000, "cpu": 16}
"""Images that the most processes sample."""
CPU_BATCH = 8
LOCAL = Path("results/bench/local")
MODULE = "diffmoe.bench.scaling"


def list_cases(runs: Sequence[str], gpus: Sequence[int], device: str, work: Sequence[str]) -> list[ScalingCase]:
    """Return the cases, those of few processes first: they are what the others are compared with. Then weak scaling.

    Args:
        runs: `size/system`.
        gpus: numbers of processes.
        device: `cuda` or `cpu`.
        work: `train`, `sample` or both.

    Raises:
        ConfigError: for a run that is not `size/system`, or a batch that is not divided by the processes.
    """
    cases = []
    for count in sorted(gpus):
        for run in runs:
            size, _, system = run.partition("/")
            require(bool(system), "--runs", run, "write SIZE/SYSTEM, for example L-E16/diffmoe")
            batch = own_batch("latent", size, "train") if device == "cuda" else CPU_BATCH
            require(batch % count == 0, "--gpus", count, f"a batch of {batch} is not divided by it")
            first = ScalingCase(work="train", size=size, system=system, processes=count, batch=batch)
            if "train" in work and count == 1:
                cases.append(first)
            elif "train" in work:
                cases.append(dataclasses.replace(first, scaling="weak", parallel=APART, batch=batch * count))
                cases += [dataclasses.replace(first, scaling=scaling, parallel=parallel, pool_scope=scope,
                                              batch=batch * (count if scaling == "weak" else 1))
                          for scaling in ("weak", "strong") for parallel in map(str, Parallel)
                          for scope in (map(str, PoolScope) if system == "diffmoe" else ("",))]
            if "sample" in work:
                batch = own_batch("latent", size, "sample") if device == "cuda" else CPU_BATCH
                cases.append(dataclasses.replace(first, work="sample", scaling="" if count == 1 else "weak",
                                                 batch=batch))
    return sorted(cases, key=lambda case: (case.processes, case.scaling == "strong", case.work == "sample"))


def configure(case: ScalingCase, settings: Settings) -> RunConfig:
    """Return the run of a case: of each of its models."""
    if case.parallel == APART:
        case = dataclasses.replace(case, parallel="", batch=case.batch // case.processes)
    further = [f"runtime.parallel={case.parallel}"] if case.parallel else []
    if case.pool_scope == PoolScope.PROCESS:
        further += own_pools(case.batch // case.processes)
    elif case.pool_scope:
        further.append(f"model.moe.pool_scope={case.pool_scope}")
    return run_config(case.bench_case(), settings, further)


def measure(case: ScalingCase, settings: Settings, sampled: int, device: torch.device, world: World,
            profile: bool = False) -> Measured:
    """Measure a case; every process calls this, and each gets the numbers of the slowest and fullest one.

    Args:
        sampled: images of a process in a sampling case.
        profile: print the kernels of a training step.
    """
    started = time.perf_counter()
    config = configure(case, settings)
    named, shared = case.bench_case(), Shared(device)
    if case.work == "train":
        training = Training(named, config, shared, ALONE if case.parallel == APART else world)
        samples_ms, facts, images = _time_training(training, settings, device, world), training.facts(), case.batch
        if profile and (kernels := profile_subject(named, training, device)) and world.is_main:
            print(kernels)
    else:
        load = "balanced" if is_dynamic(config) else ""
        sampling = Sampling(dataclasses.replace(named, load=load), config, shared)
        samples_ms, images = _time_sampling(sampling, sampled, device, world), sampled * world.size
        facts = sampling.facts()
    slowest = world.largest([*spread(samples_ms), float(peak_memory_bytes(device))], device)
    return Measured(case=case, status=OK, quartiles_ms=tuple(slowest[:3]), calls=len(samples_ms), images=images,
                    peak_bytes=int(slowest[3]), total_s=time.perf_counter() - started, **facts)


def _time_training(training: Training, settings: Settings, device: torch.device, world: World) -> list[float]:
    """Time steps; as many as the slowest process makes in a visit."""
    time_calls(training.call, WARM_UP["train"], device)
    (longest,) = world.largest([max(time_calls(training.call, 3, device))], device)
    return time_calls(training.call, max(5, math.ceil(1e3 * settings.visit_seconds / longest)), device)


def _time_sampling(sampling: Sampling, images: int, device: torch.device, world: World) -> list[float]:
    """Time one run of all images, behind a short one that compiles."""
    sampling.call()
    sampling.num_images = images
    world.largest([0.0], device)  # all begin together
    return time_calls(sampling.call, 1, device)


def run_case(case: ScalingCase, settings: Settings, sampled: int, device: str, folder: Path, timeout_s: float,
             profile: bool = False) -> Measured:
    """Run a case in its processes and return what it measured, or why it did not; what it says goes to its log."""
    result, log = folder / "case.json", folder / f"{case.name.replace(' ', '-').replace('/', '-')}.log"
    result.unlink(missing_ok=True)
    order = json.dumps({"case": dataclasses.asdict(case), "settings": to_dict(settings), "sampled": sampled,
                        "device": device, "profile": profile})
    try:
        code = run_module(log, MODULE, "--case", order, "--json", result, processes=case.processes,
                          timeout_s=timeout_s)
    except subprocess.TimeoutExpired:
        return Measured(case=case, status=SKIPPED, message=f"not done within {timeout_s:.0f} s")
    if code == 0 and result.exists():
        return Measured.of(json.loads(result.read_text()))
    said = log.read_text(errors="replace")
    if "OutOfMemoryError" in said or "out of memory" in said:
        return Measured(case=case, status=OUT_OF_MEMORY)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]  # of a process, by `run_command`
    return Measured(case=case, status=ERROR, message=errors[0][:200] if errors else f"exit code {code}; see {log.name}")


def _work(order: str, path: Path) -> int:
    """Be one process of a case."""
    content = json.loads(order)
    device = choose_device(content["device"])
    with join_world(device) as world:
        found = measure(ScalingCase(**content["case"]), from_dict(Settings, content["settings"]), content["sampled"],
                        device, world, content["profile"])
        if world.is_main:
            path.write_text(json.dumps(dataclasses.asdict(found)))
    return 0


def main(arguments: list[str]) -> int:
    """Run the command line."""
    options = _parse(arguments)
    if options.case is not None:
        return _work(options.case, options.json)
    device = choose_device(options.device)
    on_gpu = device.type == "cuda"
    available = torch.cuda.device_count() if on_gpu else max(GPUS)
    gpus = [count for count in (options.gpus or (GPUS if on_gpu else (1, 2))) if count <= available]
    require(bool(gpus), "--gpus", options.gpus, f"there are {available} GPUs here")
    work = options.work.split(",")
    require(set(work) <= {"train", "sample"}, "--work", options.work, "use train, sample or both")
    settings = Settings(compile=on_gpu, precision=Precision.BF16 if on_gpu else Precision.FP32, rounds=1,
                        sampling_steps=options.sampling_steps or (50 if on_gpu else 4), visit_seconds=options.visit)
    sampled = (options.sampled or SAMPLED[device.type]) // max(gpus)
    runs = options.runs.split(",") if options.runs else RUNS[device.type]
    cases = list_cases(runs, gpus, device.type, work)
    for case in cases:
        configure(case, settings)  # finds what cannot be run before anything runs
    cards = max(1, torch.cuda.device_count())
    record = _open_record(options.out, device, to_dict(settings) | {"sampled": sampled, "cards": cards})
    deadline = time.monotonic() + options.time_budget
    for number, case in enumerate(cases, 1):
        left = deadline - time.monotonic()
        if record.has(case) or left <= 0:
            continue
        print(f"{number} of {len(cases)}: {case.name} ...", flush=True)
        record.results = [result for result in record.results if result.case != case]
        record.results.append(run_case(case, settings, sampled, device.type, options.out,
                                       min(options.case_timeout, left), options.profile))
        write_bench(options.out, record)
        print(f"  {record.describe(record.results[-1])}", flush=True)
    if missing := sum(not record.has(case) for case in cases):
        print(f"{missing} of {len(cases)} cases are not measured; the same command goes on")
    if record.results:
        for path in write_table(options.out):
            print(path)
    return 0


def _open_record(folder: Path, device: torch.device, settings: dict[str, Any]) -> ScalingRecord:
    """Return the record of these settings, commit and hardware: the one in the folder, or a new one."""
    found = environment(device)
    same = json.dumps([found["commit"], found["hardware"], found["versions"], settings], sort_keys=True)
    name = f"scaling-{hashlib.sha256(same.encode()).hexdigest()[:8]}"
    if (folder / f"{name}.json").exists():
        return read_scaling(folder / f"{name}.json")
    record = ScalingRecord(id=name, environment=found, settings=settings, peak_flops=peak_of(found["hardware"]))
    write_bench(folder, record)  # finds a folder that cannot be written before anything runs
    return record


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=lambda text: [int(part) for part in text.split(",")], metavar="N,N",
                        help="numbers of GPUs (default: 1,2,4,8, as many as there are; processes on a CPU: 1,2)")
    parser.add_argument("--runs", metavar="SIZE/SYSTEM,...", help=f"default: {','.join(RUNS['cuda'])}")
    parser.add_argument("--work", default="train,sample", help="train, sample or both (default: both)")
    parser.add_argument("--visit", type=float, default=5.0, metavar="SECONDS", help="of timed steps (default: 5)")
    parser.add_argument("--sampled", type=int, metavar="N", help="images that the most GPUs sample (default: 50000)")
    parser.add_argument("--sampling-steps", type=int, metavar="N", help="Euler steps (default: 50)")
    parser.add_argument("--time-budget", type=float, default=math.inf, metavar="SECONDS",
                        help="begin nothing new after this long, and end what runs")
    parser.add_argument("--case-timeout", type=float, default=600.0, metavar="SECONDS", help="of one case")
    parser.add_argument("--profile", action="store_true", help="write the kernels of a training step to a case's log")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=LOCAL, help=f"folder of records (default: {LOCAL})")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
