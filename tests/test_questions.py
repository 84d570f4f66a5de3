"""Open questions: readings at equal cost against closed forms, answers of every kind, from made-up records."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_records import ROWS, at_budget, fake_record, fake_records
from scipy import stats

from diffmoe.cells import load_rows
from diffmoe.config import ConfigError, digest
from diffmoe.records import Record
from diffmoe.report.comparison import seeds_to_decide, smallest_gap
from diffmoe.report.cost import counted_sweep
from diffmoe.report.questions import Answer, Equal, Question, answer, load_questions
from diffmoe.report.readings import at_gflops, at_training_time, read_curve, swept_to_gflops
from diffmoe.report.table import group_rows
from diffmoe.report.verdicts import verdicts_markdown

ROOT = Path(__file__).parent.parent
PLAIN = Question(first="ec-static", second="tc")
AT_GFLOPS = Question(first="tc", second="dense", at_equal=Equal.GFLOPS)
AT_TIME = Question(first="tc", second="dense", at_equal=Equal.TRAINING_TIME)


def measured(row: str, distances: list[float], *, gflops: float = 1.0,
             images_per_second: float = 1000.0) -> list[Record]:
    """Return a row's records of given distances, one a seed."""
    return [replace(record, metrics=record.metrics | {"distance": distance},
                    activation=record.activation | {"gflops": gflops},
                    training=record.training | {"images_per_second": images_per_second})
            for seed, distance in enumerate(distances) for record in [fake_record(row, seed, scale="cifar10")]]


def answered(records: list[Record], question: Question, everything: list[Record] | None = None) -> Answer:
    [found] = answer(records, everything or records, [question])
    return found


# Readings


def test_a_curve_is_read_between_its_neighbouring_points_linear_in_the_costs_logarithm() -> None:
    curve = [(1.0, {0: 3.0, 1: 4.0}), (4.0, {1: 2.0, 0: 1.0}), (64.0, {0: 0.5})]
    assert read_curve(curve, 2.0) == pytest.approx([2.0, 3.0])  # half way from 1 to 4
    assert read_curve(curve, 32.0) == pytest.approx([1.0 + 3 / 4 * (0.5 - 1.0)])  # of the seed that both have
    assert read_curve(curve, 4.0) == pytest.approx([1.0, 2.0])


@pytest.mark.parametrize("cost, found", [(0.99, [3.0]), (0.97, []), (1.0, [3.0]), (4.07, [1.0]), (4.09, [])])
def test_beyond_a_curve_its_end_is_taken_within_two_percent(cost: float, found: list[float]) -> None:
    assert read_curve([(1.0, {0: 3.0}), (4.0, {0: 1.0})], cost) == found
    assert read_curve([], cost) == []


def test_equal_gflops_read_the_dense_sizes_at_the_routers_mean() -> None:
    rows = group_rows(measured("dense", [8.0, 9.0], gflops=1.0) + measured("dense-large", [2.0, 4.0], gflops=4.0)
                      + measured("tc", [5.0], gflops=2.0))
    ours, theirs = at_gflops(rows, "tc", "dense", "distance")
    assert np.exp(ours) == pytest.approx([5.0])
    assert np.exp(theirs) == pytest.approx([4.0, 6.0])  # sqrt(8 x 2), sqrt(9 x 4)


def test_a_sweep_is_read_at_the_others_gflops_or_at_its_end_where_that_costs_less() -> None:
    sweep = [{"capacity": capacity, "distance": 8 / capacity} for capacity in (1.0, 2.0, 4.0)]
    sweeps = [sweep[:2], sweep, [{"capacity": 1.0}]]  # the last of a time when another extractor's was not measured
    rows = group_rows([replace(record, threshold_sweep=points)
                       for record, points in zip(measured("diffmoe", [9.0] * 3), sweeps, strict=True)])
    low, middle, high = (point["gflops"] for point in counted_sweep(rows["diffmoe"][1]))
    assert low < middle < high
    between = math.sqrt(middle * high)
    rows |= group_rows(measured("dense-large", [5.0], gflops=between))
    ours, theirs = swept_to_gflops(rows, "diffmoe", "dense-large", "distance")
    assert np.exp(ours) == pytest.approx([4.0, math.sqrt(4.0 * 2.0)])  # the first seed's sweep ends below
    assert np.exp(theirs) == pytest.approx([5.0])
    cheap = rows | group_rows(measured("dense-large", [5.0], gflops=0.9 * low))
    assert swept_to_gflops(cheap, "diffmoe", "dense-large", "distance")[0] == []


def budgets_of(row: str, *, images_per_second: float, factor: float) -> list[Record]:
    """Return a row at three budgets with distance = factor x images^-0.3, a little more each seed."""
    found = []
    for record in measured(row, [1.0, 1.0, 1.0], images_per_second=images_per_second):
        for same in (at_budget(record, 8_000), at_budget(record, 32_000), record):
            distance = factor * 1.01**record.seed * same.training["images"] ** -0.3
            found.append(replace(same, metrics=same.metrics | {"distance": distance}))
    return found


def both_at_all_budgets() -> list[Record]:
    """Return Dense, and TC that is better at equal images and three times slower."""
    return budgets_of("dense", images_per_second=3000, factor=9) + budgets_of("tc", images_per_second=1000, factor=7)


