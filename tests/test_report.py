"""Tables, verdicts and figures: numbers against formulas worked out here, mixtures refused, a changed digit found."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import yaml
from conftest import one_line
from fake_records import ROWS, fake_record, fake_records
from scipy import stats

from diffmoe.cells import load_rows
from diffmoe.config import ConfigError, digest
from diffmoe.evaluation.grid import decode_examples
from diffmoe.records import Record, write_record
from diffmoe.report import __main__ as report
from diffmoe.report.comparison import compare, detection_power, holm, holm_factors, seeds_to_decide, smallest_gap
from diffmoe.report.cost import cost_markdown
from diffmoe.report.distances import distances_data, points_data
from diffmoe.report.figures import FIGURES, figures_csv, losses_data, write_figures
from diffmoe.report.panels import computation_data, samples_data
from diffmoe.report.table import PAPER, mean_sd, results_table, row_order, table_csv
from diffmoe.report.verdicts import Claim, judge, load_claims, verdicts_markdown

ROOT = Path(__file__).parent.parent
DRAWN_ROWS = ("tc", "dense", "diffmoe-static", "diffmoe")
BETTER, WORSE = "diffmoe", "diffmoe-static"
PAIRED = Claim(better=BETTER, worse=WORSE, published=(0.9, 1.0), shares_checkpoint=True)
WELCH = Claim(better="diffmoe", worse="dense", published=(0.9, 1.0))


def with_distances(row: str, distances: list[float]) -> list[Record]:
    """Return a row's records with given distances, one a seed."""
    return [replace(record, metrics=record.metrics | {"distance": distance})
            for distance, record in zip(distances, fake_records([row], range(len(distances))), strict=True)]


def column(table: list[list[str]], name: str) -> dict[str, str]:
    return {line[0]: line[table[0].index(name)] for line in table[1:]}


# Table


def test_a_cell_is_the_mean_and_sd_over_seeds() -> None:
    table = results_table(with_distances("dense", [8.0, 8.5, 9.3]))
    assert mean([8.0, 8.5, 9.3]) == pytest.approx(8.6) and stdev([8.0, 8.5, 9.3]) == pytest.approx(0.6557, abs=1e-4)
    assert column(table, "FD-digits64") == {"Dense": "8.60 ± 0.66"}
    assert column(table, "seeds") == {"Dense": "3"}


@pytest.mark.parametrize("values, text", [([14.41], "14.41"), ([1.0, 1.0], "1"), ([100.0, 140.0], "120 ± 28"),
                                          ([0.0123, 0.0125], "0.01240 ± 0.00014")])
def test_the_sd_sets_the_decimals(values: list[float], text: str) -> None:
    assert mean_sd(values) == text


def test_rows_stand_in_the_tables_order_whatever_the_records_order() -> None:
    records = fake_records(seeds=[0])
    labels = [line[0] for line in results_table(records[::-1])[1:]]
    assert labels == [ROWS[row][0] for row in ROWS]
    assert results_table(records) == results_table(records[::-1])


@pytest.mark.parametrize("our_ratio, differs", [(0.80, "yes"), (0.805, "no"), (0.89, "no"), (0.90, "yes")])
def test_differs_says_whether_the_ratio_to_dense_leaves_the_published_spread(our_ratio: float, differs: str) -> None:
    # published 14.41 / 17.01 = 0.8472; exp(+-1.96 sqrt(2) 0.02) = 1 / 1.0570 .. 1.0570: from 0.8015 to 0.8954
    table = results_table(with_distances("dense", [10.0]) + with_distances("diffmoe", [10.0 * our_ratio]))
    assert column(table, "differs") == {"Dense": "-", "DiffMoE (dynamic)": differs}
    assert column(table, "published FID")["DiffMoE (dynamic)"] == "14.41"
    assert column(table, "published to Dense")["DiffMoE (dynamic)"] == "-15.3 %"
    assert column(table, "FD-digits64 to Dense")["DiffMoE (dynamic)"] == f"{100 * (our_ratio - 1):+.1f} %"


