"""Where training images come from, by `data.name`."""

from __future__ import annotations

import fcntl
import http.client
import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from diffmoe.config import ConfigError, DataConfig, ModelConfig, require
from diffmoe.data.conversion import convert_arrays, require_image_channels
from diffmoe.data.folder import load_folder
from diffmoe.data.idx import load_idx
from diffmoe.data.images import ImageData, TrainingData
from diffmoe.data.latent_data import load_latents


def load_data(config: DataConfig, model: ModelConfig) -> TrainingData:
    """Load the images or latents that `config` names and check that `model` fits them.

    Raises:
        ConfigError: for an unknown name, images that cannot be read, or a model of another image size, channels or
            classes.
    """
    if config.name not in SOURCES:
        raise ConfigError(f"data.name={config.name}: use one of {', '.join(SOURCES)}")
    data = SOURCES[config.name](config, model)
    channels, height, width = data.shape
    want = (model.in_channels, model.input_size, model.input_size, model.num_classes)
    if (channels, height, width, data.num_classes) != want:
        raise ConfigError(f"data.name={config.name}: {channels}x{height}x{width} images of {data.num_classes} classes; "
                          f"the model takes {want[0]}x{want[1]}x{want[2]} and {want[3]}: set model.in_channels, "
                          "model.input_size and model.num_classes")
    return data


def load_digits(config: DataConfig, model: ModelConfig) -> ImageData:
    """Return scikit-learn's 1797 handwritten digits, 1x8x8, which come with the package."""
    from sklearn.datasets import load_digits as sklearn_digits

    require(config.path is None, "data.path", config.path,
            "data.name=digits reads no files; use data.name=folder, idx or cifar10")
    require(not config.resize, "data.resize", config.resize, "data.name=digits has one size, 8")
    digits = sklearn_digits()
    images = torch.from_numpy(digits.images)[:, None] * (255 / 16)  # 17 grey levels, 0 to 16
    return ImageData(config.name, images.round().to(torch.uint8), torch.from_numpy(digits.target).long(), 10)


def load_cifar10(config: DataConfig, model: ModelConfig) -> ImageData:
    """Return CIFAR-10's training images: the folder `data.path`, or torchvision's download in `data.cache`.

    Raises:
        ConfigError: as `load_folder`, or when the download fails.
    """
    if config.path is not None:
        root = Path(config.path).expanduser()
        require(not (root / "cifar-10-batches-py").is_dir(), "data.path", root,
                f"this is torchvision's folder: write data.cache={root} instead")
        return load_folder(config, model)
    require_image_channels(model)
    images, labels = download_cifar10(Path(config.cache).expanduser() if config.cache else default_cache())
    pixels = convert_arrays(images, model, resize=config.resize, source="CIFAR-10")
    return ImageData(config.name, pixels, torch.from_numpy(labels), 10)


def download_cifar10(cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return CIFAR-10's images, uint8 (50000, 32, 32, 3), and labels, int64; downloads what `cache` lacks.

    Raises:
        ConfigError: when the download fails or `cache` cannot be written.
    """
    from torchvision.datasets import CIFAR10

    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without an answer
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / "cifar10.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process downloads, the others wait
            data = CIFAR10(str(cache), train=True, download=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise ConfigError(f"data.name=cifar10: the download into {cache} failed ({error}); try again, or give its "
                          "images, one folder a class, as data.path=FOLDER") from None
    finally:
        socket.setdefaulttimeout(patience)
    return data.data, np.asarray(data.targets, np.int64)


def default_cache() -> Path:
    """Return the user's cache folder of this package."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffmoe"


SOURCES: dict[str, Callable[[DataConfig, ModelConfig], TrainingData]] = {
    "digits": load_digits, "cifar10": load_cifar10, "idx": load_idx, "folder": load_folder,
    "latents": lambda config, model: load_latents(config)}
