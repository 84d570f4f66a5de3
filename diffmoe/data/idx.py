"""Idx files, the format of MNIST and Fashion-MNIST, plain or gzipped.

A file is two zero bytes, the element type (8: unsigned byte), the number of dimensions, each dimension as a
big-endian 32-bit number, and the elements.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from diffmoe.config import ConfigError, DataConfig, ModelConfig, require
from diffmoe.data.conversion import convert_arrays, require_image_channels
from diffmoe.data.images import ImageData

IMAGES, LABELS = "train-images", "train-labels"
BLOCK = 1 << 20


def load_idx(config: DataConfig, model: ModelConfig) -> ImageData:
    """Read the training split from `data.path`: train-images-idx3-ubyte and train-labels-idx1-ubyte, or .gz of them.

    Raises:
        ConfigError: for a file that is missing, damaged or of another kind, or labels that do not fit the images.
    """
    require(config.path is not None, "data.path", config.path, "data.name=idx needs the folder of the idx files")
    require_image_channels(model)
    folder = Path(config.path).expanduser()
    image_file, label_file = _find(folder, IMAGES, 3), _find(folder, LABELS, 1)
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if len(images) != len(labels):
        raise ConfigError(f"{label_file}: {len(labels)} labels for the {len(images)} images of {image_file}; "
                          "take both from one data set")
    pixels = convert_arrays(images, model, resize=config.resize, source=image_file)
    return ImageData(config.name, pixels, torch.from_numpy(labels).long(), int(labels.max()) + 1)


def read_idx(path: Path, num_dims: int) -> np.ndarray:
    """Read an idx file of unsigned bytes with `num_dims` dimensions; none of them is 0.

    Raises:
        ConfigError: for any other content, naming the file.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
            header = stream.read(4 + 4 * num_dims)
            if header[:4] != bytes([0, 0, 8, num_dims]):
                raise ConfigError(f"{path}: starts with 0x{header[:4].hex()}, an idx file of {num_dims}-dimensional "
                                  f"bytes with 0x000008{num_dims:02x}")
            if len(header) < 4 + 4 * num_dims:
                raise ConfigError(f"{path}: cut off within its header; copy it again")
            shape = struct.unpack(f">{num_dims}I", header[4:])
            size = math.prod(shape)
            content = bytearray()  # grown by what is there: a broken header may name any size
            while len(content) <= size and (block := stream.read(BLOCK)):
                content += block
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); "
                          "copy it again") from None
    if len(content) != size or size == 0:
        found = f"holds {len(content)}" if len(content) <= size else "holds more"
        raise ConfigError(f"{path}: its header names {'x'.join(map(str, shape))} bytes, but it {found}; copy it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _find(folder: Path, stem: str, num_dims: int) -> Path:
    names = [f"{stem}{mark}idx{num_dims}-ubyte{suffix}" for mark in "-." for suffix in ("", ".gz")]
    try:
        present = set(os.listdir(folder))
    except OSError as error:
        raise ConfigError(f"data.path={folder}: cannot be read as a folder ({error.strerror}); "
                          "give the folder of the idx files") from None
    for name in names:
        if name in present:
            return folder / name
    raise ConfigError(f"data.path={folder}: holds no {names[0]}, plain or .gz; give the folder of the idx files")
