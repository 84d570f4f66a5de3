"""The rehearsal of the paper's scale: its materials, its steps, its page; slowly, all of it at a tiny size."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import one_line
from test_training import make_trainer

from diffmoe.config import ConfigError
from diffmoe.data.folder import find_classes
from diffmoe.evaluation.adm import measure_adm, read_reference
from diffmoe.records import write_record
from diffmoe.rehearsal import __main__ as rehearsal
from diffmoe.rehearsal import losses
from diffmoe.rehearsal.materials import CLASSES, FACTOR, make_images, make_inception, make_reference, make_vae
from diffmoe.rehearsal.report import SHOWN, Check, Rehearsal, check_report, read_rehearsals, write_report
from diffmoe.train import CONFIGS

CPU = torch.device("cpu")
RECORD = Rehearsal(
    id="rehearsal-1", started="2026-01-01 00:00 UTC", processes=2, metrics={"distance": 1.0},
    environment={"commit": "c" * 40, "dirty": False, "hardware": "2 CPU cores", "versions": {"torch": "2"}},
    settings={"size": 48, "experts": 4, "bf16_steps": 30, "run_steps": 1500},
    checks=[Check("losses agree", 1e-5, "<= 0.0001", ok=True), Check("all left", 70.0, "<= 60", ok=False),
            Check("pools of a process", 0.25, SHOWN, ok=True)],
    runs=[{"name": "ddp", "processes": 2, "batch": 16, "images_per_second": 1234.0, "peak_memory_bytes": 3 * 2**30}])


def test_the_materials_are_what_the_commands_take(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    make_images(tmp_path / "images", 20, 64)
    assert [len(files) for files in find_classes(tmp_path / "images").values()] == [2] * CLASSES
    make_vae(tmp_path / "vae", 8)
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False)
    assert vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean.shape == (1, 4, 64 // FACTOR, 64 // FACTOR)


@pytest.mark.slow
def test_images_have_no_distance_to_their_own_reference(tmp_path):
    make_images(tmp_path / "images", 20, 64)
    make_reference(tmp_path / "images", tmp_path / "reference.npz")
    make_inception(tmp_path / "inception.pth")
    reference = read_reference(tmp_path / "reference.npz")
    assert reference.images.shape == (20, 3, 64, 64)
    found = measure_adm(reference.images, reference, device=CPU, weights_path=tmp_path / "inception.pth",
                        kid_subset_size=10)
    assert found["distance"] == pytest.approx(0, abs=1e-3) and np.isfinite(list(found.values())).all()


def test_the_losses_are_the_trainers(tmp_path):
    out = tmp_path / "losses.json"
    losses.main(["--config", str(CONFIGS / "digits.yaml"), "--config", str(CONFIGS / "diffmoe.yaml"), "--steps", "12",
                 "--json", str(out), "training.batch_size=16", "training.num_images=1600", "runtime.device=cpu"])
    found, trainer = json.loads(out.read_text()), make_trainer()
    assert found["losses"] == [trainer.train_step()["mse"].item() for _ in range(12)]
    assert found["processes"] == 1 and found["images_per_second"] > 0 and found["peak_memory_bytes"] > 2**20


def test_a_command_that_fails_is_one_line_with_its_log_and_what_is_done_is_not_done_again(tmp_path):
    steps = rehearsal.Steps(tmp_path, CPU, 2)
    with pytest.raises(ConfigError) as caught:
        steps._command("latents", "diffmoe.data.latents", "--check", tmp_path / "none")
    assert str(tmp_path / "latents.log") in one_line(caught.value)
    assert "none" in (tmp_path / "latents.log").read_text()
    (tmp_path / "latents.done").touch()
    steps._command("latents", "diffmoe.data.latents", "--check", tmp_path / "none")


def test_one_process_is_refused_with_one_line():
    with pytest.raises(ConfigError, match="--processes=1"):
        rehearsal.main(["--device", "cpu", "--processes", "1"])


def test_the_page_follows_from_the_records_and_says_what_does_not_hold(tmp_path):
    with pytest.raises(ConfigError, match="no record"):
        write_report(tmp_path)
    write_record(tmp_path / "records", RECORD)
    assert read_rehearsals(tmp_path) == [RECORD]
    assert check_report(tmp_path) != []
    (table,) = write_report(tmp_path)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.read_text().splitlines()]
    assert ["losses agree", "1e-05", "<= 0.0001", "holds"] in lines
    assert ["all left", "70", "<= 60", "**does not hold**"] in lines
    assert ["pools of a process", "0.25", "-", ""] in lines
    assert ["ddp", "2", "16", "1,234", "3.00"] in lines
    assert check_report(tmp_path) == []
    write_record(tmp_path / "records", dataclasses.replace(RECORD, id="rehearsal-2"))
    assert check_report(tmp_path) == [f"{table}: does not follow from the records"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_of_it_holds_in_two_processes_of_a_cpu(tmp_path):
    pytest.importorskip("diffusers")
    assert rehearsal.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    (record,) = read_rehearsals(tmp_path)
    assert len(record.checks) == 12 and len(record.runs) == 10
    assert str(tmp_path) not in json.dumps(dataclasses.asdict(record))
