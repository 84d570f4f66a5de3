"""Builds cases until memory is full, times those that stand together in rounds, and goes on with the rest.

Each case is visited once right after it was built, so that a call that is cut short still has it; further rounds
visit the cases of a wave in turn (A B C A B C). What does not fit beside the others comes in the next wave, with
the machine's matrix product timed before each, which shows whether the machine stayed the same.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from diffmoe.bench.cases import LARGEST, Case, Settings, own_batch, run_config
from diffmoe.bench.parts import WHOLE, WHOLE_CALL, time_call_parts, time_parts
from diffmoe.bench.profile import profile_subject
from diffmoe.bench.record import ERROR, OK, OUT_OF_MEMORY, SKIPPED, BenchRecord, Result
from diffmoe.bench.subjects import WARM_UP, Forward, Sampling, Subject, Training
from diffmoe.bench.timing import (
    MemoryMeter,
    available_memory,
    describe_error,
    device_is_usable,
    free_memory,
    is_out_of_memory,
    measure_matmul,
    time_visit,
)
from diffmoe.config import ConfigError, RunConfig
from diffmoe.models.counting import STATE_BYTES, count_parameters

BYTES_A_PARAMETER = {"train": STATE_BYTES, "sample": 6, "forward": 6}
"""At inference the float32 weight and its bf16 copy."""
MOST_OF_MEMORY = 0.92
"""Share of the free memory that a search expects to use."""
RECOMPILE_LIMIT = 10_000

MakeSubject = Callable[[Case, RunConfig], Subject]


@dataclass
class Options:
    """What is done beside timing."""

    parts: str | None = None
    """Take our steps and calls apart: all parts, or `whole`, the network's forward (and backward) alone."""
    profile: Callable[[str], None] | None = None
    """Given the text of a profile of each case."""
    say: Callable[[str], None] = print
    save: Callable[[], None] = lambda: None
    """Called whenever the record has grown."""
    deadline: float = float("inf")
    """Value of `time.monotonic()` after which nothing new is begun."""


