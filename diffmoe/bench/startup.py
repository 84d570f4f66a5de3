"""The start of a training in a fresh process, by part: import, device, data, build, first step, capture.

    python -m diffmoe.bench.startup    reads a job as JSON from stdin and prints the seconds (the bench calls it)

It runs twice with one compile cache of its own: empty (cold), then as the first run left it (warm).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from diffmoe.bench.cases import Case, Settings, random_images, run_config
from diffmoe.config import Precision
from diffmoe.training.graph import EAGER_CALLS
from diffmoe.training.trainer import Trainer

IMPORTED = time.time()
STARTED = "DIFFMOE_BENCH_STARTED"
CACHES = ("cold", "warm")


def measure_startup(case: Case, settings: Settings, device: torch.device, seconds_left: float) -> list[dict[str, Any]]:
    """Return one line a cache state: `cache`, seconds by part and `total` until training runs at full speed.

    Raises:
        RuntimeError: when the process fails or takes longer than `seconds_left`.
    """
    job = json.dumps({"case": dataclasses.asdict(case), "settings": dataclasses.asdict(settings),
                      "device": str(device)})
    deadline = time.monotonic() + seconds_left
    lines = []
    with tempfile.TemporaryDirectory() as caches:
        paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
                                    "TRITON_CACHE_DIR": f"{caches}/triton", "PYTHONPATH": paths}
        for cache in CACHES:
            environment[STARTED] = str(time.time())
            try:
                done = subprocess.run([sys.executable, "-m", "diffmoe.bench.startup"], input=job, env=environment,
                                      capture_output=True, text=True, timeout=max(deadline - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"start-up with a {cache} cache: the time was over") from None
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise RuntimeError(f"start-up with a {cache} cache: {last}")
            seconds = json.loads(done.stdout.strip().splitlines()[-1])
            lines.append({"workload": case.workload, "size": case.size, "system": case.system, "batch": case.batch,
                          "cache": cache, "seconds": seconds, "total": sum(seconds.values())})
    return lines


def run_job(job: dict[str, Any]) -> dict[str, float]:
    """Start a training and return the seconds of each part."""
    seconds = {"import": IMPORTED - float(os.environ.get(STARTED, IMPORTED))}
    device = torch.device(job["device"])
    settings = Settings(**job["settings"] | {"precision": Precision(job["settings"]["precision"])})
    last = IMPORTED

    def lap(name: str) -> None:
        nonlocal last
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.time()
        seconds[name], last = now - last, now

    torch.zeros(1, device=device)
    lap("device")
    config = run_config(Case(**job["case"]), settings)
    images = random_images(config, device)
    lap("data")
    trainer = Trainer(config, 0, images, device)
    lap("build")
    trainer.train_step()
    lap("first step")
    for _ in range(EAGER_CALLS):
        trainer.train_step()
    lap("capture")
    return seconds


if __name__ == "__main__":
    print(json.dumps(run_job(json.load(sys.stdin))))
