"""Files of weights and the run's folder: written aside, synced and renamed; digested; one process at a time.

Nothing is pickled: a checkpoint is tensors and JSON, and reading one executes nothing.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffmoe.config import ConfigError

PARTIAL = ".partial"
"""What the name of a file ends in while it is written; a killed process leaves one, which means nothing."""
KEPT = 2
"""Newest checkpoints that are kept, and beside them one older."""
KEPT_FOR_S = 3600.0
"""The older one is the oldest that is not this much older than the newest: something to go back to."""
LETTING_GO_S = 1.0
"""A process whose run is finished lets go of the folder within this."""

log = logging.getLogger(__name__)
Description = dict[str, Any]


def write_whole(path: Path, write: Callable[[Path], object], *, replace: bool = True) -> None:
    """Let `write` make a file aside, sync it and rename it to `path`: the file is there whole or not at all.

    Several processes may do so at a time; what dead ones of this machine left aside is removed.

    Args:
        replace: a file that is at `path` already. Else it stays.

    Raises:
        FileExistsError: when it stays.
        OSError: when it cannot be written; what was at `path` is still there.
    """
    for left in path.parent.glob(f"{glob.escape(path.name)}.*{PARTIAL}"):
        if not _is_alive(left.name.split(".")[-2]):
            with suppress(OSError):
                left.unlink()
    aside = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        write(aside)
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        if replace:
            aside.replace(path)
        else:
            os.link(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too, survives a power cut
        finally:
            os.close(folder)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def save_weights(path: Path, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write a state dict and a description (plain data) to `path`, whole or not at all, with a digest of both.

    Raises:
        OSError: when it cannot be written; what was at `path` is still there.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    text = json.dumps([content_digest(tensors, description), description])
    write_whole(path, lambda aside: save_file(tensors, aside, metadata={"description": text}))


def load_weights(path: Path) -> tuple[dict[str, Tensor], Description]:
    """Read what `save_weights` wrote.

    Raises:
        ConfigError: when the file is missing, damaged (one bit is enough) or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as weights:
            written = json.loads((weights.metadata() or {})["description"])
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 (no mapping)
        # a release before this one wrote the description alone
        expected, description = (None, written) if isinstance(written, dict) else written
        whole = isinstance(description, dict) and expected in (None, content_digest(tensors, description))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{path}: not a checkpoint of this project ({type(error).__name__}: {error})") from None
    if not whole:
        raise ConfigError(f"{path}: damaged (its content is not what was written); copy it again or remove it")
    return tensors, description


def content_digest(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a state dict and its description, as `save_weights` writes it; one tensor at a time."""
    content = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        content.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        content.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        del tensor  # before the next one is made
    return content.hexdigest()


class Checkpoints:
    """The checkpoints of a run's folder, `checkpoint-<step>.safetensors`: the newest whole one counts.

    Args:
        folder: the run's.
        asynchronous: copy the state, a tensor at a time as it is given (from a GPU into pinned memory, in its stream's
            order, waiting for nothing), and write it in a thread while training goes on. Else it is written at once.
    """

    def __init__(self, folder: Path, *, asynchronous: bool = False) -> None:
        self.folder = folder
        self.asynchronous = asynchronous
        self.buffers: dict[str, Tensor] = {}
        self.writer: threading.Thread | None = None
        self.error: OSError | None = None

    def paths(self) -> list[Path]:
        """Return the files by step, the oldest first."""
        return sorted(self.folder.glob("checkpoint-*.safetensors"))

    @property
    def busy(self) -> bool:
        """Say whether a thread still writes the checkpoint before."""
        return self.writer is not None and self.writer.is_alive()

    def save(self, state: Iterable[tuple[str, Tensor]], description: Description) -> None:
        """Write the checkpoint of step `description["step"]`; failure is a warning, for the one before is still there.

        While this is `busy`, nothing is done; what it failed at is told by the next call.
        """
        if self.busy:
            return
        self._warn()
        if not self.asynchronous:
            self._write(dict(state), description, None)
            self._warn()
            return
        copied, done = self._copy(state)
        self.writer = threading.Thread(target=self._write, args=(copied, description, done), daemon=True)
        self.writer.start()

    def save_now(self, state: Mapping[str, Tensor], description: Description) -> None:
        """Write a checkpoint and wait until it is there.

        Raises:
            ConfigError: when it cannot be written.
        """
        if self.writer is not None:
            self.writer.join()
        self._warn()
        self._write(state, description, None)
        if self.error is not None:
            last = self.paths()[-1:]
            raise ConfigError(f"{self.folder}: the state cannot be saved ({reason(self.error)}); make room, and the "
                              f"same command goes on from {last[0].name if last else 'the start'}")

    def newest(self) -> tuple[dict[str, Tensor], Description, Path] | None:
        """Read the newest whole checkpoint, if there is one; damaged ones are named in a warning and put aside."""
        for path in reversed(self.paths()):
            try:
                return *load_weights(path), path
            except ConfigError as error:
                log.warning("%s; going on from the one before", error)
                with suppress(OSError):
                    path.replace(path.with_name(path.name + ".damaged"))
        return None

    def clear(self) -> None:
        """Remove the checkpoints."""
        if self.writer is not None:
            self.writer.join()
        for path in self.paths():
            with suppress(OSError):
                path.unlink()

    def _copy(self, state: Iterable[tuple[str, Tensor]]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """Return the state in host memory that is used again each time, and the event after which it is whole."""
        copied, on_gpu = {}, False
        for name, tensor in state:
            if name not in self.buffers:
                self.buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copied[name] = self.buffers[name].copy_(tensor.detach(), non_blocking=True)
            on_gpu |= tensor.is_cuda
        return copied, torch.cuda.current_stream().record_event() if on_gpu else None

    def _write(self, state: Mapping[str, Tensor], description: Description, done: torch.cuda.Event | None) -> None:
        self.error = None
        try:
            if done is not None:
                done.synchronize()
            save_weights(self.folder / f"checkpoint-{description['step']:09d}.safetensors", state, description)
            self._prune()
        except OSError as error:
            self.error = error

    def _warn(self) -> None:
        if self.error is not None:
            log.warning("%s: a checkpoint cannot be written (%s); going on with the one before", self.folder,
                        reason(self.error))

    def _prune(self) -> None:
        paths = self.paths()
        youngest = paths[-1].stat().st_mtime
        older = [path for path in paths[:-KEPT] if youngest - path.stat().st_mtime <= KEPT_FOR_S]
        for path in set(paths[:-KEPT]) - set(older[:1]):
            path.unlink()


def reason(error: OSError) -> str:
    """Return what an error of the operating system says, in one line."""
    return error.strerror or " ".join(str(error).split())


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process; what a process that died left is removed, and its lock is gone with it.

    Raises:
        ConfigError: when another process holds it (named by its id), or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); choose another with --out") from None
    with file:
        asked = time.monotonic()
        while not _taken(file):
            if time.monotonic() - asked > LETTING_GO_S:
                file.seek(0)
                raise ConfigError(f"{folder}: process {file.read().strip() or 'unknown'} is working in this folder; "
                                  "wait for it or stop it")
            time.sleep(LETTING_GO_S / 10)
        with suppress(OSError):  # on a full disk the lock holds without a name
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        for left in folder.glob("*" + PARTIAL):
            with suppress(OSError):
                left.unlink()
        yield
