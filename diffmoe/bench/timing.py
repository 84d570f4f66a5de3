"""The clock, the ceilings of the machine, and its memory.

Device work runs behind the host: calls are timed by events that the device passes, and the host waits only before
the first call and after the last.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[], object]

MATMUL_SIDE = {"cuda": 8192, "cpu": 512}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
CEILING_CALLS = {"cuda": 20, "cpu": 5}
MOST_CALLS = 50
"""Calls of a visit."""


def time_calls(call: Call, count: int, device: torch.device) -> list[float]:
    """Return the milliseconds of `count` calls one after another, host gaps between them included."""
    if device.type != "cuda":
        return [_host_ms(call) for _ in range(count)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def time_visit(call: Call, seconds: float, device: torch.device) -> list[float]:
    """Time one visit: a call that only warms up and says how long a call takes, then as many as `seconds` hold."""
    first = time_calls(call, 1, device)[0] / 1e3
    count = 1 if first > seconds else min(MOST_CALLS, max(3, int(seconds / first)))
    return time_calls(call, count, device)


def _host_ms(call: Call) -> float:
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


def spread(samples: list[float]) -> tuple[float, float, float]:
    """Return the quartiles: a quarter, half (the median) and three quarters of the samples are below."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def measure_matmul(device: torch.device) -> float:
    """Return the FLOP/s of a large bf16 product (CPU: float32) of random numbers; zeros would run faster."""
    side, dtype = MATMUL_SIDE[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _median_seconds(lambda: torch.mm(a, b, out=out), device)


def measure_copy(device: torch.device) -> float:
    """Return the bytes/s, read plus written, of a copy that no cache holds."""
    source = torch.randint(0, 256, (COPY_BYTES[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _median_seconds(lambda: target.copy_(source), device)


def _median_seconds(call: Call, device: torch.device) -> float:
    count = CEILING_CALLS[device.type]
    time_calls(call, 3, device)
    return statistics.median(time_calls(call, count, device)) / 1e3


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out; libraries have names of their own for it."""
    signs = ("out of memory", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs))


def describe_error(error: BaseException) -> str:
    """Return one line of at most 300 characters."""
    return "out of memory" if is_out_of_memory(error) else " ".join(f"{type(error).__name__}: {error}".split())[:300]


def device_is_usable(device: torch.device) -> bool:
    """Say whether the device still computes; after some faults every call of the process fails."""
    try:
        return math.isfinite(torch.ones(1, device=device).sum().item())
    except RuntimeError:
        return False


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class MemoryMeter:
    """Measures the bytes allocated at the most since it was made, and those reserved, beyond what was before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.restart()
            self.before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    def restart(self) -> None:
        """Forget the peak so far: what only building took."""
        free_memory(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> tuple[int, int]:
        """Return (allocated, reserved) bytes; zeros on a CPU, which does not count."""
        if self.device.type != "cuda":
            return 0, 0
        allocated, reserved = self.before
        return torch.cuda.max_memory_allocated() - allocated, torch.cuda.max_memory_reserved() - reserved


def available_memory(device: torch.device) -> float:
    """Return the bytes that can still be allocated; infinite on a CPU."""
    if device.type != "cuda":
        return math.inf
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
