"""Draw images by several processes of this machine, a GPU each: the same images as by one.

`sample_together` starts this module under torchrun; each process takes every so many-th batch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from diffmoe.cli import choose_device, run_command
from diffmoe.config import RunConfig, load_config
from diffmoe.evaluation.sampling import Samples, cut_into_batches, joined, sample_batches, sample_images
from diffmoe.launch import run_together
from diffmoe.models.dit import DiT
from diffmoe.training.checkpoint import load_weights, save_weights
from diffmoe.training.distributed import join_world
from diffmoe.training.run import CONFIG_FILE, load_network, write_config

BATCHES, WEIGHTS = "batches.json", "weights.safetensors"


def sample_together(model: DiT, config: RunConfig, seeds: Sequence[int], processes: int, folder: Path) -> Samples:
    """Draw images as `sample_images` does, by `processes`; with one, in this process.

    Args:
        folder: on whose disk there is room for all images, as long as they are drawn.

    Raises:
        ConfigError, Interrupted: as `run_together` does.
    """
    batches = cut_into_batches(config, seeds)
    processes = min(processes, len(batches))
    if processes == 1:
        return sample_images(model, config, seeds)
    with TemporaryDirectory(prefix="samples-", dir=folder) as name:
        folder = Path(name)
        write_config(folder, config)
        save_weights(folder / WEIGHTS, model.state_dict(), {})
        (folder / BATCHES).write_text(json.dumps(list(map(list, batches))))
        run_together("diffmoe.evaluation.together", folder, processes=processes)
        return joined([_read(_part(folder, index)) for index in range(len(batches))])


def _part(folder: Path, index: int) -> Path:
    return folder / f"batch-{index}.safetensors"


def _write(path: Path, samples: Samples) -> None:
    tensors = {field.name: getattr(samples, field.name) for field in fields(Samples)}
    save_weights(path, {name: tensor for name, tensor in tensors.items() if tensor is not None}, {})


def _read(path: Path) -> Samples:
    tensors: dict[str, Tensor] = load_weights(path)[0]
    return Samples(**{field.name: tensors.get(field.name) for field in fields(Samples)})


def main(arguments: list[str]) -> int:
    """Be one of the processes: draw its batches of the folder."""
    folder = Path(arguments[0])
    config = load_config([folder / CONFIG_FILE])
    device = choose_device(config.runtime.device)
    batches = json.loads((folder / BATCHES).read_text())
    with join_world(device) as world:
        model = load_network(folder / WEIGHTS, config, device)
        mine = slice(world.rank, None, world.size)
        drawn = sample_batches(model, config, batches[mine])
        for index, samples in zip(range(len(batches))[mine], drawn, strict=True):
            _write(_part(folder, index), samples)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