def test_without_dense_nothing_is_relative_to_it() -> None:
    assert column(results_table(fake_records(["diffmoe"])), "differs") == {"DiffMoE (dynamic)": "-"}


@pytest.mark.parametrize("changes, ours, theirs", [
    ({"sampling": {"num_samples": 500, "seconds": 1.0}}, "1000", "500"),
    ({"evaluation": {"extractor": "vgg16", "distance_name": "FD-vgg16", "reference": "fakedata"}}, "digits64", "vgg16"),
    ({"evaluation": {"extractor": "digits64", "distance_name": "FD-digits64", "reference": "x"}}, "fakedata", "has x"),
    ({"scale": "cifar10"}, "digits", "cifar10"),
    ({"config": {"sampling": {"sampler": "euler"}}}, "mixed samplers: .*heun", "euler"),
    ({"config": {"sampling": {"clip_denoised": True}}}, "mixed samplers: .*heun", "heun, clipped"),
    ({"config": {"sampling": {"num_steps": 50}}}, "steps: .*25", "50"),
    ({"config": {"sampling": {"guidance_scale": 1.5}}}, "guidance: .*has 1", "1.5 .all channels, separate"),
    ({"config": {"evaluation": {"kid_subset_size": 100}}}, "KID subset sizes: .*500", "100"),
])
def test_a_mixture_is_refused_naming_both_values(changes: dict, ours: str, theirs: str) -> None:
    other = fake_record("tc", 0)
    if "config" in changes:
        changes = {"config": other.config | {part: other.config[part] | values
                                             for part, values in changes["config"].items()}}
    records = [fake_record("dense", 0), replace(other, **changes)]
    for make in (results_table, judge, figures_csv, cost_markdown):
        with pytest.raises(ConfigError, match=f"{ours}.*{theirs}") as error:
            make(records)
        assert all(record.id in one_line(error.value) for record in records)


def test_inference_options_of_a_rows_router_may_differ() -> None:
    rows = ["diffmoe", "diffmoe-static", "diffmoe-predictor"]  # dynamic, static, per-token threshold
    assert len(results_table(fake_records(rows))) == 4


def test_a_row_of_two_configurations_and_a_cell_that_is_there_twice_are_refused() -> None:
    with pytest.raises(ConfigError, match="configurations") as error:
        results_table([fake_record("dense", 0), replace(fake_record("dense", 1), config_digest="other")])
    assert "other" in one_line(error.value)
    with pytest.raises(ConfigError, match="seed 0 is there twice"):
        results_table([fake_record("dense", 0), replace(fake_record("dense", 0), id="again")])


def test_the_csv_holds_every_number_unrounded() -> None:
    records = fake_records()
    lines = list(csv.DictReader(io.StringIO(table_csv(records))))
    found = {(line["row"], int(line["seed"])): float(line["value"]) for line in lines if line["metric"] == "distance"}
    assert found == {(record.row, record.seed): record.metrics["distance"] for record in records}


# Verdicts


def test_a_paired_claim_is_a_t_test_of_log_ratios() -> None:
    better, worse = [7.0, 7.2, 7.1], [7.5, 7.9, 7.4]
    [verdict] = judge(with_distances(BETTER, better) + with_distances(WORSE, worse), [PAIRED])
    logs = [math.log(a / b) for a, b in zip(better, worse, strict=True)]
    middle, error = mean(logs), stdev(logs) / math.sqrt(3)
    t_975 = 4.302652729911275  # Student's t with 2 degrees of freedom
    assert verdict.comparison.effect == pytest.approx(middle)
    assert verdict.comparison.interval == pytest.approx((middle - t_975 * error, middle + t_975 * error))
    t = middle / error  # for 2 degrees of freedom the distribution has a closed form
    assert verdict.comparison.p == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t))


def test_pairs_are_formed_by_seed() -> None:
    records = with_distances(BETTER, [7.0, 7.2, 7.1]) + with_distances(WORSE, [7.5, 7.9, 7.4])
    without = [record for record in records if (record.row, record.seed) != (BETTER, 1)]
    [verdict] = judge(without[::-1], [PAIRED])
    assert verdict.comparison.num_seeds == 2
    assert verdict.comparison.effect == pytest.approx((math.log(7.0 / 7.5) + math.log(7.1 / 7.4)) / 2)


