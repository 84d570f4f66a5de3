"""Files of weights and the run's folder: safetensors written aside, synced and renamed; one process at a time.

Nothing is pickled: a checkpoint is tensors and JSON, and reading one executes nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffmoe.config import ConfigError


def save_weights(path: Path, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write a state dict and a description (plain data) to `path`, whole or not at all."""
    aside = path.with_name(path.name + ".partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, aside,
              metadata={"description": json.dumps(description)})
    with aside.open("rb") as written:
        os.fsync(written.fileno())
    aside.replace(path)


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_weights` wrote.

    Raises:
        ConfigError: when the file is missing, damaged or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as weights:
            description = json.loads((weights.metadata() or {})["description"])
            names = weights.keys()
            return {name: weights.get_tensor(name) for name in names}, description
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: not a checkpoint of this project ({type(error).__name__}: {error})") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process; the lock of a process that died is gone with it.

    Raises:
        ConfigError: when another process holds it (named by its id), or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); choose another with --out") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ConfigError(f"{folder}: process {file.read().strip() or 'unknown'} is working in this folder; "
                              "wait for it or stop it") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
