"""Measuring weights: the same numbers as a record, everything checked before any work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import one_line
from PIL import Image
from test_cells import ROWS, SMALL

from diffmoe import evaluate as command
from diffmoe.cells import Cell, Store, load_rows, run_cell
from diffmoe.cli import require_places
from diffmoe.config import ConfigError
from diffmoe.data import load_data
from diffmoe.evaluation.sampling import sample_images
from diffmoe.sample import load_trained
from diffmoe.train import CONFIGS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return the folder of a training run and the record that a table has of it."""
    [row] = [row for row in load_rows(ROWS, CONFIGS / "digits.yaml", SMALL) if row.key == "diffmoe-static"]
    store, data = Store(tmp_path_factory.mktemp("local")), load_data(row.config.data, row.config.model)
    record = run_cell(Cell(row, 0), "digits", data, store, CPU)
    return store.run_folder(Cell(row, 0), data), record


def run(folder: Path, *arguments: str, cache: Path | None = None) -> int:
    return command.main(["--run", str(folder), "--cache", str(cache or folder.parents[1] / "cache"), *arguments])


def test_a_run_is_measured_as_its_record_was(measured: tuple[Path, Any], tmp_path: Path,
                                             capsys: pytest.CaptureFixture) -> None:
    folder, record = measured
    assert run(folder, "--json", str(tmp_path / "new" / "result.json"), "--save-images", str(tmp_path / "images")) == 0
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert result["metrics"] == pytest.approx(record.metrics, rel=1e-5)  # a GPU adds up in another order
    for name in ("activation", "data", "config", "config_digest", "training_digest", "seed"):
        assert result[name] == getattr(record, name), name
    assert str(tmp_path) not in json.dumps(result) and str(Path.home()) not in json.dumps(result["environment"])
    text = capsys.readouterr().out
    assert result["evaluation"]["floor"] == pytest.approx(record.evaluation["floor"], rel=1e-5)
    for wanted in ("FD-digits64", "of as many training images", "KID", "precision", "recall", "class accuracy",
                   "capacity", "strictly", "GFLOPs"):
        assert wanted in text
    assert "FID" not in text
    trained = load_trained(folder / "ema.safetensors", [])
    images = sample_images(trained.model(CPU), trained.config, range(40)).images
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [f"{seed:06d}.png" for seed in range(40)]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / "000007.png")), images[7, 0].numpy())


def test_options_of_inference_change_by_file_and_by_key(measured: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = measured
    result = tmp_path / "result.json"
    (tmp_path / "more.yaml").write_text("model: {moe: {router: {kind: expert_choice, inference: dynamic}}}\n"
                                        "sampling: {num_steps: 1}\n")
    assert run(folder, "--config", str(tmp_path / "more.yaml"), "--json", str(result), "evaluation.num_samples=20") == 0
    found = json.loads(result.read_text())
    assert found["sampling"]["num_samples"] == 20 and found["config"]["sampling"]["num_steps"] == 1
    assert found["config"]["model"]["moe"]["router"]["inference"] == "dynamic"
    assert len(found["activation"]["capacity_by_call"]) == 2 and found["activation"]["capacity"] != 1


def test_a_dry_run_writes_nothing(measured: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(measured[0], "--dry-run", "--json", str(tmp_path / "a" / "b.json"), cache=tmp_path / "cache") == 0
    assert "# 40 samples in 2 heun steps" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "message"), [
    (["training.learning_rate=1"], "changes what was trained"),
    (["--config", str(CONFIGS.parents[1] / "baselines/configs/dense.yaml")], "dense.yaml: this changes"),
    (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    (["evaluation.kid_subset_size=41"], "use at most num_samples=40"),
    (["evaluation.num_samples=9000", "evaluation.kid_subset_size=2000"], "only 1797 reference images"),
    (["evaluation.extractor=vgg16", "evaluation.extractor_weights=nowhere"], "nowhere: no such file"),
    (["evaluation.second_extractor=inception"], "extractor=inception: use one of"),
    (["evaluation.second_extractor=digits64"], "evaluation.second_extractor=digits64: the first is the same"),
    (["--json", "/dev/null/result.json"], "--json /dev/null: cannot be written"),
    (["--save-images", "/dev/null"], "--save-images /dev/null: cannot be written"),
    (["runtime.device=cuda:99"], "device cuda:99: not here"),
    (["sampling.sampler=ddim"], "sampling.sampler=ddim"),
])
def test_what_cannot_be_is_one_line_before_any_work(measured: tuple[Path, Any], arguments: list[str], message: str,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "sample_together", lambda *_: pytest.fail("it had begun"))
    with pytest.raises(ConfigError, match=message) as error:
        run(measured[0], *arguments)
    one_line(error.value)


@pytest.mark.parametrize("processes, device, remedy", [(0, "cpu", "use 1 or more"), (3, "cuda", "there are 2 GPUs"),
                                                       (2, "cuda:1", "use cuda")])
def test_several_processes_have_a_gpu_each(processes: int, device: str, remedy: str,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=remedy):
        require_places(processes, torch.device(device))
    require_places(2, torch.device("cuda")), require_places(8, CPU)


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished run here"):
        run(tmp_path)


def test_other_images_than_the_training_s_are_refused(measured: tuple[Path, Any],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def fewer(*arguments: Any) -> Any:
        data = load_data(*arguments)
        return type(data)(data.name, data.images[1:], data.labels[1:], data.num_classes)

    monkeypatch.setattr(command, "load_data", fewer)
    with pytest.raises(ConfigError, match="not those of the training"):
        run(measured[0])


def test_help_explains_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--run", "--weights", "--json", "--save-images", "--dry-run"))
    monkeypatch.setattr(sys, "argv", ["evaluate"])
    with pytest.raises(SystemExit) as end:
        command.run_command(command.main)
    assert end.value.code == 2
