"""Measure trained weights as the table does: draw samples, compare them with the training images.

    python -m diffmoe.evaluate --weights results/digits/checkpoints/diffmoe.safetensors
    python -m diffmoe.evaluate --run RUN --json result.json --save-images samples
    python -m diffmoe.evaluate --run RUN evaluation.num_samples=5000 sampling.num_steps=50

Prints distance, KID, precision and recall, the share of samples that show the requested class, and what a sample costs:
capacity, activated parameters, GFLOPs. Options of sampling and evaluation can be changed, what was trained cannot.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from diffmoe.cells import (
    activation,
    check_evaluation,
    measure_samples,
    reference_digest,
    reference_images,
    sampling_floors,
)
from diffmoe.cli import choose_device, require_places, run_command
from diffmoe.config import ConfigError, RunConfig, digest, shareable, to_dict
from diffmoe.data import ImageData, load_data
from diffmoe.evaluation.extractors import distance_name
from diffmoe.evaluation.grid import save_each
from diffmoe.evaluation.together import sample_together
from diffmoe.models.counting import flops_per_call
from diffmoe.records import environment
from diffmoe.sample import Trained, load_trained


def evaluate(trained: Trained, data: ImageData | None, cache: Path, images: Path | None = None,
             processes: int = 1) -> dict[str, Any]:
    """Draw and measure samples; return plain data of the names that a record has.

    Args:
        trained: the weights, with the options of sampling and evaluation.
        data: the images that they were trained on; None where the configuration names a reference file.
        cache: folder for the features of `data`.
        images: folder for a PNG file of each sample, named by its seed.
        processes: that draw the samples.

    Raises:
        ConfigError: for what cannot be measured or written.
    """
    config, device = trained.config, choose_device(trained.config.runtime.device)
    seeds = range(config.evaluation.num_samples)
    started = time.perf_counter()
    samples = sample_together(trained.model(device), config, seeds, processes, cache)
    sampled = time.perf_counter()
    metrics = measure_samples(samples, config, data, cache, device)
    measured = time.perf_counter()
    if images is not None:
        try:
            save_each(images, samples.images, seeds)
        except OSError as error:
            raise ConfigError(f"{images}: cannot be written ({error.strerror})") from None
    return {
        "config": shareable(config), "config_digest": digest(config),
        "training_digest": digest(config, scope="training"),
        "seed": trained.description["seed"], "steps": trained.description["step"],
        "data": {"name": config.data.name, "digest": trained.description["data_digest"]}
                | ({} if data is None else {"num_images": len(data)}),
        "sampling": {"num_samples": len(seeds), "seconds": sampled - started, "processes": processes},
        "evaluation": {"extractor": config.evaluation.extractor, "seconds": measured - sampled,
                       "reference": reference_digest(config.evaluation, data),
                       "distance_name": distance_name(config.evaluation.extractor),
                       "floor": sampling_floors(config.evaluation, data, cache, device)},
        "metrics": metrics, "activation": activation(config, samples), "environment": environment(device)}


def summary(result: dict[str, Any]) -> str:
    """Return a result for a reader, a quantity a line."""
    metrics, used, sampling = result["metrics"], result["activation"], result["sampling"]
    second = result["config"]["evaluation"]["second_extractor"]
    distances = {result["evaluation"]["distance_name"]: metrics["distance"]}
    distances |= {distance_name(second): metrics[distance_name(second)]} if second else {}
    floors = {name: f", {floor:.4g} of as many training images"
              for name, floor in result["evaluation"]["floor"].items()}
    lines = {name: f"{distance:.4g} ({sampling['num_samples']} samples{floors.get(name, '')})"
             for name, distance in distances.items()}
    lines |= {"KID x1000": f"{1000 * metrics['kid']:.4g} ± {1000 * metrics['kid_std']:.2g} over subsets",
             "precision": f"{metrics['precision']:.4f}", "recall": f"{metrics['recall']:.4f}"}
    optional = {"distance_se": "sampling error", "sfid": "sFID", "class_accuracy": "class accuracy",
                "inception_score": "Inception score", "nn_ratio": "nearest neighbours", "copied": "copied"}
    lines |= {name: f"{metrics[key]:.4f}" for key, name in optional.items() if key in metrics}
    lines |= {"capacity C": f"{used['capacity']:.4f}",
              "activated parameters": f"{used['activated_params']:,.0f} by the paper's count, "
                                      f"{used['activated_params_strict']:,.0f} strictly, of {used['total_params']:,}",
              "GFLOPs a call": f"{used['gflops']:.4g}",
              "seconds": f"{sampling['seconds']:.1f} sampling, {result['evaluation']['seconds']:.1f} measuring"}
    return "\n".join(f"{name:<22}{text}" for name, text in lines.items())


def describe(config: RunConfig, data: ImageData | None) -> str:
    """Return the resolved configuration and what would be done with it."""
    sampling, evaluation = config.sampling, config.evaluation
    gflops = flops_per_call(config.model) / 1e9
    return "\n".join([
        yaml.safe_dump(to_dict(config), sort_keys=False).rstrip(),
        f"# {evaluation.num_samples:,} samples in {sampling.num_steps} {sampling.sampler} steps, {gflops:.3g} GFLOPs a "
        f"call and image at C = 1",
        f"# {distance_name(evaluation.extractor)} to {len(reference_images(evaluation, data)):,} images of "
        f"{'the reference file' if data is None else data.name} ({reference_digest(evaluation, data)})"])


def main(arguments: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmoe.evaluate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="FOLDER", help="folder of a finished training run")
    source.add_argument("--weights", type=Path, metavar="FILE", help="its ema.safetensors, or published weights")
    parser.add_argument("--config", action="append", type=Path, default=[], metavar="FILE",
                        help="YAML file to lay over the configuration of the weights; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result, with its configuration")
    parser.add_argument("--save-images", type=Path, metavar="FOLDER", help="write each sample as <seed>.png")
    parser.add_argument("--cache", type=Path, metavar="FOLDER",
                        help="features of the real images (default: results/<data>/local/cache)")
    parser.add_argument("--processes", type=int, default=1, metavar="N",
                        help="draw the samples by N processes, a GPU each (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print what would be done")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)  # keys and options in any order
    if options.run is not None and not (options.run / "ema.safetensors").is_file():
        raise ConfigError(f"--run {options.run}: no finished run here (no ema.safetensors); train it to its end first")
    weights, configs = options.weights, options.config
    if options.run is not None:  # its config.yaml knows where the data lies, which weights do not tell
        weights, configs = options.run / "ema.safetensors", [options.run / "config.yaml", *configs]
    trained = load_trained(weights, options.overrides, configs)
    config = trained.config
    require_places(options.processes, choose_device(config.runtime.device))
    data = None if config.evaluation.reference else load_data(config.data, config.model)
    if data is not None:
        _check_reference(trained, data)
    check_evaluation(config.evaluation, data)
    if options.dry_run:
        print(describe(config, data))
        return 0
    cache = options.cache or Path("results") / config.data.name / "local" / "cache"
    for option, folder in (("--cache", cache), ("--save-images", options.save_images),
                           ("--json", options.json and options.json.parent)):
        if folder is not None:
            _make_writable(option, folder)
    if options.json is not None and options.json.is_dir():
        raise ConfigError(f"--json {options.json}: a folder; name a file")
    result = evaluate(trained, data, cache, options.save_images, options.processes)
    print(summary(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _check_reference(trained: Trained, data: ImageData) -> None:
    if data.digest != trained.description["data_digest"]:
        raise ConfigError(f"data.path={trained.config.data.path}: these {len(data)} images ({data.digest}) are "
                          f"not those of the training ({trained.description['data_digest']}), which are the reference")


def _make_writable(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"{option} {folder}: cannot be written ({error.strerror}); choose another") from None


if __name__ == "__main__":
    sys.exit(run_command(main))
