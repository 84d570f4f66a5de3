"""Cells, records, and the commands built on them, at a size of seconds."""

import json
import shutil
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import one_line
from test_metrics import random_images

from diffmoe import cells, reproduce, sample
from diffmoe.cells import (
    Cell,
    Store,
    at_budgets,
    check_evaluation,
    gpu_turn,
    load_rows,
    measure_distances,
    measure_samples,
    missing_cells,
    run_cell,
    sampling_floors,
)
from diffmoe.cli import run_command
from diffmoe.config import ConfigError, PoolScope, digest
from diffmoe.data import load_data
from diffmoe.evaluation.metrics import measure
from diffmoe.evaluation.sampling import Samples
from diffmoe.launch import variables
from diffmoe.models.counting import count_parameters
from diffmoe.records import read_records, write_record
from diffmoe.train import CONFIGS
from diffmoe.training.checkpoint import load_weights
from diffmoe.training.distributed import LONG_S
from diffmoe.training.run import Interrupted

ROWS = CONFIGS.parents[1] / "baselines" / "table1.yaml"
SMALL = ["training.batch_size=16", "training.num_images=64", "sampling.num_steps=2", "evaluation.num_samples=40",
         "evaluation.kid_subset_size=20"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows():
    return {row.key: row for row in load_rows(ROWS, CONFIGS / "digits.yaml", SMALL)}


@pytest.fixture(scope="module")
def data(rows):
    return load_data(rows["dense"].config.data, rows["dense"].config.model)


@pytest.fixture(scope="module")
def measured(rows, data, tmp_path_factory):
    """Two rows that share a checkpoint and the dense one, with seed 0."""
    store = Store(tmp_path_factory.mktemp("local"))
    return store, {key: run_cell(Cell(rows[key], 0), "digits", data, store, CPU)
                   for key in ("ec-static", "ec-dynamic", "dense")}


def test_rows_that_differ_in_inference_alone_share_one_training(rows, measured):
    store, records = measured
    shared = {key: digest(row.config, scope="training") for key, row in rows.items()}
    assert shared["ec-static"] == shared["ec-dynamic"] != shared["dense"]
    assert shared["diffmoe"] == shared["diffmoe-static"] == shared["diffmoe-predictor"]
    assert len({digest(row.config) for row in rows.values()}) == len(rows) == 9
    assert len(list((store.folder / "runs").iterdir())) == 2
    assert records["ec-static"].training == records["ec-dynamic"].training


@pytest.mark.parametrize("scale", reproduce.scales())
def test_every_scale_has_every_row(scale):
    rows = {row.key: row.config for row in load_rows(ROWS, CONFIGS / f"{scale}.yaml")}
    assert len({digest(config) for config in rows.values()}) == 9
    ratio = count_parameters(rows["dense-large"].model).total / count_parameters(rows["dense"].model).total
    assert 1.45 < ratio < 3  # the paper's "matches dense models of 1.5 to 3 times the activated parameters"


def test_a_scale_that_is_not_there_is_one_line_that_names_the_others():
    with pytest.raises(ConfigError, match=r"--scale imagenet64: there is cifar10, digits, imagenet256"):
        reproduce.main(["--rows", str(ROWS), "--scale", "imagenet64"])


def test_recorded_cells_are_done_and_the_rest_comes_seed_by_seed(rows, data, measured):
    store, _ = measured
    missing = missing_cells(list(rows.values()), [0, 1], data, store)
    assert [(cell.seed, cell.row.key) for cell in missing] == [
        *((0, key) for key in rows if key not in ("ec-static", "ec-dynamic", "dense")), *((1, key) for key in rows)]


def test_a_row_varies_one_setting_and_has_settings_of_one_scale(tmp_path):
    table = tmp_path / "rows.yaml"
    table.write_text(f"""
- row: dense
  label: Dense
  system: dense
  config: {CONFIGS / "diffmoe.yaml"}
  set: {{training.learning_rate: 1.0e-3}}
  at: {{cifar10: {{training.learning_rate: 3.0e-3}}}}
- {{row: moe, label: MoE, system: diffmoe, config: {CONFIGS / "diffmoe.yaml"}, vary: {{model.moe.capacity: [0.5, 1]}}}}
""")
    digits, cifar = (load_rows(table, CONFIGS / f"{scale}.yaml") for scale in ("digits", "cifar10"))
    assert [row.key for row in digits] == ["dense", "moe-0.5", "moe-1"]
    assert [row.label for row in digits] == ["Dense", "MoE, 0.5", "MoE, 1"]
    assert [row.config.model.moe.capacity for row in digits] == [1, 0.5, 1]
    assert [row.config.training.learning_rate for row in (digits[0], cifar[0], cifar[1])] == [1e-3, 3e-3, 2e-3]


@pytest.mark.parametrize(("system", "changes"), [
    ("dense", "{}"), ("expert_race", "{}"), ("diffmoe", "{model.moe.router.inference: static}"),
    ("diffmoe", "{model.moe.router.global_threshold: 0.5}")])
def test_a_row_without_thresholds_of_its_own_cannot_be_swept(tmp_path, system, changes):
    table = tmp_path / "rows.yaml"
    config = CONFIGS / "diffmoe.yaml" if system == "diffmoe" else ROWS.parent / "configs" / f"{system}.yaml"
    table.write_text(f"- {{row: r, label: R, system: s, config: {config}, set: {changes}, threshold_sweep: true}}")
    with pytest.raises(ConfigError, match="threshold_sweep.*own thresholds"):
        load_rows(table, CONFIGS / "digits.yaml")


def test_sizes_and_variants_stand_beside_the_main_table_and_share_its_trainings():
    tables = {name: load_rows(ROWS.with_name(f"{name}.yaml"), CONFIGS / "cifar10.yaml")
              for name in ("table1", "sizes", "variants")}
    rows = {row.key: row.config for table in tables.values() for row in table}
    assert len(rows) == sum(map(len, tables.values()))
    widths = [rows[row].model.hidden_size for row in ("dense-narrow", "dense", "dense-large", "dense-wide")]
    assert widths == sorted(set(widths))
    assert rows["diffmoe-narrow"].model.hidden_size == rows["dense-narrow"].model.hidden_size
    trainings = [digest(row.config, scope="training") for row in tables["variants"]]
    assert len(set(trainings)) == len(trainings)
    assert [row.key for row, training in zip(tables["variants"], trainings, strict=True)
            if training == digest(rows["diffmoe"], scope="training")] == ["diffmoe-calibrated"]


def test_every_budget_of_a_row_is_a_cell_and_the_cheapest_come_first(rows, data, tmp_path):
    pair = [replace(rows[key], config=replace(rows[key].config, training=replace(rows[key].config.training,
                                                                                 budgets=(16, 32))))
            for key in ("tc", "dense")]
    missing = missing_cells(at_budgets(pair), [0, 1], data, Store(tmp_path))
    assert [(cell.row.config.images_seen, cell.seed, cell.row.key) for cell in missing] == [
        (images, seed, key) for images in (16, 32, 64) for seed in (0, 1) for key in ("tc", "dense")]
    assert len({cell.record_id(data) for cell in missing}) == 12 and len({cell.training for cell in missing}) == 4


def test_a_machine_takes_rows_and_seeds_of_a_table(tmp_path, capsys):
    command = ["--rows", str(ROWS), "--out", str(tmp_path), "--dry-run", "--only", "tc,dense", "--first-seed", "2",
               "--seeds", "2"]
    assert reproduce.main(command) == 0
    listed = [line.split("-") for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert sorted((row.strip(), seed) for row, _, seed, _ in listed) == [
        ("dense", "s2"), ("dense", "s3"), ("tc", "s2"), ("tc", "s3")]
    with pytest.raises(ConfigError, match="--only=tz: use rows of the files: tc, dense"):
        reproduce.main([*command, "--only", "dense,tz"])


def test_tables_of_one_protocol_share_a_folder_and_a_queue(tmp_path, capsys):
    sizes = ROWS.with_name("sizes.yaml")
    command = ["--rows", str(ROWS), "--rows", str(sizes), "--out", str(tmp_path), "--seeds", "1", *SMALL]
    assert reproduce.main([*command, "--only", "dense,dense-narrow"]) == 0
    assert "2 rows x 1 seeds: 0 cells recorded, 2 to run" in capsys.readouterr().out
    assert [record.row for record in read_records(tmp_path / "records")] == ["dense", "dense-narrow"]
    other = tmp_path / "other.yaml"
    other.write_text(f"""- {{row: other, label: Other, system: dense, config: {ROWS.parent / "configs/dense.yaml"},
   set: {{sampling.sampler: euler}}}}""")
    with pytest.raises(ConfigError, match="--rows=other: mixed samplers: euler, and heun of tc"):
        reproduce.main(["--rows", str(ROWS), "--rows", str(other), "--out", str(tmp_path), *SMALL])


def test_the_time_of_what_is_missing_is_that_of_records_of_its_own_budget(rows, measured, tmp_path):
    _, records = measured
    for images, minutes in ((32, 1), (64, 3)):  # of one run: the second time holds the first
        write_record(tmp_path / "records", replace(
            records["dense"], id=f"dense-{images}", training=records["dense"].training | {
                "images": images, "seconds": 60 * minutes},
            sampling={"num_samples": 40, "seconds": 50}, evaluation=records["dense"].evaluation | {"seconds": 10}))
    config = replace(rows["dense"].config, training=replace(rows["dense"].config.training, budgets=(32,)))
    short, whole = (Cell(row, 0) for row in at_budgets([replace(rows["dense"], config=config)]))
    for group, minutes in (([short], 2), ([short, whole], 5), ([whole], 4)):
        for jobs in (1, 2):  # one training is one process's
            assert f"about {minutes} min" in reproduce.estimate([group], jobs, tmp_path)
    assert "no published record" in reproduce.estimate([[Cell(rows["tc"], 0)]], 1, tmp_path)


@pytest.mark.fault("a record that is written again")
def test_a_record_is_read_back_whole_and_never_changed(measured):
    store, records = measured
    read = {record.row: record for record in read_records(store.records)}
    assert read == records
    before = {path: path.read_bytes() for path in store.records.iterdir()}
    write_record(store.records, records["dense"])  # the same again is nothing
    with pytest.raises(ConfigError, match="written once"):
        write_record(store.records, replace(records["dense"], label="another"))
    assert before == {path: path.read_bytes() for path in store.records.iterdir()}


def test_weights_are_published_of_whole_runs_that_lie_here(measured, tmp_path):
    store, records = measured
    dense = records["dense"]
    config = dense.config | {"evaluation": dense.config["evaluation"] | {"budget_images": 32}}
    reproduce.publish_weights([dense], Store(tmp_path), tmp_path / "checkpoints")  # its run is elsewhere
    reproduce.publish_weights([replace(dense, config=config)], store, tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()
    reproduce.publish_weights([dense], store, tmp_path / "checkpoints")
    assert (tmp_path / "checkpoints" / "dense.safetensors").exists()


def test_a_damaged_record_is_one_line_that_names_it(tmp_path):
    (tmp_path / "bad.json").write_text('{"schema": 1, "id": "x"}')
    with pytest.raises(ConfigError, match=r"bad\.json: not a record"):
        read_records(tmp_path)


def test_a_record_states_what_was_measured_and_no_path_of_this_machine(measured):
    store, records = measured
    dynamic, dense = records["ec-dynamic"], records["dense"]
    assert dynamic.activation["capacity"] == pytest.approx(
        sum(dynamic.activation["capacity_by_class"]) / 10, rel=1e-6)  # 4 images a class
    assert len(dynamic.activation["capacity_by_call"]) == 4  # Heun calls twice a step
    assert dense.activation["activated_params"] == dense.activation["total_params"]
    assert {"distance", "kid", "precision", "recall", "class_accuracy"} <= dense.metrics.keys()
    assert 0 < dense.evaluation["floor"]["FD-digits64"] == dynamic.evaluation["floor"]["FD-digits64"]
    assert dense.evaluation["floor"]["FD-digits64"] < dense.metrics["distance"]
    text = json.dumps([json.loads(path.read_text()) for path in store.records.iterdir()])
    assert str(Path.home()) not in text
    assert str(store.folder) not in text


def test_a_record_says_what_its_network_does_inside_and_an_older_one_has_no_word_of_it(measured, tmp_path):
    store, records = measured
    static, dynamic, dense = (records[key].diagnosis for key in ("ec-static", "ec-dynamic", "dense"))
    assert static["load_by_level"] == dynamic["load_by_level"] and static["passes"] == dynamic["passes"]  # one training
    assert static["capacity"] != dynamic["capacity"]
    assert dense.keys() == {"images", "batch", "noise_levels", "loss", "blocks", "gradients", "weights"}
    path = next(store.records.glob("dense-*.json"))
    content = json.loads(path.read_text())
    del content["diagnosis"]
    (tmp_path / path.name).write_text(json.dumps(content))
    assert read_records(tmp_path) == [replace(records["dense"], diagnosis={})]


def test_a_batch_that_does_not_fit_costs_the_diagnosis_and_not_the_record(rows, data, measured, monkeypatch, tmp_path):
    def refuse(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cells, "diagnose", refuse)
    store = Store(tmp_path)
    shutil.copytree(measured[0].folder / "runs", tmp_path / "runs")
    record = run_cell(Cell(rows["dense"], 0), "digits", data, store, CPU)
    assert record.diagnosis == {} and record.metrics == measured[1]["dense"].metrics


def test_a_cell_takes_one_turn_and_gives_it_up_to_be_measured(rows, data, measured, monkeypatch, tmp_path):
    taken, open_turns = [], []

    @contextmanager
    def turn():
        taken.append(True)
        open_turns.append(True)
        yield
        open_turns.pop()

    def measure(*arguments, **options):
        assert not open_turns
        return measured[1]["ec-dynamic"].metrics

    def distances(samples, *arguments):
        assert not open_turns
        return {"distance": samples.capacity.mean().item(), "FD-other": 1.0}

    monkeypatch.setattr(cells, "SWEEP_THRESHOLDS", (0.0, 1.0))
    monkeypatch.setattr(cells, "measure_samples", measure)
    monkeypatch.setattr(cells, "measure_distances", distances)
    for path, turns in ((tmp_path / "trained", 1), (tmp_path / "anew", 2)):
        store = Store(path)
        if turns == 1:
            shutil.copytree(measured[0].folder / "runs", path / "runs")
        swept = replace(rows["ec-dynamic"], threshold_sweep=True)
        record = run_cell(Cell(swept, 0), "digits", data, store, CPU, turn=turn)
        all_pairs, none = record.threshold_sweep
        assert (all_pairs["capacity"], none["capacity"]) == (swept.config.model.moe.num_experts, 0)
        assert all(point["distance"] == point["capacity"] for point in record.threshold_sweep) and len(taken) == turns
        assert all(point["FD-other"] == 1 for point in record.threshold_sweep)
        assert record.diagnosis == measured[1]["ec-dynamic"].diagnosis


def test_processes_that_are_told_to_stop_may_take_as_long_as_a_state_is_written(monkeypatch):
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert int(variables()["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= LONG_S
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "7")
    assert variables()["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "7"


def test_a_cell_trained_by_two_processes_is_that_of_one_and_is_measured_here(rows, data, tmp_path):
    row = rows["diffmoe"]
    model = replace(row.config.model, moe=replace(row.config.model.moe, pool_scope=PoolScope.GLOBAL))
    row = replace(row, config=replace(row.config, model=model, runtime=replace(row.config.runtime, device="cpu")))
    store, cell = Store(tmp_path / "two"), Cell(row, 0)
    with pytest.raises(Interrupted):
        run_cell(cell, "digits", data, store, CPU, processes=2, deadline=0.0)
    assert not store.has(cell, data)
    two = run_cell(cell, "digits", data, store, CPU, processes=2)
    one = run_cell(cell, "digits", data, Store(tmp_path / "one"), CPU)
    for done in ("training", "sampling"):
        assert (getattr(two, done)["processes"], getattr(one, done)["processes"]) == (2, 1)
    for (step, mine), (wanted_step, wanted) in zip(two.training["losses"], one.training["losses"], strict=True):
        assert step == wanted_step and mine == pytest.approx(wanted, rel=1e-4)
    assert two.metrics["distance"] == pytest.approx(one.metrics["distance"], rel=1e-2)


def test_processes_that_fail_are_one_line(rows, data, tmp_path):
    cell = Cell(rows["diffmoe"], 0)  # whose pool would be cut
    with pytest.raises(ConfigError, match="2 processes ended with exit code 1"):
        run_cell(cell, "digits", data, Store(tmp_path), CPU, processes=2)


def test_one_process_of_a_folder_at_a_time_has_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="u"))
    entered = threading.Event()

    def wait():
        with gpu_turn(tmp_path, torch.device("cuda")):
            entered.set()

    with gpu_turn(tmp_path, torch.device("cuda")), gpu_turn(tmp_path, CPU):
        other = threading.Thread(target=wait)
        other.start()
        assert not entered.wait(0.2)
    other.join(10)
    assert entered.is_set()


def drawn(images):
    """Return samples of which nothing is known but the images (N, C, H, W)."""
    return Samples(images, torch.zeros(len(images), dtype=torch.int64), None, None, None, None)


def test_what_is_measured_on_demand_stands_beside_the_rest(rows, data, tmp_path):
    config = rows["dense"].config
    both = replace(config, evaluation=replace(config.evaluation, second_extractor="test-pixels"))
    check_evaluation(both.evaluation, data)
    samples = drawn(random_images("samples", 40, channels=1))
    alone, found = (measure_samples(samples, one, data, tmp_path, CPU) for one in (config, both))
    assert found.keys() - alone.keys() == {"FD-test-pixels"}
    second = measure(samples.images, data, extractor="test-pixels", device=CPU, cache_root=tmp_path, kid_subset_size=20)
    assert found == alone | {"FD-test-pixels": pytest.approx(second["distance"])}
    distances = measure_distances(samples, both, data, tmp_path, CPU)
    assert distances == pytest.approx({name: found[name] for name in ("distance", "FD-test-pixels")})
    assert measure_distances(samples, config, data, tmp_path, CPU).keys() == {"distance"}
    copies = replace(config, evaluation=replace(config.evaluation, memorisation=True))
    assert measure_samples(drawn(data.images[:40]), copies, data, tmp_path, CPU)["copied"] == 1
    floors = sampling_floors(both.evaluation, data, tmp_path, CPU)
    assert floors.keys() == {"FD-digits64", "FD-test-pixels"} and min(floors.values()) > 0
    assert sampling_floors(replace(both.evaluation, num_samples=1750), data, tmp_path, CPU) == {}
    digits = replace(both.evaluation, extractor="test-pixels", second_extractor="digits64")
    check_evaluation(digits, data)
    larger = replace(data, images=data.images.repeat(1, 3, 2, 2))
    with pytest.raises(ConfigError, match=r"extractor=digits64: images of \(3, 16, 16\); it takes 8x8") as caught:
        check_evaluation(digits, larger)
    one_line(caught.value)


def test_the_commands_run_go_on_publish_and_sample(tmp_path, monkeypatch, capsys, few_figures):
    table = tmp_path / "rows.yaml"
    system = CONFIGS / "diffmoe.yaml"
    table.write_text(f"- {{row: diffmoe, label: DiffMoE, system: diffmoe, config: {system}}}\n")
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path)
    command = ["--rows", str(table), "--seeds", "1", *SMALL]
    assert reproduce.main([*command, "--dry-run"]) == 0
    assert "1 to run" in capsys.readouterr().out
    assert reproduce.main(command) == 0
    assert "DiffMoE" in capsys.readouterr().out
    assert reproduce.main(command) == 0
    assert "1 cells recorded, 0 to run" in capsys.readouterr().out
    assert (tmp_path / "digits" / "local" / "samples" / "diffmoe-s0.png").exists()

    assert reproduce.main(["--rows", str(table), "--publish"]) == 0
    weights = tmp_path / "digits" / "checkpoints" / "diffmoe.safetensors"
    assert weights.stat().st_size < 1_000_000
    assert load_weights(weights)[0]["positions"].dtype is torch.float16
    capsys.readouterr()
    assert reproduce.main(["--rows", str(table), "--publish"]) == 0
    assert "published 0 records" in capsys.readouterr().out
    grid = tmp_path / "grid.png"
    capsys.readouterr()
    assert sample.main(["--weights", str(weights), "--seeds", "0-19", "--out", str(grid)]) == 0
    assert "20 images, capacity" in capsys.readouterr().out
    assert grid.exists()
    for mistake in (["training.learning_rate=1"], ["--seeds", "9-1"], ["--weights", str(table)]):
        monkeypatch.setattr(sys, "argv", ["sample", "--weights", str(weights), *mistake])
        assert run_command(sample.main) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
