"""What tables cost: every row of the paper's tables is a valid run, hours follow from throughput, sharing is seen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from diffmoe import plan, reproduce
from diffmoe.cells import load_rows
from diffmoe.config import ConfigError, Parallel, ProcessKind, digest
from diffmoe.models.counting import count_parameters

BASELINES = Path(__file__).parents[1] / "baselines"
SCALE = reproduce.CONFIGS / "imagenet256.yaml"
FILES = sorted((BASELINES / "imagenet256").glob("*.yaml"))


def rows(name):
    return load_rows(BASELINES / "imagenet256" / f"{name}.yaml", SCALE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_row_of_a_table_is_a_run_of_one_protocol(path):
    table = load_rows(path, SCALE)
    assert len({row.key for row in table}) == len({row.label for row in table}) == len(table)
    protocol = {(row.config.diffusion, row.config.sampling, row.config.training.num_images) for row in table}
    assert len(protocol) == 1                              # one table, one way to train and sample
    assert table[0].config.sampling.num_steps == 250 and table[0].config.evaluation.num_samples == 50_000
    ((process, sampling, images),) = protocol
    assert (process.process is ProcessKind.DDPM) == path.stem.startswith("ddpm")
    assert (sampling.guidance_scale == 1.5) == path.stem.endswith("guided")
    assert f"{images // 256_000}k" in path.stem


def test_the_models_have_the_papers_numbers_of_parameters():
    found = {row.label: count_parameters(row.config.model).total / 1e6
             for name in ("flow-700k", "flow-3000k-guided") for row in rows(name)}
    expected = {"Dense-L": 458, "Dense-XL": 675, "Dense-XXL": 951, "Dense-XXXL": 1353, "DiffMoE-L-E8": 1176,
                "DiffMoE-L-E16": 1982}
    assert {name: round(found[name]) for name in expected} == expected
    assert len(found) == 16 + 3


def test_hours_follow_from_a_measured_throughput_or_are_marked_as_assumed(tmp_path):
    case = {"workload": "latent", "work": "train", "implementation": "ours", "size": "L-E16", "system": "diffmoe",
            "batch": 256}
    results = [{"case": case, "status": "ok", "samples_ms": [[800.0, 400.0], [500.0]]},
               {"case": case | {"batch": 64}, "status": "ok", "samples_ms": [[400.0]]},
               {"case": case | {"system": "dense"}, "status": "out of memory", "samples_ms": []}]
    (tmp_path / "bench-latent-1.json").write_text(json.dumps({"results": results}))
    some = [row for row in rows("flow-700k") if row.label in ("DiffMoE-L-E16", "Dense-L")]
    by_label = {cost.row.label: cost for cost in plan.costs(some, tmp_path)}
    diffmoe = by_label["DiffMoE-L-E16"]
    assert diffmoe.measured and diffmoe.throughput == pytest.approx(256 / 0.5)
    assert diffmoe.training_hours == pytest.approx(179.2e6 / 512 / 3600)
    assert diffmoe.sampling_hours == pytest.approx(50_000 * 250 / (3 * 512) / 3600)
    assert not by_label["Dense-L"].measured
    flops = 3 * by_label["Dense-L"].throughput * 161.4e9   # GFLOPs of a call, as counted for Table 1
    assert flops == pytest.approx(plan.ASSUMED_MFU * plan.ASSUMED_PEAK, rel=1e-3)
    (tmp_path / "bench-broken.json").write_text("[]")
    with pytest.raises(ConfigError, match="bench-broken.json"):
        plan.costs(rows("flow-700k"), tmp_path)


def test_throughput_is_that_of_the_same_data(tmp_path):
    case = {"workload": "cifar10", "work": "train", "implementation": "ours", "size": "S-E16", "batch": 512}
    results = [{"case": case | {"system": system}, "status": "ok", "samples_ms": [[ms]]}
               for system, ms in (("dense", 20.0), ("diffmoe", 32.0))]
    (tmp_path / "bench-cifar10-1.json").write_text(json.dumps({"results": results}))
    table = load_rows(BASELINES / "table1.yaml", reproduce.CONFIGS / "cifar10.yaml")
    speed = {cost.row.label: cost.throughput for cost in plan.costs(table, tmp_path) if cost.measured}
    assert speed == {"Dense": 512 / 0.02} | dict.fromkeys(
        ("DiffMoE (static)", "DiffMoE (dynamic)", "DiffMoE (per-token threshold)"), 512 / 0.032)
    assert not any(cost.measured for cost in plan.costs(rows("flow-7000k"), tmp_path))


def test_a_training_that_two_tables_share_is_counted_once(tmp_path):
    plain, guided = rows("flow-7000k"), rows("flow-7000k-guided")
    assert [digest(row.config, scope="training") for row in plain] == [
        digest(row.config, scope="training") for row in guided]
    alone = plan.plan({"plain": plain}, 2, 8, tmp_path)
    both = plan.plan({"plain": plain, "guided": guided}, 2, 8, tmp_path)
    total = "GPU hours of training"
    assert both.split(total)[0].rsplit("In all", 1)[1] == alone.split(total)[0].rsplit("In all", 1)[1]
    assert both.count("shared") == 2 and "4 rows x 2 seeds, 2 trainings a seed" in both


def test_memory_a_gpu_falls_with_the_gpus_and_counts_every_average():
    config = rows("flow-7000k")[0].config
    assert plan.activation_bytes(config, 8) == plan.activation_bytes(config, 1) / 8
    assert plan.state_bytes(config, 10) == 200
    assert plan.state_bytes(config, 10, 8) == 40 + 160 / 8
    training = dataclasses.replace(config.training, extra_ema_half_lives=(1.0,))
    assert plan.state_bytes(dataclasses.replace(config, training=training), 10, 8) == 40 + 200 / 8
    for how, size in ({"micro_batch_size": 2}, 200), ({"micro_batch_size": 32}, 60), ({"compile": False}, 200), (
            {"parallel": Parallel.FSDP}, 20 + 200 / 8):
        run = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, **how))
        assert plan.state_bytes(run, 10, 8) == size, how


def test_a_dry_run_needs_no_data_and_a_run_refuses_tables_that_no_folder_can_hold(capsys):
    arguments = [word for name in ("flow-7000k", "ddpm-7000k")
                 for word in ("--rows", str(BASELINES / "imagenet256" / f"{name}.yaml"))]
    assert reproduce.main([*arguments, "--scale", "imagenet256", "--dry-run", "--seeds", "1"]) == 0
    text = capsys.readouterr().out
    assert "DiffMoE-L-E8" in text and "GPU h" in text and "assumed" in text and "estimate" in text
    with pytest.raises(ConfigError, match="--rows=dense-xl: the row is in two files"):
        reproduce.main([*arguments, "--scale", "imagenet256"])
    with pytest.raises(ConfigError, match=r"data.path"):
        reproduce.main([*arguments[:2], "--scale", "imagenet256"])
    small = [word for name in ("table1", "sizes") for word in ("--rows", str(BASELINES / f"{name}.yaml"))]
    assert reproduce.main([*small, "--scale", "digits", "--dry-run"]) == 0  # where records are published, too
    assert "sizes.yaml" in capsys.readouterr().out