@pytest.mark.parametrize("images, reached", [(8_000, True), (32_000, True), (128_000, False)])
def test_equal_training_time_reads_dense_between_its_budgets(images: int, reached: bool) -> None:
    everything = both_at_all_budgets()
    records = [record for record in everything if record.training["images"] == images]
    ours, theirs = at_training_time(group_rows(records), "tc", "dense", everything, "distance")
    assert np.exp(ours) == pytest.approx([7 * 1.01**seed * images**-0.3 for seed in range(3)])
    # dense has seen three times the images by then; a power law is a line in logarithms
    assert np.exp(theirs) == pytest.approx([9 * 1.01**seed * (3 * images) ** -0.3 for seed in range(3)] * reached)
    found = answered(records, AT_TIME, everything)
    if reached:
        assert found.comparison.effect == pytest.approx(math.log(7 / 9 * 3**0.3))
        assert found.better == "dense"  # 8 % worse at equal time, though 22 % better at equal images
    else:
        assert (found.text, found.reason, found.seeds_to_decide) == ("undecided", "not reached", None)


def test_times_of_several_kinds_of_hardware_are_not_compared() -> None:
    everything = both_at_all_budgets()
    everything[0] = replace(everything[0], environment=everything[0].environment | {"hardware": "another GPU"})
    records = [record for record in everything if record.training["images"] == 8_000]
    assert answered(records, AT_TIME, everything).reason == "several kinds of hardware"


# Answers


@pytest.mark.parametrize("first, second, better, text", [
    ([7.0, 7.1, 7.2], [8.0, 8.1, 8.2], "ec-static", "ec-static is better"),
    ([8.0, 8.1, 8.2], [7.0, 7.1, 7.2], "tc", "tc is better"),
    ([7.0, 9.0, 8.0], [8.5, 8.1, 8.2], None, "undecided"),
])
def test_a_question_is_answered_either_way_or_not(first: list[float], second: list[float], better: str | None,
                                                  text: str) -> None:
    found = answered(measured("ec-static", first) + measured("tc", second), PLAIN)
    assert (found.better, found.text) == (better, text)
    test = stats.ttest_ind(np.log(first), np.log(second), equal_var=False)
    assert found.comparison.p == found.p_adjusted == pytest.approx(test.pvalue)
    variances = np.var(np.log(first), ddof=1), np.var(np.log(second), ddof=1)
    assert found.smallest_gap == pytest.approx(smallest_gap(variances, 3, 0.05))
    assert found.seeds_to_decide == seeds_to_decide(math.log(1.05), variances, 0.05)


def test_holm_counts_the_questions_that_have_no_test() -> None:
    records = measured("ec-static", [7.0, 7.1, 7.2]) + measured("tc", [8.0, 8.1, 8.2])
    alone = answered(records, PLAIN)
    among, absent, one_seed = answer(records + measured("dense", [1.0]), records, [
        PLAIN, Question(first="diffmoe", second="expert-race"), replace(AT_GFLOPS, first="ec-static")])
    assert among.p_adjusted == pytest.approx(3 * alone.comparison.p)
    assert (absent.reason, absent.text) == ("nothing to compare", "undecided")
    assert one_seed.text == "undecided"


@pytest.mark.parametrize("gflops, reason", [(1.01, ""), (1.5, "not reached"), (0.5, "not reached")])
def test_gflops_that_no_dense_size_has_are_not_reached(gflops: float, reason: str) -> None:
    records = measured("dense", [8.0, 8.1, 8.3]) + measured("tc", [5.0, 5.1, 5.2], gflops=gflops)
    assert answered(records, AT_GFLOPS).reason == reason


def test_dynamic_against_static_is_paired_and_at_equal_capacity() -> None:
    sweep = [{"threshold": 0.5, "capacity": 0.9, "distance": 7.0}, {"threshold": 0.1, "capacity": 1.1, "distance": 6.0}]
    records = [replace(record, threshold_sweep=sweep) for record in measured("diffmoe", [1.0, 1.0, 1.0])]
    records += measured("diffmoe-static", [7.5, 7.9, 7.6])  # which measured C = 1
    question = Question(first="diffmoe", second="diffmoe-static", shares_checkpoint=True, at_equal=Equal.CAPACITY)
    found = answered(records, question)
    logs = [math.log(7 * 6) / 2 - math.log(static) for static in (7.5, 7.9, 7.6)]
    assert found.comparison.p == pytest.approx(stats.ttest_1samp(logs, 0).pvalue)
    assert found.better == "diffmoe"
    with pytest.raises(ConfigError, match="shares_checkpoint"):
        answered(records, replace(question, shares_checkpoint=False))


# The list and the page


def test_the_listed_questions_agree_with_the_rows() -> None:
    rows = {row.key: digest(row.config, scope="training")
            for row in load_rows(ROOT / "baselines/table1.yaml", ROOT / "diffmoe/configs/cifar10.yaml")}
    questions = load_questions()
    assert {question.at_equal for question in questions} == {None, *Equal}
    for question in questions:
        assert question.shares_checkpoint == (rows[question.first] == rows[question.second]), question.text


def test_the_page_answers_the_questions_except_at_digits() -> None:
    assert "Open questions" not in verdicts_markdown(fake_records())
    section = verdicts_markdown(fake_records(tuple(ROWS), scale="cifar10")).split("## Open questions")[1]
    for question in load_questions():
        assert f"| {question.text} " in section
    assert "ec-static is better" in section and "not reached" in section
