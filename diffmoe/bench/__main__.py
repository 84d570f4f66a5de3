"""Measure speed and memory, or write the report of what was measured.

    python -m diffmoe.bench --workload cifar10 --sizes S --work train,sample --out FOLDER
    python -m diffmoe.bench --workload latent --sizes S,B,L-E16 --batch largest --reference CHECKOUT --out FOLDER
    python -m diffmoe.bench --report FOLDER [--check]

One call is one record, bench-*.json, written again after each case. Sizes, works and systems run in the order given.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from diffmoe.bench.cases import LARGEST, WORK, WORKLOADS, Case, Settings, list_groups
from diffmoe.bench.record import BenchRecord, peak_of, record_id, write_bench
from diffmoe.bench.reference import DIFFERENCES, PRECISIONS, Reference, ReferenceSubject, group_of_one
from diffmoe.bench.runner import Options, Runner, describe
from diffmoe.bench.startup import measure_startup
from diffmoe.bench.subjects import OURS, Shared, Subject
from diffmoe.bench.timing import device_is_usable, free_memory, measure_copy, measure_matmul
from diffmoe.cli import choose_device, run_command
from diffmoe.config import ConfigError, Precision, RunConfig
from diffmoe.records import environment

DEFAULTS = {
    "cuda": {"sizes": "S", "batch": "", "precision": "bf16", "sampling_steps": 50, "rounds": 3, "visit": 1.0,
             "reference_precisions": "tf32,bf16"},
    "cpu": {"sizes": "nano", "batch": "16", "precision": "fp32", "sampling_steps": 4, "rounds": 2, "visit": 0.5,
            "reference_precisions": "tf32"},
}
LOCAL = Path("results/bench/local")


def main(arguments: list[str]) -> int:
    """Run the command line."""
    options = _parse(arguments)
    if options.report is not None:
        return _report(options.report, check=options.check)
    device = choose_device(options.device)
    loads = ("balanced", "skewed") if options.expert_load else ("balanced",)
    settings = _settings(options, device)
    batches = [LARGEST if text == "largest" else _whole(text, "--batch") for text in _split(options.batch)]
    reference = None if options.reference is None else Reference(options.reference)
    references = [(system, f"reference-{precision}") for precision in _split(options.reference_precisions)
                  for system in _split(options.reference_systems)] if reference else []
    _check_names(references, _split(options.work))
    groups = list_groups(options.workload, _split(options.sizes), _split(options.systems),
                         [work for work in _split(options.work) if work != "startup"], batches, loads, references,
                         settings)
    record = _new_record(options, settings, device, largest=LARGEST in batches, reference=reference)
    profiles = options.out / record.id.replace("bench-", "profile-", 1)

    def add_profile(text: str) -> None:
        with profiles.with_suffix(".txt").open("a") as file:
            file.write(text)

    def save() -> None:
        write_bench(options.out, record)

    shared = Shared(device, options.expert_load)

    def make(case: Case, config: RunConfig) -> Subject:
        if case.implementation == "ours":
            return OURS[case.work](case, config, shared)
        return ReferenceSubject(case, config, shared, reference)

    deadline = time.monotonic() + options.time_budget
    save()
    _say(f"{record.id}: {record.environment['hardware']}")
    record.ceilings = {"matmul_flops": measure_matmul(device), "copy_bytes": measure_copy(device)}
    free_memory(device)
    _say(f"ceilings: {record.ceilings['matmul_flops'] / 1e12:.4g} TFLOP/s, "
         f"{record.ceilings['copy_bytes'] / 1e12:.4g} TB/s")
    if "startup" in _split(options.work):
        _time_startup(record, options, settings, device, deadline, save)
    runner = Runner(record, settings, device, make, Options(
        parts=options.parts, profile=add_profile if options.profile else None, say=_say, save=save, deadline=deadline))
    with group_of_one(device) if reference else contextlib.nullcontext():
        runner.run(groups)
    save()
    print("\n".join(describe(record, result) for result in record.results))
    _say(f"wrote {record.id}.json; `python -m diffmoe.bench --report FOLDER` makes table and figures")
    return 0 if device_is_usable(device) else 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m diffmoe.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="cifar10", help=f"one of {', '.join(WORKLOADS)} (default: cifar10)")
    parser.add_argument("--sizes", help="S,B,L-E16,L-E8, ... (default: S; nano on a CPU)")
    parser.add_argument("--systems", default="dense,diffmoe,token_choice,expert_choice", help="or YAML files")
    parser.add_argument("--work", "--what", default="train,sample,forward",
                        help="of train,sample,forward,startup (start-up of a training in fresh processes)")
    parser.add_argument("--batch", help="images: numbers, or largest (default: the workload's own; 16 on a CPU)")
    parser.add_argument("--reference", type=Path, help="checkout of the authors' repository to time beside ours")
    parser.add_argument("--reference-systems", default="diffmoe", help="(default: diffmoe)")
    parser.add_argument("--reference-precisions", help="tf32 (as shipped), bf16 (under autocast)")
    parser.add_argument("--expert-load", type=Path, help="record of a trained mixture whose load a second run imitates")
    parser.add_argument("--parts", nargs="?", const="all", choices=["all", "whole"],
                        help="take our steps and calls apart (whole: time the network's forward, and backward, alone)")
    parser.add_argument("--profile", action="store_true", help="write the top kernels of each case to a text file")
    parser.add_argument("--eager", action="store_true", help="without torch.compile (always so on a CPU)")
    parser.add_argument("--compile", action="store_true", help="torch.compile on a CPU, too")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="of ours (default: bf16; fp32 on a CPU)")
    parser.add_argument("--sampling-steps", type=int, help="Euler steps (default: 50; 4 on a CPU)")
    parser.add_argument("--sampling-batches", type=int, default=Case.sampling_batches,
                        help="batches that a call samples (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="visits of each case (default: 3; 2 on a CPU)")
    parser.add_argument("--visit", type=float, help="seconds of a visit (default: 1; 0.5 on a CPU)")
    parser.add_argument("--peak-tflops", type=float, help="what MFU is relative to (default: 989 on H100 and H200)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--time-budget", type=float, default=math.inf, help="seconds after which nothing new is begun")
    parser.add_argument("--out", type=Path, default=LOCAL, help=f"folder of records (default: {LOCAL})")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="measure nothing; write table.md and figures")
    parser.add_argument("--check", action="store_true", help="with --report: exit 1 when a file does not follow")
    return parser.parse_args(arguments)


def _settings(options: argparse.Namespace, device: torch.device) -> Settings:
    for name, value in DEFAULTS[device.type].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("sampling_steps", "sampling_batches", "rounds", "visit", "time_budget"):
        if not getattr(options, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: use a number above 0")
    compiles = options.compile or (device.type == "cuda" and not options.eager)
    return Settings(compile=compiles, precision=Precision(options.precision), sampling_steps=options.sampling_steps,
                    sampling_batches=options.sampling_batches, rounds=options.rounds, visit_seconds=options.visit)


def _new_record(options: argparse.Namespace, settings: Settings, device: torch.device, *, largest: bool,
                reference: Reference | None) -> BenchRecord:
    found = environment(device)
    found["versions"]["triton"] = _version("triton")
    stored = dataclasses.asdict(settings) | {
        "largest": largest, "time_budget": options.time_budget if math.isfinite(options.time_budget) else None}
    started = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    peak = options.peak_tflops * 1e12 if options.peak_tflops else peak_of(found["hardware"])
    return BenchRecord(id=record_id(options.workload, found, stored, started), started=started, environment=found,
                       settings=stored, peak_flops=peak,
                       reference={"digest": reference.digest, "differences": list(DIFFERENCES)} if reference else {})


def _time_startup(record: BenchRecord, options: argparse.Namespace, settings: Settings, device: torch.device,
                  deadline: float, save: Callable[[], None]) -> None:
    for size in _split(options.sizes):
        for system in _split(options.systems):
            groups = list_groups(options.workload, [size], [system], ["train"], [], [], [], settings)
            try:
                lines = measure_startup(groups[0][0], settings, device, min(deadline - time.monotonic(), 1e6))
            except RuntimeError as error:
                _say(f"{size} {system}: {error}")
                continue
            record.startup += lines
            save()
            for line in lines:
                parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in line["seconds"].items())
                _say(f"start-up {line['size']} {line['system']}, {line['cache']}: {line['total']:.1f} s ({parts})")


def _report(folder: Path, *, check: bool) -> int:
    from diffmoe.bench.report import check_bench_report, write_bench_report  # seconds of plotting libraries

    if not check:
        print(*write_bench_report(folder), sep="\n")
        return 0
    problems = check_bench_report(folder)
    print("\n".join(problems) or f"{folder}: table and figures follow from the records",
          file=sys.stderr if problems else sys.stdout)
    return 1 if problems else 0


def _check_names(references: Sequence[tuple[str, str]], work: Sequence[str]) -> None:
    for _, implementation in references:
        if implementation not in PRECISIONS:
            raise ConfigError(f"--reference-precisions: use tf32, bf16, not {implementation.partition('-')[2]}")
    for kind in work:
        if kind not in (*WORK, "startup"):
            raise ConfigError(f"--work {kind}: use {', '.join(WORK)}, startup")


def _split(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _whole(text: str, option: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{option} {text}: use whole numbers above 0, or largest")
    return int(text)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
