"""Checkpoint files: whole or not at all, one flipped bit is noticed, written beside training, few are kept."""

import json
import logging
import os
import threading

import pytest
import torch
from conftest import one_line
from safetensors.torch import save_file

from diffmoe.config import ConfigError
from diffmoe.training import checkpoint
from diffmoe.training.checkpoint import Checkpoints, load_weights, locked, save_weights, write_whole
from diffmoe.training.log import JsonLines, read_lines

STATE = {"a": torch.arange(12.0).view(3, 4), "b": torch.tensor(3), "c": torch.tensor([True]),
         "d": torch.ones(2, dtype=torch.bfloat16), "e": torch.zeros(0, 3)}
NO_PROCESS = 2**22 + 1
"""No process has this id: Linux ends at 2**22."""


def save(folder, *steps, state=STATE):
    kept = Checkpoints(folder)
    for step in steps:
        kept.save(state.items(), {"step": step})
    return kept


@pytest.mark.fault("one flipped bit, or a missing end, of a checkpoint")
def test_every_bit_and_every_missing_byte_is_noticed(tmp_path, rng, record_property):
    path = tmp_path / "weights.safetensors"
    save_weights(path, STATE, {"step": 3, "loss": 0.1})
    content = path.read_bytes()
    assert load_weights(path)[1] == {"step": 3, "loss": 0.1}
    positions = rng.sample(range(8 * len(content)), 1500)
    damaged = [content[:bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1:]
               for bit in positions] + [content[:size] for size in range(0, len(content), 7)]
    for other in damaged:
        path.write_bytes(other)
        with pytest.raises(ConfigError) as caught:
            load_weights(path)
        assert str(path) in one_line(caught.value)
    record_property("survived", len(damaged))


def test_weights_of_an_earlier_release_without_a_digest_are_read(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(STATE, path, {"description": json.dumps({"step": 3})})
    assert load_weights(path)[1] == {"step": 3}


def test_what_is_written_while_training_goes_on_is_the_state_of_its_step(tmp_path, monkeypatch):
    may_write = threading.Event()
    save_whole = checkpoint.save_weights
    monkeypatch.setattr(checkpoint, "save_weights", lambda *content: may_write.wait(60) and save_whole(*content))
    kept, weights = Checkpoints(tmp_path, asynchronous=True), torch.ones(3)
    kept.save([("a", weights)], {"step": 1})
    weights += 1  # training goes on
    kept.save([("a", weights)], {"step": 2})  # the first is not done: this one is left out
    may_write.set()
    kept.writer.join()
    state, description, _ = kept.newest()
    assert description == {"step": 1} and torch.equal(state["a"], torch.ones(3))
    kept.save([("a", weights)], {"step": 3})
    kept.writer.join()
    assert torch.equal(kept.newest()[0]["a"], weights)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_that_cannot_be_written_is_a_warning_and_at_the_end_one_line(tmp_path, monkeypatch, caplog,
                                                                                 asynchronous):
    kept = save(tmp_path, 1)
    kept.asynchronous = asynchronous

    def full(*content, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    kept.save(STATE.items(), {"step": 2})
    with pytest.raises(ConfigError, match=r"No space left.*goes on from checkpoint-000000001"):
        kept.save_now(STATE, {"step": 2})
    assert "No space left on device" in caplog.text and "going on with the one before" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000001.safetensors"]


def test_what_dead_processes_left_half_written_is_removed_and_what_others_write_is_let_be(tmp_path):
    path = tmp_path / "weights[1].safetensors"
    dead, alive, other = (tmp_path / f"{name}.partial" for name in (
        f"{path.name}.{NO_PROCESS}", f"{path.name}.{os.getppid()}", f"another.{NO_PROCESS}"))
    for left in (dead, alive, other):
        left.touch()
    save_weights(path, STATE, {})
    assert sorted(tmp_path.iterdir()) == sorted([path, alive, other])
    with locked(tmp_path):  # all of this folder is ours then
        assert sorted(tmp_path.iterdir()) == sorted([path, tmp_path / "lock"])


def test_a_file_that_may_not_be_replaced_stays_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "record.json"
    write_whole(path, lambda aside: aside.write_text("first"), replace=False)
    with pytest.raises(FileExistsError):
        write_whole(path, lambda aside: aside.write_text("second"), replace=False)
    assert [(left.name, left.read_text()) for left in tmp_path.iterdir()] == [("record.json", "first")]


def test_the_newest_two_are_kept_and_the_oldest_of_the_last_hour(tmp_path):
    kept = Checkpoints(tmp_path)
    now = 1_700_000_000.0
    names = []
    for step in range(200):  # one a minute
        path = tmp_path / f"checkpoint-{step:09d}.safetensors"
        path.touch()
        os.utime(path, (now + 60 * step, now + 60 * step))
        kept._prune()
        names.append([int(path.stem[-9:]) for path in kept.paths()])
    assert all(step - 61 <= steps[0] and steps[-2:] == [step - 1, step] and len(steps) == 3
               for step, steps in enumerate(names) if step >= 2)
    assert names[59] == [0, 58, 59]  # something to go back to


def test_a_damaged_checkpoint_is_put_aside_for_the_one_before(tmp_path, caplog):
    kept = save(tmp_path, 1, 2)
    kept.paths()[-1].write_bytes(b"")
    assert kept.newest()[1] == {"step": 1}
    assert "checkpoint-000000002.safetensors" in caplog.text
    assert [path.name[-12:] for path in sorted(tmp_path.iterdir())] == [".safetensors", "nsors.damaged"[-12:]]
    assert Checkpoints(tmp_path / "none").newest() is None


def test_a_log_is_cut_back_to_its_step_and_passes_over_what_is_no_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\nnull\n{"step": "3"}\n\xff\xfe\n{"step": 9}\n{"step": 2, "x"')
    with JsonLines(path, 5) as lines:
        lines.write({"step": 6})
    assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 6}]


def test_log_lines_that_cannot_be_written_wait_and_are_told_once(tmp_path, caplog):
    class FullDisk:
        room = 20

        def __init__(self, file):
            self.file, self.fileno = file, file.fileno

        def write(self, content):  # as RLIMIT_FSIZE and a full disk do: what fits, then an error
            if not (count := min(len(content), self.room)):
                raise OSError(28, "No space left on device")
            self.room -= count
            return self.file.write(content[:count])

    path = tmp_path / "log.jsonl"
    lines = JsonLines(path, 0)
    file, lines.file = lines.file, FullDisk(lines.file)
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            lines.write({"step": step})
    assert read_lines(path) == [{"step": 0}]  # 12 bytes; half a line was taken back
    assert len(caplog.records) == 1
    lines.file = file
    lines.write({"step": 4})
    assert [line["step"] for line in read_lines(path)] == [0, 1, 2, 3, 4]
