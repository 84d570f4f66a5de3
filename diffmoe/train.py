"""Train one system with one seed and draw samples.

    python -m diffmoe.train                                           DiffMoE on handwritten digits
    python -m diffmoe.train --config diffmoe/configs/digits.yaml --config baselines/configs/dense.yaml
    python -m diffmoe.train --seed 1 training.num_images=64000        any key of the configuration

Writes into the run's folder: config.yaml, losses.jsonl, ema.safetensors, samples.png (one row a class).
Interrupted, the same command goes on. Several GPUs: torchrun --nproc-per-node N -m diffmoe.train ...
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from diffmoe.cli import TrainingBar, choose_device, run_command
from diffmoe.config import RunConfig, digest, load_config, to_dict
from diffmoe.data import ImageData, load_data
from diffmoe.evaluation.grid import grid_seeds, save_class_grid
from diffmoe.evaluation.sampling import sample_images
from diffmoe.models.counting import count_parameters, flops_per_call, state_bytes
from diffmoe.records import peak_memory_bytes
from diffmoe.tracking.live import Tracker, add_track_option
from diffmoe.training.distributed import join_world
from diffmoe.training.run import train_run
from diffmoe.training.trainer import Trainer

CONFIGS = Path(__file__).parent / "configs"
DEFAULT_CONFIGS = [CONFIGS / "digits.yaml", CONFIGS / "diffmoe.yaml"]
TRIAL_STEPS = 3
"""Steps that --dry-run times."""
LONGEST_TRIAL_STEP_S = 5.0
"""Seconds of a step above which --dry-run only states a bound."""


def train(config: RunConfig, seed: int, name: str, folder: Path, track: str | None = None) -> None:
    """Train in `folder`, going on where an earlier call stopped, then draw a grid of samples.

    `track` names an MLflow store that is told meanwhile; see diffmoe/tracking/live.py.

    Raises:
        ConfigError: when something cannot be used.
        Interrupted: after a signal; the same command goes on.
    """
    device = choose_device(config.runtime.device)
    with join_world(device) as world:
        data = load_data(config.data, config.model)
        with (Tracker(track if world.is_main else None, config.data.name, [config]) as tracker,
              tracker.follow(folder, config, seed, data.digest, name),
              TrainingBar(f"{name} seed {seed}", config.training.num_steps, enabled=world.is_main) as bar):
            run = train_run(config, seed, data, folder, device, world=world, progress=bar.update)
        if not world.is_main:
            return
    started = time.perf_counter()
    samples = sample_images(run.load_average(config, device), config, grid_seeds(config.model.num_classes))
    save_class_grid(folder / "samples.png", samples.images, samples.labels)
    capacity = "" if samples.capacity is None else f", capacity {samples.capacity.mean().item():.3f}"
    print(f"{name} seed {seed}: trained {run.description['seconds']:.0f} s, sampled {len(samples.images)} images in "
          f"{time.perf_counter() - started:.0f} s{capacity}; see {folder}/samples.png")


def describe(config: RunConfig) -> str:
    """Return the resolved configuration with parameters, FLOPs, and the time and memory measured on this machine."""
    count, flops = count_parameters(config.model), flops_per_call(config.model)
    step_flops = 3 * flops * config.training.batch_size
    steps, device = config.training.num_steps, choose_device(config.runtime.device)
    state = state_bytes(config, count.total)
    bound = step_flops / matrix_product_rate(device)
    if bound < LONGEST_TRIAL_STEP_S:
        seconds, peak = try_steps(config, device)
        cost = [f"# time: {hours(steps * seconds)} here, at {seconds:.3g} s for each of {TRIAL_STEPS} steps just made"
                f"{' (not compiled)' if config.runtime.compiles(device.type) else ''}",
                f"# memory: {peak / 2**20:,.0f} MiB at the peak of those steps, {state / 2**20:,.1f} MiB of it for "
                "weights, gradients, AdamW and average"]
    else:
        cost = [f"# time: more than {hours(steps * bound)} here, at the speed of one large matrix product",
                f"# memory: {state / 2**20:,.0f} MiB for weights, gradients, AdamW and average, and activations on top"]
    return "\n".join([
        yaml.safe_dump(to_dict(config), sort_keys=False).rstrip(),
        f"# digest: {digest(config, scope='training')} (training), {digest(config)} (with sampling)",
        f"# parameters: {count.total:,} in all, {count.activated_strict(1.0):,.0f} activated at C = 1",
        f"# {steps:,} steps of {config.training.batch_size} images, {step_flops / 1e9:,.1f} GFLOPs each (backward: "
        "twice forward)", *cost])


def try_steps(config: RunConfig, device: torch.device) -> tuple[float, int]:
    """Make a few steps, not compiled, on random images; return the seconds of one and the peak memory in bytes.

    On a CPU the memory is that of the whole process.
    """
    model = config.model
    images = torch.randint(256, (config.training.batch_size, model.in_channels, model.input_size, model.input_size))
    labels = torch.arange(len(images)) % model.num_classes
    data = ImageData("random", images.to(torch.uint8), labels, model.num_classes)
    trainer = Trainer(replace(config, runtime=replace(config.runtime, compile=False)), 0, data, device)

    def seconds(count: int) -> float:
        started = time.perf_counter()
        losses = [trainer.train_step() for _ in range(count)][-1]
        losses["mse"].item()  # waits for the device
        return time.perf_counter() - started

    seconds(1)
    found = seconds(TRIAL_STEPS) / TRIAL_STEPS
    return found, peak_memory_bytes(device)


def matrix_product_rate(device: torch.device) -> float:
    """Return the FLOP/s of a large float32 product on `device`: more than a training step reaches."""
    matrix = torch.randn(2048, 2048, device=device)
    (matrix @ matrix).sum().item()
    started = time.perf_counter()
    (matrix @ matrix).sum().item()
    return 2 * 2048**3 / (time.perf_counter() - started)


def hours(seconds: float) -> str:
    """Format a duration."""
    return f"{seconds / 3600:,.1f} h" if seconds >= 5400 else f"{seconds / 60:,.1f} min"


def main(arguments: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmoe.train", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", type=Path, metavar="FILE",
                        help="YAML file; repeat it to lay one over another (default: DiffMoE on digits)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the run's folder (default: under results/<data>/local)")
    add_track_option(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)  # keys and options in any order
    paths = options.config or DEFAULT_CONFIGS
    config = load_config(paths, options.overrides)
    if options.dry_run:
        print(describe(config))
        return 0
    name = paths[-1].stem
    run = f"{name}-{digest(config, scope='training')}-seed{options.seed}"
    train(config, options.seed, name, options.out or Path("results") / config.data.name / "local" / run,
          options.track)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
