"""Files of weights: safetensors, written aside and renamed, with the run's description inside."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
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
    """Read what `save_weights` wrote; nothing in the file is ever executed.

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