def test_other_claims_are_welch_tests_of_logs() -> None:
    better, worse = [7.0, 7.2, 7.1], [8.5, 7.9, 8.4, 8.6]
    [verdict] = judge(with_distances("diffmoe", better) + with_distances("dense", worse), [WELCH])
    a, b = np.log(better), np.log(worse)
    parts = a.var(ddof=1) / 3, b.var(ddof=1) / 4
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 3)
    t = (a.mean() - b.mean()) / math.sqrt(sum(parts))
    assert verdict.comparison.p == pytest.approx(2 * stats.t.sf(abs(t), freedom))
    half = stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts))
    assert verdict.comparison.interval == pytest.approx((a.mean() - b.mean() - half, a.mean() - b.mean() + half))


def test_holm_on_known_p_values() -> None:
    # sorted .005 .01 .03 .04: times 4, 3, 2, 1 = .02 .03 .06 .04, never falling: .02 .03 .06 .06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_factors([0.01, 0.04, 0.03, 0.005]) == [3, 1, 2, 4]
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_a_claim_without_a_test_still_counts_in_holms_list() -> None:
    records = with_distances(BETTER, [7.0, 7.2, 7.1]) + with_distances(WORSE, [7.5, 7.9, 7.4])
    alone, = judge(records, [PAIRED])
    among = judge(records, [PAIRED, WELCH, replace(WELCH, worse="tc")])
    assert among[0].p_adjusted == pytest.approx(3 * alone.comparison.p)
    assert among[1].verdict == "undecided" and among[1].p_adjusted == 1


@pytest.mark.parametrize("better, worse, published, verdict, reason", [
    ([7.0, 7.1, 7.2], [8.0, 8.1, 8.2], (0.88, 1.0), "reproduced", ""),
    ([7.0, 7.1, 7.2], [8.0, 8.1, 8.2], (0.6, 1.0), "reproduced", "but smaller than the paper's"),
    ([8.0, 8.1, 8.2], [7.0, 7.1, 7.2], (0.9, 1.0), "not reproduced", "the other way round"),
    ([8.0, 8.1, 8.2], [8.05, 8.1, 8.15], (0.9, 1.0), "not reproduced", "smaller than the paper's"),
    ([7.0, 9.0, 8.0], [8.5, 8.1, 8.2], (0.9, 1.0), "undecided", "too few seeds"),
    ([7.0], [8.5], (0.9, 1.0), "undecided", "one seed"),
    ([7.0, 7.0], [8.0, 8.0], (0.9, 1.0), "undecided", "no spread over seeds"),
])
def test_the_rule_of_verdicts(better: list[float], worse: list[float], published: tuple[float, float], verdict: str,
                              reason: str) -> None:
    claim = replace(WELCH, published=published)
    [found] = judge(with_distances("diffmoe", better) + with_distances("dense", worse), [claim])
    assert (found.verdict, found.reason) == (verdict, reason)


def test_the_smallest_gap_and_the_deciding_seeds_have_the_power_they_claim() -> None:
    generator = np.random.default_rng(0)
    paired, both = (0.02**2,), (0.02**2, 0.03**2)
    differences = generator.normal(smallest_gap(paired, 3, 0.01), 0.02, (40_000, 3))
    assert (stats.ttest_1samp(differences, 0, axis=1).pvalue < 0.01).mean() == pytest.approx(0.8, abs=0.01)
    a, b = generator.normal(0, 0.02, (40_000, 4)), generator.normal(smallest_gap(both, 4, 0.05), 0.03, (40_000, 4))
    found = (stats.ttest_ind(a, b, axis=1, equal_var=False).pvalue < 0.05).mean()
    assert found == pytest.approx(0.8, abs=0.05)  # Welch's degrees of freedom are themselves estimated
    seeds = seeds_to_decide(0.05, both, 0.05)
    assert detection_power(0.05, both, seeds - 1, 0.05) < 0.8 <= detection_power(0.05, both, seeds, 0.05)
    assert seeds_to_decide(1e-5, both, 0.05) is None


