"""Nothing lost: real processes are killed, files damaged, disks filled, numbers broken."""

import os
import random
import resource
import signal
import time

import pytest
import torch
from processes import CPU, assert_same_outcome, finish, images, said, start, tiny_config, wait_for

from diffmoe.data import load_data
from diffmoe.training.checkpoint import Checkpoints, load_weights
from diffmoe.training.log import read_lines

KILLS = int(os.environ.get("KILLS", "10"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 200 steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert finish(start(folder, images(200))) == 0
    return folder


def test_a_run_killed_at_random_moments_equals_one_that_was_not(tmp_path):
    steps = 40 * KILLS
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.monotonic()
    assert finish(start(whole, images(steps)), 600) == 0
    print(f"whole: {time.monotonic() - started:.1f} s")
    moments = random.Random(0)
    kills = 0
    while kills < KILLS:
        process = start(killed, images(steps))
        process.join(moments.uniform(0.05, 0.6))
        if process.exitcode == 0:
            break
        process.kill()
        process.join()
        kills += 1
        print(kills, [p.name for p in killed.glob("*")])
    print(kills)
    assert finish(start(killed, images(steps)), 600) == 0
    assert_same_outcome(whole, killed)
    print(said(killed))
