"""The command that trains one run: what it says before it starts."""

import re

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