def test_paired_differences_have_one_variance() -> None:
    found = compare([1.0, 1.2, 1.1], [1.5, 1.6, 1.7], paired=True)
    assert found.variances == pytest.approx((np.var([-0.5, -0.4, -0.6], ddof=1),))


def test_at_equal_capacity_the_better_row_is_read_off_its_sweep() -> None:
    sweep = [{"threshold": 0.5, "capacity": 0.9, "activated_params": 1.0, "distance": 7.0},
             {"threshold": 0.1, "capacity": 1.1, "activated_params": 1.0, "distance": 6.0}]
    records = [replace(record, threshold_sweep=sweep) for record in with_distances(BETTER, [7.1, 7.2])]
    records += with_distances(WORSE, [7.5, 7.9])  # which measured C = 1
    [verdict] = judge(records, [replace(PAIRED, equal_capacity=True)])
    own = (math.log(7) + math.log(6)) / 2
    assert verdict.comparison.effect == pytest.approx(own - (math.log(7.5) + math.log(7.9)) / 2)


def test_at_equal_capacity_each_seed_is_read_at_its_own_partners_capacity() -> None:
    ends = [{"threshold": 0.5, "capacity": 0.5, "distance": 8.0}, {"threshold": 0.1, "capacity": 1.5, "distance": 4.0}]
    records = [replace(record, threshold_sweep=ends) for record in with_distances(BETTER, [7.0, 7.0, 7.0])]
    for record, capacity in zip(with_distances(WORSE, [6.0, 6.1, 6.3]), (0.75, 1.25, 2.0), strict=True):
        records.append(replace(record, activation=record.activation | {"capacity": capacity}))
    [verdict] = judge(records, [replace(PAIRED, equal_capacity=True)])
    logs = [math.log(8) - 0.25 * math.log(2) - math.log(6.0), math.log(8) - 0.75 * math.log(2) - math.log(6.1)]
    assert verdict.comparison.num_seeds == 2  # the third capacity lies outside the sweep
    assert verdict.comparison.effect == pytest.approx(mean(logs))
    assert verdict.comparison.p == pytest.approx(stats.ttest_1samp(logs, 0).pvalue)
    [verdict] = judge(with_distances("dense", [1.0]), [replace(PAIRED, equal_capacity=True)])
    assert verdict.reason == "no sweep reaches that C"


def test_a_claim_that_is_wrong_about_sharing_is_refused() -> None:
    records = fake_records(["diffmoe", "diffmoe-static", "dense"])
    for claim in (replace(WELCH, shares_checkpoint=True), replace(PAIRED, shares_checkpoint=False)):
        with pytest.raises(ConfigError, match="shares_checkpoint"):
            judge(records, [claim])


def test_a_distance_that_has_no_logarithm_is_one_line() -> None:
    with pytest.raises(ConfigError, match="above 0"):
        judge(with_distances("diffmoe", [7.0, 0.0]) + with_distances("dense", [8.0, 8.1]), [WELCH])


@pytest.mark.parametrize("scale, heading", [("digits", "pipeline check, not evidence"), ("cifar10", "verdict")])
def test_at_digits_the_verdicts_say_that_they_are_no_evidence(scale: str, heading: str) -> None:
    first = verdicts_markdown(fake_records(scale=scale)).splitlines()[0]
    assert f"| {heading} " in first


def test_the_listed_claims_agree_with_the_rows_and_the_published_numbers() -> None:
    rows = {row.key: digest(row.config, scope="training")
            for row in load_rows(ROOT / "baselines/table1.yaml", ROOT / "diffmoe/configs/digits.yaml")}
    published = {row: entry["fid"] for row, entry in yaml.safe_load(PAPER.read_text())["rows"].items()}
    assert published.keys() <= rows.keys()
    for claim in load_claims():
        assert claim.shares_checkpoint == (rows[claim.better] == rows[claim.worse]), claim.text
        assert claim.effect < 0
        if not claim.equal_capacity:
            assert claim.published == (published[claim.better], published[claim.worse])


