"""Draw images from trained weights into a PNG grid, and report the capacity they used.

    python -m diffmoe.sample                                      digits, from the published DiffMoE weights
    python -m diffmoe.sample --weights RUN/ema.safetensors --seeds 0-99 sampling.guidance_scale=1.5
    python -m diffmoe.sample model.moe.router.global_threshold=0.3  any inference option of the configuration
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffmoe.cli import choose_device, run_command
from diffmoe.config import ConfigError, RunConfig, digest, from_dict, load_config, require
from diffmoe.evaluation.calibration import calibration_batches
from diffmoe.evaluation.grid import save_class_grid
from diffmoe.evaluation.sampling import sample_images
from diffmoe.models.dit import DiT, build_model
from diffmoe.training.checkpoint import load_weights
from diffmoe.training.ema import average_file

DEFAULT_WEIGHTS = Path("results/digits/checkpoints/diffmoe.safetensors")


@dataclass(frozen=True)
class Trained:
    """Weights, with what they were trained with and what to do with them."""

    config: RunConfig
    description: dict[str, Any]
    """config, config_digest, seed, data_digest, step, seconds of the training."""
    weights: dict[str, torch.Tensor]

    def model(self, device: torch.device) -> DiT:
        """Return the network in eval mode, in float32.

        Raises:
            ConfigError: when the weights are of another network.
        """
        model = build_model(self.config.model).to(device).eval()
        try:
            model.load_state_dict({name: value.float() for name, value in self.weights.items()})
        except RuntimeError:
            raise ConfigError("the weights do not fit the configuration that is saved with them") from None
        return model.set_backend(self.config.runtime.backend)


def load_trained(path: Path, overrides: Sequence[str], configs: Sequence[Path] = ()) -> Trained:
    """Read weights with the configuration that they were trained with; lay files and then overrides over it.

    Raises:
        ConfigError: when the file cannot be used, or something would change what was trained.
    """
    weights, description = load_weights(path)
    try:
        trained = from_dict(RunConfig, description.get("config"))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    config = load_config(configs, overrides, base=description["config"])
    if digest(config, scope="training") != digest(trained, scope="training"):
        changes = " ".join([*map(str, configs), *overrides])
        raise ConfigError(f"{changes}: this changes what was trained; only options of inference can change (sampling, "
                          "evaluation, runtime, and a router's inference, selection and global_threshold)")
    require(calibration_batches(config) == 0, "model.moe.router.calibration_batches", calibration_batches(config),
            "thresholds are calibrated on training images, which this command does not read; use 0")
    chosen = average_file(config.evaluation.ema_half_life_images, config.evaluation.budget_images)
    if chosen != average_file():
        weights, description = load_weights(path.with_name(chosen))
    return Trained(config, description, weights)


def main(arguments: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmoe.sample", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=DEFAULT_WEIGHTS, metavar="FILE")
    parser.add_argument("--seeds", default="0-99", metavar="FIRST-LAST", help="one image a seed (default: 0-99)")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="default: samples.png")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)  # keys and options in any order
    first, _, last = options.seeds.partition("-")
    if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
        raise ConfigError(f"--seeds {options.seeds}: write FIRST-LAST, for example 0-99")
    trained = load_trained(options.weights, options.overrides)
    model = trained.model(choose_device(trained.config.runtime.device))
    samples = sample_images(model, trained.config, range(int(first), int(last) + 1))
    try:
        save_class_grid(options.out, samples.images, samples.labels)
    except OSError as error:
        raise ConfigError(f"{options.out}: cannot be written ({error.strerror}); choose another with --out") from None
    capacity = "" if samples.capacity is None else f", capacity {samples.capacity.mean().item():.3f}"
    print(f"{len(samples.images)} images{capacity}: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
