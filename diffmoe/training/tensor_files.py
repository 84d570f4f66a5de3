"""Files of tensors read and written one tensor at a time: memory holds the file's pages and one tensor, no copy.

    LazyTensors         names, shapes and dtypes now; each tensor when it is looked up
    read_torch          a state dict in a file of torch.save, memory-mapped; only tensors and plain data are unpickled
    map_weights         our weights, memory-mapped
    write_safetensors   a safetensors file
    write_torch         a file that torch.load reads, its data filled in after the empty file is there
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffmoe.config import ConfigError

SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
                      torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
                      torch.uint8: "U8", torch.bool: "BOOL"}
ALIGNMENT = 8
"""Bytes that the data of a safetensors file is aligned to."""


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made when it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Lazy:
        """Return one that is there."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def nbytes(self) -> int:
        """Return its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class LazyTensors(Mapping[str, Tensor]):
    """A state dict whose tensors are made at each look-up.

    Args:
        lazy: the tensors by name.
    """

    def __init__(self, lazy: Mapping[str, Lazy]) -> None:
        self.lazy = dict(lazy)

    def __getitem__(self, name: str) -> Tensor:
        return self.lazy[name].make()

    def __iter__(self) -> Iterator[str]:
        return iter(self.lazy)

    def __len__(self) -> int:
        return len(self.lazy)

    def numel(self) -> int:
        """Return the numbers in all tensors."""
        return sum(math.prod(lazy.shape) for lazy in self.lazy.values())


def read_torch(path: Path, key: str) -> dict[str, Tensor]:
    """Map the state dict `key` of a file of torch.save, or the file's only one.

    Raises:
        ConfigError: for a file that is none, holds pickled code, or has no such state dict.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the authors' trainer saves its arguments
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{path}: holds more than tensors and plain data, which reading would execute; refused "
                          f"({str(error).split('.')[0][:120]})") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: not a file of torch.save ({str(error).splitlines()[0][:120]})") from None
    if isinstance(content, dict) and isinstance(content.get(key), dict):
        content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        there = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"{path}: holds no state dict {key} (it has {there}); choose with --weights")
    return content


def map_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Map our weights; return them with their description. Their digest is not checked.

    Raises:
        ConfigError: for a file that is not ours.
    """
    try:
        with safe_open(path, framework="pt") as weights:
            written = json.loads((weights.metadata() or {})["description"])
            return ({name: weights.get_tensor(name) for name in weights.keys()},  # noqa: SIM118 (no mapping)
                    written if isinstance(written, dict) else written[1])
    except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
        raise ConfigError(f"{path}: not a checkpoint of this project ({type(error).__name__}: {error})") from None


def write_safetensors(path: Path, tensors: LazyTensors, metadata: dict[str, str]) -> None:
    """Write a safetensors file, one tensor at a time."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, lazy in tensors.lazy.items():
        header[name] = {"dtype": SAFETENSORS_DTYPES[lazy.dtype], "shape": list(lazy.shape),
                        "data_offsets": [offset, offset + lazy.nbytes]}
        offset += lazy.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in tensors:  # no name for the tensor: it would live until the next one is there
            file.write(_bytes(tensors[name]))


def write_torch(path: Path, tensors: LazyTensors, key: str) -> None:
    """Write `{key: state dict}` as torch.save does, one tensor at a time."""
    empty = {name: torch.empty(lazy.shape, dtype=lazy.dtype) for name, lazy in tensors.lazy.items()}  # never touched
    with torch.serialization.skip_data():
        torch.save({key: empty}, path)
    del empty
    with zipfile.ZipFile(path) as archive:  # storages are numbered in the order in which they were saved
        entries = {entry.filename.rsplit("/", 1)[-1]: entry for entry in archive.infolist()
                   if "/data/" in entry.filename}
    with path.open("r+b") as file:
        for number, tensor in enumerate(tensors.values()):
            content = _bytes(tensor)
            entry = entries[str(number)]
            assert entry.file_size == content.nbytes, (entry, tensor.shape)
            file.seek(entry.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            file.seek(entry.header_offset + 30 + name_length + extra_length)
            file.write(content)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
