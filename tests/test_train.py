"""The command that trains one run: what it says before it starts."""

import re
import subprocess
import sys

import pytest

from diffmoe import train


def dry_run(capsys, *overrides):
    assert train.main(["--dry-run", *overrides]) == 0
    return capsys.readouterr().out


def test_a_dry_run_times_real_steps_and_trains_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = dry_run(capsys, "training.batch_size=8", "training.num_images=80")
    minutes, seconds = re.search(r"time: ([\d.]+) min here, at ([\d.e-]+) s for each of 3 steps", out).groups()
    assert float(minutes) == pytest.approx(10 * float(seconds) / 60, abs=0.06)
    assert "10 steps of 8 images" in out
    assert int(re.search(r"memory: ([\d,]+) MiB at the peak", out)[1].replace(",", "")) > 10
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_what_is_too_large_for_here_states_bounds(capsys, monkeypatch):
    monkeypatch.setattr(train, "matrix_product_rate", lambda device: 1e6)
    assert "time: more than" in dry_run(capsys)


@pytest.mark.parametrize(("ends", "code"), [(True, 141), (False, 1)])
def test_a_reader_that_has_enough_ends_a_command_quietly(ends, code):
    """As in `... --dry-run | head`; a pipe that breaks elsewhere is an error as any other."""
    script = ("import os, sys; from diffmoe.cli import run_command; sys.stdin.read()\n"
              f"def main(arguments):\n  print('a line', flush={ends})\n  raise BrokenPipeError\n"
              "sys.exit(run_command(main))")
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    if ends:
        process.stdout.close()
    process.stdin.close()
    said = process.stderr.read().decode()
    assert process.wait(60) == code and (said == "" if ends else "BrokenPipeError" in said)
