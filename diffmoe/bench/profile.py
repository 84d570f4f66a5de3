"""The kernels of a case, as a text."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from diffmoe.bench.cases import Case
from diffmoe.bench.subjects import Subject
from diffmoe.bench.timing import time_calls

CALLS = 3
ROWS = 40
NAME_WIDTH = 110


def profile_subject(case: Case, subject: Subject, device: torch.device) -> str:
    """Return the kernels with most time: microseconds and number a call, microseconds each, name.

    `busy` is the sum of all kernels of a call; what the call lasts beyond it, the device waits for the host.
    """
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        call_ms = sum(time_calls(subject.call, CALLS, device)) / CALLS
    events = profiled.key_averages()

    def own_us(event) -> float:
        return (event.self_device_time_total if cuda else event.self_cpu_time_total) / CALLS

    events = sorted((event for event in events if own_us(event) > 0), key=own_us, reverse=True)
    lines = [f"## {case.name}: {call_ms:.2f} ms a call under the profiler, "
             f"busy {sum(map(own_us, events)) / 1e3:.2f} ms, {len(events)} kernels"]
    lines += [f"{own_us(event):10.1f} us {event.count / CALLS:7.1f} x {own_us(event) * CALLS / event.count:9.1f} us  "
              f"{event.key[:NAME_WIDTH]}" for event in events[:ROWS]]
    return "\n".join(lines) + "\n\n"