class Runner:
    """Times groups of cases into a record.

    Args:
        make: builds the subject of a case.
    """

    def __init__(self, record: BenchRecord, settings: Settings, device: torch.device, make: MakeSubject,
                 options: Options) -> None:
        self.record, self.settings, self.device, self.make, self.options = record, settings, device, make, options
        self.wave = 0
        self.fits: dict[Case, int] = {}
        separate_compilation()

    def run(self, groups: Iterable[list[Case]]) -> None:
        """Time all groups; what fails or is too late is recorded as such."""
        for group in groups:
            pending = [self._largest(case) if case.batch == LARGEST else case for case in group]
            pending = [case for case in pending if case is not None]
            while pending:
                pending = self._run_wave(pending)

    def _run_wave(self, cases: list[Case]) -> list[Case]:
        """Time the first cases that fit together; return the others."""
        standing: list[tuple[Result, Subject]] = []
        left = list(cases)
        self.wave += 1
        self.record.probes.append(measure_matmul(self.device))
        while left:
            case = left[0]
            if self._is_late() or not device_is_usable(self.device):
                late = self._is_late()
                self._add(Result(case=case, status=SKIPPED, message="the time was over" if late else
                                 "the device stopped computing after an earlier error: start again without that case"))
                left.pop(0)
                continue
            if standing and self._expected_bytes(case, standing) > available_memory(self.device):
                break
            result, subject = self._build(case)
            if result.status == OUT_OF_MEMORY and standing:
                break  # alone, in the next wave, it may fit
            if result.status == OUT_OF_MEMORY and case.batch > self.fits.get(
                    dataclasses.replace(case, batch=LARGEST), case.batch):
                left[0] = dataclasses.replace(case, batch=case.batch // 2)
                continue
            left.pop(0)
            self._add(result)
            if subject is not None:
                standing.append((result, subject))
                self._visit(result, subject)
        for _ in range(self.settings.rounds - 1):
            for result, subject in standing:
                if not self._is_late():
                    self._visit(result, subject)
        self._look_closer(standing)
        standing.clear()
        subject = None
        torch._dynamo.reset()
        free_memory(self.device)
        return left

    def _build(self, case: Case) -> tuple[Result, Subject | None]:
        """Build a case and warm it up."""
        result = Result(case=case, status=OK, wave=self.wave)
        meter = MemoryMeter(self.device)
        subject = None
        try:
            config = run_config(case, self.settings)
            result.num_params = count_parameters(config.model).total
            started = time.perf_counter()
            subject = self.make(case, config)
            self._wait()
            result.build_s = time.perf_counter() - started
            meter.restart()
            started = time.perf_counter()
            with subject.scope():
                for _ in range(WARM_UP[case.work]):
                    subject.call()
            self._wait()
            result.warm_up_s = time.perf_counter() - started
            for name, value in subject.facts().items():
                setattr(result, name, value)
        except Exception as error:  # whatever is wrong with one case, the others shall be timed
            self._fail(result, error)
            subject = None
        result.peak_bytes, result.reserved_bytes = meter.peak()
        if subject is None:
            free_memory(self.device)
        return result, subject

    def _visit(self, result: Result, subject: Subject) -> None:
        if result.status != OK:
            return
        try:
            with subject.scope():
                samples = time_visit(subject.call, self.settings.visit_seconds, self.device)
        except Exception as error:
            self._fail(result, error)
        else:
            result.samples_ms.append([float(f"{sample:.5g}") for sample in samples])
            first = len(result.samples_ms) == 1
            if first:
                self.options.say(describe(self.record, result))
        self.options.save()

    def _look_closer(self, standing: list[tuple[Result, Subject]]) -> None:
        """Profile, and take ours apart: last, since that leaves a trainer of no use."""
        for result, subject in standing:
            if result.status != OK or self._is_late():
                continue
            if self.options.profile is not None:
                try:
                    with subject.scope():
                        text = profile_subject(result.case, subject, self.device)
                    self.options.profile(text)
                except RuntimeError as error:
                    self.options.say(f"{result.case.name}: no profile: {describe_error(error)}")
            if not self.options.parts:
                continue
            try:
                result.parts = self._take_apart(result, subject)
            except Exception as error:  # what was timed stays, and the others are taken apart
                self.options.say(f"{result.case.name}: not taken apart: {describe_error(error)}")
            self.options.save()

    def _take_apart(self, result: Result, subject: Subject) -> list[dict[str, Any]]:
        whole = self.options.parts == "whole"
        if isinstance(subject, Training):
            return time_parts(subject.trainer, only=WHOLE if whole else None)
        if isinstance(subject, Sampling | Forward):
            return time_call_parts(subject.model, subject.config, result.case.batch, subject.calls,
                                   only=WHOLE_CALL if whole else None)
        return []

    def _largest(self, case: Case) -> Case | None:
        """Return a case at the largest batch that its memory makes likely, the workload's own doubled or halved.

        If that does not fit after all, its wave halves it down to what was seen to fit. None: nothing fits.
        """
        batch = own_batch(case.workload, case.size, case.work)
        while True:
            if self._is_late():
                self._add(Result(case=case, status=SKIPPED, message="the time was over"))
                return None
            result = self._build(dataclasses.replace(case, batch=batch))[0]
            torch._dynamo.reset()
            free_memory(self.device)
            self.options.say(f"search for the largest batch: {result.case.name}: {result.status}, "
                             f"{result.reserved_bytes / 2**30:.1f} GiB")
            if result.status == OK:
                self.fits[dataclasses.replace(case, batch=LARGEST)] = batch
                return dataclasses.replace(case, batch=self._doubled(case, result))
            if result.status == ERROR or batch == 1:
                self._add(result)
                return None
            batch //= 2

    def _doubled(self, case: Case, result: Result) -> int:
        """Return a result's batch, doubled as often as the device's memory should hold it."""
        total = available_memory(self.device)
        fixed = BYTES_A_PARAMETER[case.work] * result.num_params
        an_image = max(result.reserved_bytes - fixed, 1) / result.case.batch
        batch = result.case.batch
        while total < float("inf") and fixed + 2 * batch * an_image < MOST_OF_MEMORY * total:
            batch *= 2
        return batch

    def _expected_bytes(self, case: Case, standing: list[tuple[Result, Subject]]) -> float:
        """Return a guess of what a case will take: its weights, and what else the largest of the others took."""
        factor = BYTES_A_PARAMETER[case.work]
        rest = max(result.reserved_bytes - factor * result.num_params for result, _ in standing)
        config = run_config(case, self.settings)
        return factor * count_parameters(config.model).total + max(rest, 0)

    def _fail(self, result: Result, error: Exception) -> None:
        if isinstance(error, ConfigError):
            result.message = str(error)
        else:
            result.message = describe_error(error)
        result.status = OUT_OF_MEMORY if is_out_of_memory(error) else ERROR
        error.__traceback__ = error.__context__ = None  # they would keep the tensors of the call alive
        self.options.say(f"{result.case.name}: {result.status}: {result.message}")

    def _add(self, result: Result) -> None:
        self.record.results.append(result)
        self.options.save()

    def _is_late(self) -> bool:
        return time.monotonic() > self.options.deadline

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def separate_compilation() -> None:
    """Compile each case for its own shapes, as a process of its own would.

    Several networks share their code here: torch would take the second batch size as a sign of changing shapes and
    compile slower code for any, and after some networks compile no more.
    """
    settings: dict[str, Any] = {"automatic_dynamic_shapes": False, "recompile_limit": RECOMPILE_LIMIT,
                                "accumulated_recompile_limit": RECOMPILE_LIMIT}
    for name, value in settings.items():
        setattr(torch._dynamo.config, name, value)


def describe(record: BenchRecord, result: Result) -> str:
    """Return a result as a line of the terminal."""
    if result.status != OK or not result.samples_ms:
        return f"{result.case.name}: {result.status}: {result.message}"
    low, middle, high = result.quartiles_ms
    mfu = record.mfu(result)
    parts = [f"{result.images_per_second:,.0f} images/s", f"{middle:.4g} ms [{low:.4g}, {high:.4g}]",
             f"{result.flops / 1e12:.3g} TFLOP/s" + (f", MFU {mfu:.1%}" if mfu is not None else ""),
             f"peak {result.peak_bytes / 2**30:.1f} GiB", f"build {result.build_s:.1f} s",
             f"warm-up {result.warm_up_s:.1f} s"]
    if result.capacity is not None:
        parts.append(f"C {result.capacity:.3f}")
    if result.relative_error is not None:
        parts.append(f"same output to {result.relative_error:.0e}")
    return f"{result.case.name}: " + ", ".join(parts)
