"""Image folders, ROOT/CLASS/IMAGE: classes are the sorted folder names, images are sorted by name within a class."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffmoe.config import ConfigError, DataConfig, ModelConfig, require
from diffmoe.data.conversion import ImageShape, convert_image, require_image_channels
from diffmoe.data.images import ImageData

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""What a file may hold, whatever its suffix says."""
CHUNK = 64
"""Files decoded as one piece of work: handing over a single small image costs as much as decoding it."""


def load_folder(config: DataConfig, model: ModelConfig) -> ImageData:
    """Decode every image below `data.path` into memory; other files and hidden ones are passed over.

    Raises:
        ConfigError: for a folder that cannot be used, a broken image or one of another size, naming it.
    """
    require(config.path is not None, "data.path", config.path,
            f"data.name={config.name} needs the folder that holds one folder of images a class")
    require_image_channels(model)
    root = Path(config.path).expanduser()
    classes = find_classes(root)
    require(len(classes) == model.num_classes, "model.num_classes", model.num_classes,
            f"{root} holds {len(classes)} class folders")
    paths = [path for files in classes.values() for path in files]
    labels = [label for label, files in enumerate(classes.values()) for _ in files]
    images = decode_images(paths, model, resize=config.resize)
    return ImageData(config.name, torch.from_numpy(images), torch.tensor(labels), len(classes))


def find_classes(root: Path) -> dict[str, list[Path]]:
    """Return the image files of each class folder of `root`, both sorted by name.

    Raises:
        ConfigError: when there is no class folder, one holds no image, or something cannot be read.
    """
    classes = {folder.name: _images(folder) for folder in _folders(root)}
    if not classes:
        remedy = (f"did you mean the folder above, {root.absolute().parent}?" if _images(root) else
                  "it needs one folder of images a class")
        raise ConfigError(f"data.path={root}: holds no class folders; {remedy}")
    empty = [name for name, files in classes.items() if not files]
    splits = [name for name in empty if any(_images(folder) for folder in _folders(root / name))]
    if splits:
        split = "train" if "train" in splits else splits[0]
        raise ConfigError(f"data.path={root}: its folder {split} holds class folders, not images; "
                          f"did you mean {root / split}?")
    if empty:
        raise ConfigError(f"data.path={root}: class folder {empty[0]} holds no images ({', '.join(SUFFIXES)}); "
                          "add some or remove it")
    return classes


def decode_images(paths: list[Path], model: ImageShape, *, resize: bool) -> np.ndarray:
    """Decode the files in order, uint8 (N, C, H, W); threads share the work, which changes nothing in the result.

    Raises:
        ConfigError: for the first file in order that cannot be used, naming it.
    """
    shape = (len(paths), model.in_channels, model.input_size, model.input_size)
    try:
        images = np.empty(shape, np.uint8)
    except MemoryError:
        raise ConfigError(f"{len(paths)} images of {'x'.join(map(str, shape[1:]))} do not fit into memory, where this "
                          "data set is held; use fewer or smaller ones") from None

    def decode_chunk(start: int) -> None:
        for index in range(start, min(start + CHUNK, len(paths))):
            images[index] = decode_image(paths[index], model, resize=resize)

    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for _ in pool.map(decode_chunk, range(0, len(paths), CHUNK)):  # the first error in order ends it
            pass
    return images


def decode_image(path: Path, model: ImageShape, *, resize: bool) -> np.ndarray:
    """Decode one file, uint8 (C, H, W).

    Raises:
        ConfigError: when it cannot be used, naming it.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return convert_image(image, model, resize=resize, source=path)
    except ConfigError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ConfigError(f"{path}: has more than {Image.MAX_IMAGE_PIXELS} pixels; shrink or remove it") from None
    except Image.UnidentifiedImageError:
        raise ConfigError(f"{path}: broken image (none of {', '.join(FORMATS)}); replace or remove it") from None
    except Exception as error:  # decoders raise anything on broken files
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: broken image ({reason}); replace or remove it") from None


def _folders(folder: Path) -> list[Path]:
    return _entries(folder, lambda entry: entry.is_dir())


def _images(folder: Path) -> list[Path]:
    return _entries(folder, lambda entry: entry.name.lower().endswith(SUFFIXES))


def _entries(folder: Path, keep: Callable[[os.DirEntry[str]], bool]) -> list[Path]:
    """Return what `keep` accepts of `folder`, sorted by name, without hidden entries."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder)
                      if not entry.name.startswith(".") and keep(entry))
    except FileNotFoundError:
        raise ConfigError(f"data.path: there is no folder {folder}") from None
    except OSError as error:
        raise ConfigError(f"data.path: {folder} cannot be read as a folder ({error.strerror})") from None
