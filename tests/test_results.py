"""What the published records of the scale cifar10 must say about one another, and about the rows that rest on them."""

import math
from itertools import groupby
from pathlib import Path
from statistics import fmean

import yaml

from diffmoe.cells import load_rows
from diffmoe.config import digest, load_config
from diffmoe.records import read_records
from diffmoe.report.table import PAPER
from diffmoe.train import CONFIGS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "cifar10"
SCALE = CONFIGS / "cifar10.yaml"
STALL_STEP, STALL_LOSS = 250, 0.5
"""A run has stalled when its diffusion loss at this step of 2,000 is above this; predicting nothing has more than 1."""
AGAIN = RESULTS / "again"
"""Cells of the main table from before routers' products changed, whose networks ran again; history.md there says so."""
ROUNDED = {"7e45dd5", "ac9f304", "2394774", "54cfdde", "4533a4d", "dc47d16"}
"""The commits of runs since whose mixtures' routers multiply by weights rounded to bf16; so history.md there."""
MENDED = {"efe9d58"}
"""The commits of runs since, whose routers do not."""
MAIN_RATE = load_config([SCALE]).training.learning_rate
REPEATED = 0.01
"""Relative difference of the distances of one configuration, seed and kind of GPU; history.md there states it."""


def code(record):
    """Say which of the codes that give other bits a record is of."""
    commit = record.environment["commit"][:7]
    return "rounded" if commit in ROUNDED else "mended" if commit in MENDED else "older"


def test_each_system_has_the_learning_rate_that_the_rule_chose():
    rule = load_rows(ROOT / "baselines" / "learning_rate.yaml", SCALE)
    main = load_rows(ROOT / "baselines" / "table1.yaml", SCALE)
    found = {record.id.rpartition("-s")[0]: record for record in read_records(RESULTS / "learning_rate" / "records")}
    runs = {(row.system, row.config.training.learning_rate): found.pop(f"{row.key}-{digest(row.config)}")
            for row in rule}
    assert not found and len(runs) == len(rule)
    losses = {run: dict(record.training["losses"])[STALL_STEP]["mse"] for run, record in runs.items()}
    stalled = {rate for (_, rate), loss in losses.items() if loss > STALL_LOSS}
    for system in {row.system for row in rule}:
        distances = {rate: record.metrics["distance"] for (of, rate), record in runs.items()
                     if of == system and rate not in stalled}
        chosen = min(distances, key=distances.get)
        assert {row.config.training.learning_rate for row in main if row.system == system} == {chosen}, system


def excess(sparse, dense, after, until=math.inf):
    """Return by what share a training's loss is above another's, means over the logged steps between."""
    ours, theirs = (fmean(line["mse"] for step, line in record.training["losses"] if after < step <= until)
                    for record in (sparse, dense))
    return ours / theirs - 1


def test_smaller_rates_are_worse_at_8000_steps_and_better_for_experts_losses():
    """README.md there says so, of one seed a rate; distances of the main rate are means over seeds."""
    small = {(record.row, record.training["steps"]): record
             for record in read_records(RESULTS / "smaller_rates" / "records")}
    rule = {record.row: record for record in read_records(RESULTS / "learning_rate" / "records")}
    main = [record for record in read_records(RESULTS / "records") if record.training["steps"] == 8000]
    for row, published in {"dense": "dense", "ec": "ec-static", "diffmoe": "diffmoe"}.items():
        for name in ("distance", "FD-cifar64"):
            seeds = [record.metrics[name] for record in main if record.row == published and name in record.metrics]
            assert small[f"{row}-0.001", 8000].metrics[name] > fmean(seeds), (row, name)
    assert small["diffmoe-0.001", 8000].metrics["distance"] > small["dense-0.001", 8000].metrics["distance"]

    low, half, high = (excess(*pair, after=1500) for pair in (
        (small["diffmoe-0.0005", 2000], small["dense-0.0005", 2000]),
        (small["diffmoe-0.001", 2000], small["dense-0.001", 2000]), (rule["diffmoe-0.002"], rule["dense-0.002"])))
    assert low < 0 < half < high


