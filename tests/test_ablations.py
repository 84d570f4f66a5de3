"""The axes and the rows they make, what a sweep would cost, and the pages made from records; no Ray."""

from __future__ import annotations

import fcntl
import itertools
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import one_line
from fake_records import fake_record

from ablations import driver, report, sweep, trials
from ablations.axes import AXES, Design, choose_axes, load_axes
from ablations.estimate import describe_cost, trial_minutes
from ablations.trials import make_trials
from diffmoe.cells import Cell, Store
from diffmoe.cli import run_command
from diffmoe.config import ConfigError, digest, load_config, to_dict
from diffmoe.data import load_data
from diffmoe.records import write_record
from diffmoe.reproduce import CONFIGS
from diffmoe.tracking.store import flatten

SCALES = ("digits", "cifar10")


def make_design(scale="digits", *overrides):
    return Design(load_config([CONFIGS / f"{scale}.yaml", CONFIGS / "diffmoe.yaml"], overrides), scale, load_axes())


@pytest.fixture(scope="module")
def design():
    return make_design()


def test_trials_that_share_a_gpu_take_turns_of_all_their_rows(design, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="u"))
    store, seen = Store(tmp_path), []

    def is_held():
        with (tmp_path / "gpu-u.lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def run_cell(cell, *arguments, turn, **options):
        with turn():
            seen.append((cell.row.key, "draws", is_held()))
        seen.append((cell.row.key, "measures", is_held()))

    monkeypatch.setattr(trials, "run_cell", run_cell)
    monkeypatch.setattr(trials, "choose_device", torch.device)
    monkeypatch.setattr(trials.tune, "get_context", lambda: SimpleNamespace(
        get_trial_resources=lambda: SimpleNamespace(required_resources={"GPU": 0.5, "CPU": torch.get_num_threads()})))
    design = make_design("digits", "runtime.device=cuda")
    cells = [Cell(row, 0) for _, row in design.axis_rows(design.axes["threshold"])[:3]]
    work = trials.Work(scale="digits", store=store, folder=Path.cwd(), deadline=math.inf, explore=False)
    trials.run_trial({"trial": "default-s0"}, trials={"default-s0": cells}, work=work)
    first, second, last = (cell.row.key for cell in cells)
    assert seen == [(first, "draws", True), (first, "measures", True), (second, "draws", True),
                    (second, "measures", True), (last, "draws", True), (last, "measures", False)]


@pytest.mark.parametrize(("gpus", "nodes", "cpus"), [
    (0, [{"CPU": 8}], 1), (0.5, [{"CPU": 16, "GPU": 1}], 8), (0.25, [{"CPU": 32, "GPU": 2}, {"CPU": 64}], 4),
    (0.5, [{"CPU": 16, "GPU": 1}, {"CPU": 8, "GPU": 1}], 4), (0.25, [{"CPU": 2, "GPU": 1}], 1),
    (2, [{"CPU": 32, "GPU": 8}], 8)])
def test_a_trial_gets_the_cpus_that_go_with_its_share_of_a_gpu(gpus, nodes, cpus, monkeypatch):
    monkeypatch.setattr(driver.ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    assert driver.cpus_of_a_trial(gpus) == cpus


# ---------------------------------------------------------------- axes and rows


@pytest.mark.parametrize("scale", SCALES)
def test_every_value_of_every_axis_is_a_configuration_and_the_default_is_one_of_them(scale):
    design = make_design(scale)
    assert design.left_out == {}
    for axis in design.axes.values():
        rows = [row for _, row in design.axis_rows(axis)]
        assert len({row.key for row in rows}) == len(rows) > 1, axis.name
        assert any(value.paper for value in axis.at(scale)), axis.name
        if (scale, axis.name) != ("cifar10", "sampling_batch"):  # that scale samples 500 at once: also a value
            assert design.default in rows, axis.name


@pytest.mark.parametrize("scale", SCALES)
def test_a_row_differs_from_the_default_in_what_its_axis_names_and_in_nothing_else(scale):
    design = make_design(scale)
    default = flatten(to_dict(design.base))
    for axis in design.axes.values():
        for value, row in design.axis_rows(axis):
            ours = flatten(to_dict(row.config))
            differing = {key for key in default.keys() | ours.keys() if default.get(key) != ours.get(key)}
            assert all(any(key == name or key.startswith(f"{name}.") for name in value.changes) for key in differing)


def test_the_default_is_the_tables_diffmoe(design):
    record = next((CONFIGS.parents[1] / "results/digits/records").glob("diffmoe-1*-s0-*.json"), None)
    assert record is None or digest(design.base) in record.name


def test_settings_of_one_configuration_are_one_row_with_one_key(design):
    predictor, threshold = design.axes["predictor"], design.axes["threshold"]
    rows = {value.name: row for value, row in design.axis_rows(threshold)}
    assert rows["0.4"] is {value.name: row for value, row in design.axis_rows(predictor)}["global"]
    assert rows["average"] is design.default
    plan = design.plan([predictor, threshold], [])
    assert plan[0] is design.default
    assert len({digest(row.config) for row in plan}) == len(plan) == 1 + 6 + 7


def test_a_grid_has_the_single_rows_at_its_edges_and_leaves_out_what_cannot_be(design):
    pool, predictor = design.axes["pool"], design.axes["predictor"]
    rows = make_design().grid_rows(pool, predictor)
    assert rows["batch", "counts"].key == "default"
    assert rows["sample", "counts"].key == "pool-sample"
    assert rows["images-8", "selects"].key == "pool-images-8+predictor-selects"
    assert ("token", "selects") not in rows  # token choice has no predictor


def test_an_override_moves_the_default_and_every_axis_with_it():
    design = make_design("digits", "model.moe.num_experts=4")
    assert {value.name: row for value, row in design.axis_rows(design.axes["experts"])}["4"] is design.default
    assert all(row.config.model.moe.num_experts == 4 for _, row in design.axis_rows(design.axes["gate"]))


def test_rows_of_one_training_are_one_trial(design):
    rows = design.plan([design.axes["threshold"], design.axes["sampling_batch"], design.axes["gate"]], [])
    trials = make_trials(rows, [0, 1])
    assert list(trials) == ["default-s0", "gate-sigmoid-s0", "gate-identity-s0",
                            "default-s1", "gate-sigmoid-s1", "gate-identity-s1"]
    assert sum(map(len, trials.values())) == 2 * len(rows)


def test_a_broken_file_of_axes_is_one_line(tmp_path):
    (tmp_path / "axes.yaml").write_text("- {axis: pool, title: x}\n")
    with pytest.raises(ConfigError, match=r"axes\.yaml: not a list of axes"):
        load_axes(tmp_path / "axes.yaml")
    names = [entry["axis"] for entry in yaml.safe_load(AXES.read_text())]
    assert len(set(names)) == len(names)


# ---------------------------------------------------------------- mistakes and cost


@pytest.mark.parametrize(("arguments", "named"), [
    (["--axis", "pol"], ("axis pol", "did you mean pool?")), (["--axis", "xyz"], ("axis xyz", "pool", "gate")),
    ([], ("--axis", "pool")), (["--grid", "pool"], ("--grid", "two axes")),
    (["--grid", "pool,pool"], ("--grid", "two axes")), (["--axis", "pool", "--seeds", "0"], ("--seeds", "0")),
    (["--axis", "pool", "--scale", "digit"], ("--scale digit", "digits")),
    (["--axis", "pool", "--jobs", "0"], ("--jobs", "0")),
    (["--axis", "pool", "--gpus-per-trial", "1.5"], ("--gpus-per-trial", "1.5")),
    (["--axis", "pool", "training.colour=1"], ("training.colour", "unknown key")),
    (["--axis", "pool", "--out", "/proc/none"], ("/proc/none", "--out")),
    (["--axis", "gate", "model.moe.router={kind: baselines.token_choice:TokenChoice}"], ("gate", "nothing to vary")),
    (["--publish", "--out", "nowhere"], ("nowhere", "no record")),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_mistake_is_one_line_and_exit_code_two_before_any_work(arguments, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
    assert run_command(sweep.main) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert [part for part in named if part not in line] == [], line


def test_the_cost_scales_with_images_and_a_finished_training_costs_nothing(design, tmp_path):
    data = load_data(design.base.data, design.base.model)
    store = Store(tmp_path)
    record = replace(fake_record("diffmoe", 0), config=to_dict(design.base))
    cells = [Cell(design.default, 0)]
    training = design.base.training.num_images * record.training["seconds"] / record.training["images"]
    sampling = record.sampling["seconds"] + record.evaluation["seconds"]
    assert trial_minutes(cells, [record], store, data) == pytest.approx((training + sampling) / 60)
    folder = store.run_folder(cells[0], data)
    folder.mkdir(parents=True)
    (folder / "ema.safetensors").touch()
    assert trial_minutes(cells, [record], store, data) == pytest.approx(sampling / 60)
    assert "no record" in describe_cost({"default-s0": cells}, [], store, data, 1)


def test_the_dry_run_lists_the_trials_and_starts_nothing(capsys, tmp_path):
    assert sweep.main(["--axis", "pool,predictor,experts", "--dry-run", "--out", str(tmp_path / "x")]) == 0
    output = capsys.readouterr().out
    assert "14 rows x 3 seeds: 0 recorded, 42 to run in 27 trials" in output
    assert "pool-sample-s2" in output
    assert not (tmp_path / "x").exists()
    assert sweep.main(["--list"]) == 0
    assert "sampling_batch" in capsys.readouterr().out


# ---------------------------------------------------------------- pages from records


def made_records(design, rows, seeds=(0, 1, 2)):
    """Records of rows, each 10 % worse than the one before, with a seed's luck of 1 %; loss and capacity by row."""
    for (index, row), seed in itertools.product(enumerate(rows), seeds):
        fake = fake_record("diffmoe", seed)
        yield replace(
            fake, id=f"{row.key}-{digest(row.config)}-s{seed}-fakedata", row=row.key, label=row.label,
            system=row.system, config=to_dict(row.config), config_digest=digest(row.config), threshold_sweep=[],
            training_digest=digest(row.config, scope="training"),
            training=fake.training | {"losses": [(step, {"mse": losses["mse"] * (1 + index / 100)})
                                                 for step, losses in fake.training["losses"]]},
            metrics=fake.metrics | {"distance": 1.1**index * 1.01 ** (seed - 1)},
            activation=fake.activation | {"capacity": 1 + index / 10})


@pytest.fixture(scope="module")
def written(design, tmp_path_factory):
    """A folder of pages: two axes, and a grid of two more."""
    folder = tmp_path_factory.mktemp("pages")
    grid = choose_axes(design.axes, ["gate", "interleave"])
    for record in made_records(design, design.plan([design.axes["predictor"]], [grid])):
        write_record(folder / "records", record)
    report.write_report(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "pages")


def test_pages_tables_and_figures_follow_from_the_records(folder):
    names = {path.name for path in folder.glob("*.md")}
    # a grid's edges are the single rows of both axes; its name has them in the file's order
    assert names == {"README.md", "predictor.md", "interleave.md", "gate.md", "interleave-by-gate.md"}
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {name[:-3] for name in names - {"README.md"}}
    assert report.main([str(folder), "--check"]) == 0
    page = folder / "predictor.md"
    page.write_text(page.read_text().replace("10.0 %", "11.0 %"))
    (folder / "figures" / "gate.png").unlink()
    assert [line.split(":")[0] for line in report.check_report(folder)] == [
        str(page), str(folder / "figures" / "gate.png")]
    assert report.main([str(folder), "--check"]) == 1


def test_an_axis_table_states_the_effect_with_its_interval_and_marks_default_and_paper(folder, design):
    table = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in (folder / "predictor.md").read_text().splitlines() if line.startswith("|")}
    assert table["**counts; the gate selects ★**"][3:5] == ["(default)", "-"]
    static = table["none: static top-k"]  # the second row of the plan; it shares the default's checkpoints: paired
    assert static[3] == "+10.0 %"
    assert static[4] == "-"  # every seed shows the same difference: no spread to judge by
    low, high = (float(bound.removesuffix(" %")) for bound in table["loss weight 0.1"][4].split(" to "))
    effect = float(table["loss weight 0.1"][3].removesuffix(" %"))
    assert low < effect < high  # Welch
    assert static[5] == "="
    assert table["loss weight 0.1"][5] == "5"  # the sixth row of the plan, by the same seed's default: no spread
    half = 100 * math.expm1(2.776 * 0.00995 * math.sqrt(2 / 3))  # t(4), sd of a log distance
    assert (high - effect) / (1 + effect / 100) == pytest.approx(half, rel=0.05)


def test_a_value_that_trains_as_the_default_did_is_compared_seed_by_seed(design):
    def effects(losses_of):
        changed = [replace(record, training=record.training | {"losses": losses_of(record)}) for record in records]
        table = report.axis_table(report.Ablations(defaults + changed), design.axes["predictor"])
        assert table[0][6:9] == ["FD-other", "to default", "95 % interval"]
        (row,) = (row for row in table if row[0] == "loss weight 0.1")
        return row[4:6], row[7:9]

    rows = {row.key: row for row in design.plan([design.axes["predictor"]], [])}
    defaults, records = ([replace(record, metrics=record.metrics | {"FD-other": factor * record.seed + 1})
                          for record in made_records(design, [row], seeds)]
                         for row, seeds, factor in ((design.default, [0, 1, 2], 1),
                                                    (rows["predictor-weight-0.1"], [0, 1], 3)))
    records[0] = replace(records[0], metrics=records[0].metrics | {"distance": 0.98 * records[0].metrics["distance"]})
    losses = {record.seed: record.training["losses"] for record in defaults}
    first, other = effects(lambda record: losses[record.seed])
    assert first == ["-1.0 %", "-12.9 % to +12.6 %"]  # t(1), not seed 2's luck
    assert other[0] == "+41.4 %"  # sqrt(1 * 4 / (1 * 2))
    slower = [(step, {"mse": 2 * at["mse"]}) for step, at in losses[0]]
    first, other = effects(lambda record: slower)
    assert (first[0], other[0]) == ("-1.5 %", "+10.1 %")  # sqrt(4) / cbrt(6)


def test_a_record_of_another_configuration_is_in_no_table_and_another_default_is_refused(folder, design):
    other = make_design("digits", "training.num_images=51200")
    row = other.row({"interleave": other.axes["interleave"].values[1]})
    (record,) = made_records(other, [replace(row, key="stranger")], seeds=[0])
    before = (folder / "interleave.md").read_text()
    write_record(folder / "records", record)
    report.write_report(folder)
    assert (folder / "interleave.md").read_text() == before
    (record,) = made_records(other, [other.default], seeds=[7])
    write_record(folder / "records", record)
    with pytest.raises(ConfigError) as caught:
        report.write_report(folder)
    assert "default" in one_line(caught.value)


def test_publishing_copies_what_is_new_and_changes_nothing_that_is_there(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    target = tmp_path / "digits" / "ablations"
    assert sweep.main(["--out", str(folder), "--publish"]) == 0
    assert report.check_report(target) == []
    before = {path: path.stat().st_mtime_ns for path in (target / "records").iterdir()}
    assert sweep.main(["--out", str(folder), "--publish"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (target / "records").iterdir()}
