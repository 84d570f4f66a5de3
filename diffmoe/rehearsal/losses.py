"""Train some steps, alone or under torchrun, and write every loss, the throughput and the memory: nothing is kept.

`sums_apart` is how far the sums of the weights that the processes compute with are apart in the end: 0 under DDP.

    torchrun --nproc-per-node 2 -m diffmoe.rehearsal.losses --steps 20 --json FILE --config FILE ... key=value
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from diffmoe.cli import choose_device, run_command
from diffmoe.config import load_config
from diffmoe.data import load_data
from diffmoe.records import peak_memory_bytes
from diffmoe.training.distributed import join_world
from diffmoe.training.parallel import local
from diffmoe.training.trainer import Trainer

CHUNK = 10
"""Steps between two looks at the clock, for which the device is waited for."""


def main(arguments: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmoe.rehearsal.losses", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", type=Path, required=True, metavar="FILE")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    device = choose_device(config.runtime.device)
    with join_world(device) as world:
        trainer = Trainer(config, 0, load_data(config.data, config.model), device, world)
        losses: list[float] = []
        seconds: list[float] = []
        while len(losses) < options.steps:
            started, count = time.perf_counter(), min(CHUNK, options.steps - len(losses))
            chunk = [world.mean([trainer.train_step()["mse"]])[0] for _ in range(count)]
            losses += torch.stack(chunk).tolist()
            seconds.append((time.perf_counter() - started) / count)
        held = sum(weight.double().sum().item() for weight in local(trainer.trained))
        peak, most, least = world.largest([float(peak_memory_bytes(device)), held, -held], device)
        if world.is_main:
            speed = config.training.batch_size / statistics.median(seconds)
            options.json.write_text(json.dumps({"losses": losses, "images_per_second": speed,
                                                "processes": world.size, "peak_memory_bytes": peak,
                                                "sums_apart": most + least}))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