def test_by_32000_steps_diffmoes_training_loss_is_below_denses():
    """README.md there says how the difference goes, of one seed on the same batches."""
    rows = {(record.row, record.seed): record for record in read_records(RESULTS / "records")
            if record.training["steps"] == 32_000}
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    for row in {row for row, _ in rows}:
        pairs = [rows.get((row, seed)) for seed in (0, 1)]
        cells = [f"{each.metrics['distance']:.2f} | {each.metrics['FD-cifar64']:.3f}" if each else "- | -"
                 for each in pairs]
        assert f"| {pairs[0].label} | {' | '.join(cells)} |" in page
    differences = [("diffmoe", "dense"), ("ec-static", "dense"), ("diffmoe", "ec-static"), ("diffmoe", "ec-dynamic"),
                   ("diffmoe-static", "diffmoe")]
    paper = yaml.safe_load(PAPER.read_text())["rows"]
    for ours, theirs in differences:
        cells = [f"{100 * (rows[ours, seed].metrics[name] / rows[theirs, seed].metrics[name] - 1):+.1f}"
                 if (theirs, seed) in rows else "-" for seed in (0, 1) for name in ("distance", "FD-cifar64")]
        cells.append(f"{100 * (paper[ours]['fid'] / paper[theirs]['fid'] - 1):+.1f}")
        assert f"| {rows[ours, 0].label} to {rows[theirs, 0].label} | {' | '.join(cells)} |" in page
    early, middle, late = (excess(rows["diffmoe", 0], rows["dense", 0], *steps)
                           for steps in ((2000, 8000), (8000, 16000), (24000, 32000)))
    assert 0.008 < early < 0.01 and 0.003 < middle < 0.005 and -0.0035 < late < -0.002


def test_the_page_says_which_code_trained_which_seeds():
    main = [record for record in read_records(RESULTS / "records") if record.config["model"]["moe"]]
    table = {row.key for row in load_rows(ROOT / "baselines" / "table1.yaml", SCALE)}
    seeds = {(record.system, record.seed): code(record) for record in main
             if record.row in table and record.training["steps"] == 8_000}
    assert {run for run, of in seeds.items() if of == "rounded"} == {
        ("expert_choice", 3), *(("diffmoe", seed) for seed in (1, 2, 3))}
    assert set(seeds.values()) == {"older", "rounded"}
    assert {code(record) for record in main if record.row not in table} == {"rounded"}
    long = {(record.seed, code(record)) for record in main if record.training["steps"] == 32_000}
    assert long == {(0, "rounded"), (1, "mended")}
    for folder, of in {"learning_rate": "older", "again": "older", "smaller_rates": "rounded", "ablations": "rounded",
                       "float32_routers": "mended"}.items():
        assert {code(record) for record in read_records(RESULTS / folder / "records")
                if record.config["model"]["moe"]} == {of}, folder


def test_with_seed_1_diffmoes_loss_is_below_ecs_throughout_32000_steps():
    """README.md there says so."""
    rows = {record.row: record for record in read_records(RESULTS / "records")
            if record.training["steps"] == 32_000 and record.seed == 1}
    steps = (2000, 8000), (8000, 16000), (16000, 24000), (24000, 32000)
    to_ec = [excess(rows["diffmoe"], rows["ec-static"], *some) for some in steps]
    assert max(to_ec) < 0 and [round(100 * share, 1) for share in (to_ec[0], to_ec[-1])] == [-0.3, -0.1]


def test_the_same_run_again_gives_the_same_distance_within_the_tolerance():
    def identity(record):
        return record.config_digest, record.seed, record.environment["hardware"], code(record) == "mended"

    records = [record for folder in RESULTS.rglob("records") if not folder.is_relative_to(AGAIN)
               for record in read_records(folder)]
    repeats = [[record.metrics["distance"] for record in same]
               for _, same in groupby(sorted(records, key=identity), key=identity)]
    repeats = [distances for distances in repeats if len(distances) > 1]
    assert repeats
    assert all(max(distances) <= (1 + REPEATED) * min(distances) for distances in repeats), repeats


def test_the_runs_of_the_rule_ran_again_bit_for_bit_but_for_diffmoe():
    """As the first 2,000 steps of the main ones, distances too; DiffMoE's differs from before the order was fixed."""
    rule, main = (read_records(RESULTS / folder) for folder in ("learning_rate/records", "records"))
    again = {(record.row, record.seed, record.environment["hardware"]): record for record in main
             if record.training["steps"] == 2000}
    changes = {}
    for first in rule:
        row, _, rate = first.row.rpartition("-")
        second = again.get(({"ec": "ec-static"}.get(row, row), first.seed, first.environment["hardware"]))
        if second and float(rate) == second.config["training"]["learning_rate"]:
            same = all(one["mse"] == other["mse"] for (_, one), (_, other) in zip(
                first.training["losses"], second.training["losses"], strict=True))
            changes[row] = same, abs(second.metrics["distance"] / first.metrics["distance"] - 1)
    assert changes.keys() == {"dense", "tc", "ec", "diffmoe", "expert-race"}
    assert {row for row, (same, change) in changes.items() if same and change < 1e-10} == changes.keys() - {"diffmoe"}
    same, change = changes["diffmoe"]
    assert not same and change > REPEATED