# Figures and the command


def test_a_shared_training_is_drawn_once() -> None:
    data = losses_data(fake_records())
    assert set(data.label) == {"TC", "Dense", "EC", "DiffMoE", "Expert Race", "Dense (larger)"}
    assert (data.groupby(["label", "seed", "step"]).size() == 1).all()


def test_points_are_the_records_and_their_sweeps() -> None:
    data = points_data(fake_records())
    assert data.threshold.isna().sum() == 27
    assert set(data[data.threshold.notna()].row) == {"diffmoe"}
    assert set(data[data.threshold.notna()].seed) == {0, 1, 2}


def test_the_computation_of_a_patch_is_the_mean_over_seeds_at_its_place() -> None:
    records = fake_records(["dense", "diffmoe"])
    loads = [list(range(16)), [0] * 16, [3 * value for value in range(16)]]
    for index, load in enumerate(loads, 3):
        measured = records[index].activation | {"load_by_position": load, "load_by_third": [load] * 3}
        records[index] = replace(records[index], activation=measured)
    data = computation_data(records)
    whole = data[data.panel == "all calls"]
    assert set(data.row) == {"diffmoe"}
    assert [(y, x, load) for y, x, load in zip(whole.y, whole.x, whole.load, strict=True)] == [
        (index // 4, index % 4, pytest.approx(4 / 3 * index)) for index in range(16)]
    singles = data[data.panel == "example"]
    assert list(singles["class"].unique()) == [0, 1, 2, 3] and set(singles.seed) == {0}


def test_latents_have_maps_and_no_pictures(tmp_path: Path) -> None:
    records = [replace(record, examples={}) for record in fake_records(["dense", "diffmoe"], [0])]
    assert set(computation_data(records).panel) == {"all calls", "first third", "middle third", "last third"}
    assert samples_data(records).empty
    assert {path.stem for path in write_figures(records, tmp_path)} == set(FIGURES) - {"samples"}


def test_images_in_figures_are_the_records() -> None:
    data = samples_data(fake_records(["dense", "tc"]))
    assert data.groupby("row").size().to_dict() == {"dense": 20, "tc": 20} and set(data.seed) == {0}
    assert data["class"].tolist()[:4] == [0, 0, 1, 1]
    images = decode_examples(fake_record("tc", 0).examples)
    assert data[data.row == "tc"].pixels.iloc[7] == hashlib.sha256(images[7].tobytes()).hexdigest()[:12]


def test_costs_are_means_over_seeds_and_count_a_shared_training_once() -> None:
    text = cost_markdown(fake_records(["dense", "diffmoe", "diffmoe-static"], [0, 2]))
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in text.splitlines() if line.startswith("|")}
    assert lines["DiffMoE (dynamic)"] == ["2", "62", "2,065", "12", "83", "3", "72", "1,100", "2 CPU cores, 1 thread"]
    assert lines["Dense"][6] == "-"
    # 2 x (61 + 63) of training, 6 x 12 of sampling, 6 x 3 of evaluation, 2 x 8 x 9 of sweeps: 482 s
    assert "once: 8.0 minutes (training 4.1, sampling 1.2, evaluation 0.3, sweeps 2.4)" in text


def test_records_from_before_these_fields_still_make_a_report(tmp_path: Path) -> None:
    for record in fake_records(["dense", "diffmoe"], [0]):
        activation = {key: value for key, value in record.activation.items() if not key.startswith("load_by")}
        sweep = [{key: value for key, value in point.items() if key != "seconds"} for point in record.threshold_sweep]
        old = replace(record, activation=activation, threshold_sweep=sweep, environment={})
        path = write_record(tmp_path / "records", old)
        content = json.loads(path.read_text())
        del content["examples"], content["diagnosis"]
        path.write_text(json.dumps(content))
    assert report.main([str(tmp_path)]) == 0
    assert report.check_report(tmp_path) == []
    new = {"samples", "computation", "branches", "experts_by_noise_level", "experts_by_class", "thresholds",
           "loss_by_noise_level"}
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == set(FIGURES) - new
    assert not (tmp_path / "diagnosis.md").exists()
    assert "sweeps" not in (tmp_path / "cost.md").read_text().split("All 2 records")[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a results folder with its report."""
    folder = tmp_path_factory.mktemp("results")
    for record in fake_records(DRAWN_ROWS, [0, 1]):
        write_record(folder / "records", record)
    assert report.main([str(folder)]) == 0
    return folder


def test_equal_records_give_equal_bytes(results: Path, tmp_path: Path) -> None:
    paths = write_figures(fake_records(DRAWN_ROWS, [1, 0])[::-1], tmp_path)
    assert {path.stem for path in paths} == set(FIGURES)
    for path in paths:
        assert path.read_bytes() == (results / "figures" / path.name).read_bytes(), path.name


def test_a_table_of_dense_rows_alone_has_the_figures_that_it_has_data_for(tmp_path: Path) -> None:
    names = {path.stem for path in write_figures(fake_records(["dense"], [0]), tmp_path)}
    distances = {f"distance_vs_{axis}" for axis in ("activated_params", "cost", "capacity")}
    assert names == distances | {"distances", "training_loss", "samples", "branches"}


def test_the_figure_of_all_rows_has_each_seed_in_the_tables_order() -> None:
    records = fake_records(["diffmoe", "dense"], [1, 0])
    data = distances_data(records)
    assert list(zip(data.row, data.seed, strict=True)) == [("dense", 0), ("dense", 1), ("diffmoe", 0), ("diffmoe", 1)]
    measured = {(record.row, record.seed): record.metrics["distance"] for record in records}
    assert list(data.distance) == [measured[key] for key in zip(data.row, data.seed, strict=True)]
    assert set(data.name) == {"FD-digits64"}


def test_rows_of_a_varied_setting_stand_in_the_order_of_its_values() -> None:
    rows = ["x-32", "x-0.01", "x-4", "dense", "x-0.1", "w"]
    assert sorted(rows, key=row_order) == ["dense", "w", "x-0.01", "x-0.1", "x-4", "x-32"]


def test_what_was_written_passes_the_check(results: Path) -> None:
    assert report.check_report(results) == []
    assert report.main([str(results), "--check"]) == 0


@pytest.mark.parametrize("name", ["table.md", "table.csv", "verdicts.md", "cost.md", "diagnosis.md",
                                  *(f"figures/{figure}.csv" for figure in FIGURES)])
def test_a_changed_digit_fails_the_check_by_name(name: str, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = results / name
    text = path.read_text()
    place = next(index for index, letter in enumerate(text) if letter.isdigit())
    path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1:])
    assert report.main([str(results), "--check"]) == 1
    assert capsys.readouterr().err.startswith(str(path))
    path.write_text(text)


def test_a_changed_record_and_a_missing_figure_fail_the_check(results: Path) -> None:
    record = next((results / "records").glob("dense-*-s0-*.json"))
    text = record.read_text()
    record.write_text(text.replace('"distance": 8', '"distance": 9', 1))
    assert {Path(line.split(":")[0]).name for line in report.check_report(results)} >= {"table.md", "verdicts.md"}
    record.write_text(text)
    picture = results / "figures/training_loss.png"
    picture.rename(picture.with_suffix(".away"))
    assert report.check_report(results) == [f"{picture}: missing"]
    picture.with_suffix(".away").rename(picture)


def test_a_picture_of_other_records_fails_the_check(results: Path, tmp_path: Path) -> None:
    picture = results / "figures/samples.png"
    right = picture.read_bytes()
    write_figures(fake_records(["dense"], [1]), tmp_path)
    for wrong in ((tmp_path / picture.name).read_bytes(), right[:40]):
        picture.write_bytes(wrong)
        assert report.check_report(results) == [f"{picture}: was not drawn from these records"]
    picture.write_bytes(right)


def test_no_records_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no records"):
        report.main([str(tmp_path), "--check"])