def test_trainings_that_ran_again_are_the_same_to_the_last_bit_but_for_two():
    """history.md there says so. The diffusion loss of 1,000 steps; a predictor trained beside it changes nothing."""
    logs = {}
    main = {row.key for row in load_rows(ROOT / "baselines" / "table1.yaml", SCALE)} - {"dense-large"}
    published = [record for folder in (RESULTS, AGAIN) for record in read_records(folder / "records")]
    for record in [*(record for record in published if record.row in main and record.training["steps"] <= 8_000),
                   *read_records(RESULTS / "learning_rate" / "records")]:
        if record.config["training"]["learning_rate"] == MAIN_RATE:
            lines = tuple(line["mse"] for _, line in record.training["losses"][:40])
            commit = record.environment["commit"]
            run = record.system, record.seed, code(record)
            logs.setdefault(run, {}).setdefault(lines, set()).add(commit)
    again = {run for run, found in logs.items() if len(set().union(*found.values())) > 1}
    assert again == {("dense", 0, "older"), ("token_choice", 0, "older"), ("expert_race", 0, "older"),
                     ("expert_choice", 0, "older"), ("expert_choice", 1, "older"),
                     *(("diffmoe", seed, "older") for seed in (0, 1)),
                     *(("diffmoe", seed, "rounded") for seed in (1, 2))}
    # Both differ in runs made before the compiler's order was fixed; with it, one repeats the rule's run.
    different = {("expert_choice", 1, "older"), ("diffmoe", 0, "older")}
    assert {run for run in again if len(logs[run]) > 1} == different
    assert sorted(map(len, logs["diffmoe", 0, "older"].values())) == [1, 2]


def test_a_cell_on_another_gpu_and_on_another_machine_is_the_same_to_the_last_bit():
    main = {record.id: record for record in read_records(RESULTS / "records")}
    cells = read_records(AGAIN / "others" / "records")
    assert [cell.training["steps"] for cell in cells] == [8000, 2000]
    for cell in cells:
        other = main[cell.id]
        assert cell.training["images_per_second"] != other.training["images_per_second"]  # not one record twice
        assert [losses["mse"] for _, losses in cell.training["losses"]] == [
            losses["mse"] for _, losses in other.training["losses"]]
        assert {name: cell.metrics[name] for name in ("distance", "FD-cifar64")} == {
            name: other.metrics[name] for name in ("distance", "FD-cifar64")}


def test_two_runs_of_other_lengths_on_two_gpus_are_the_same_to_the_last_bit():
    """history.md there says so."""
    short, = (record for record in read_records(RESULTS / "float32_routers" / "records")
              if (record.row, record.seed, record.training["steps"]) == ("diffmoe", 1, 8_000))
    long, = (record for record in read_records(RESULTS / "records")
             if (record.row, record.seed, record.training["steps"]) == ("diffmoe", 1, 32_000))
    losses = [[(step, line["mse"]) for step, line in record.training["losses"] if step <= 8_000]
              for record in (short, long)]
    assert losses[0] == losses[1] and losses[0][-1][0] == 8_000


def test_one_of_six_trainings_is_the_same_on_another_kind_of_gpu():
    """history.md there says so."""
    def losses(record):
        return [losses["mse"] for _, losses in record.training["losses"]]

    main, ours = ({(record.row, record.seed): record for record in read_records(folder / "records")
                   if record.training["steps"] == 8_000} for folder in (RESULTS, RESULTS / "ablations"))
    pairs = {("diffmoe-experts-4", 0): ("experts-4", 0), ("diffmoe-experts-8", 0): ("experts-8", 0),
             ("diffmoe-experts-32", 0): ("experts-32", 0), ("diffmoe-predictor-weight-10", 0): ("default", 0),
             ("diffmoe", 1): ("default", 1), ("diffmoe", 2): ("default", 2)}
    hardware = {(main[theirs].environment["hardware"], ours[mine].environment["hardware"])
                for theirs, mine in pairs.items()}
    assert hardware == {("NVIDIA H100 80GB HBM3", "NVIDIA H200")}
    same = {mine for theirs, mine in pairs.items() if losses(main[theirs]) == losses(ours[mine])}
    assert same == {mine for theirs, mine in pairs.items() if losses(main[theirs])[0] == losses(ours[mine])[0]}
    assert same == {("experts-32", 0)}
    one, other = main["diffmoe-experts-32", 0].metrics, ours["experts-32", 0].metrics
    assert all(math.isclose(one[name], other[name], rel_tol=1e-12) for name in ("distance", "FD-cifar64"))


def test_the_weight_of_the_predictors_loss_leaves_the_backbone_as_it_is():
    """README.md there says so: it has its parameters to itself, and AdamW does not see the scale of a loss."""
    records = {(record.row, record.seed): record for record in read_records(RESULTS / "ablations" / "records")}
    pairs = [(record, records["default", seed]) for (row, seed), record in records.items()
             if row.startswith("predictor-weight-")]
    assert pairs
    for record, default in pairs:
        ours, theirs = ([losses["mse"] for _, losses in each.training["losses"]] for each in (record, default))
        assert ours == theirs
