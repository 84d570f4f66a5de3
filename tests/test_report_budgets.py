"""Budgets: a report each, a page across them, and nothing left of a budget whose records are gone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import one_line
from fake_records import at_budget, fake_records

from diffmoe.config import ConfigError
from diffmoe.records import Record, write_record
from diffmoe.report import __main__ as report
from diffmoe.report.budgets import budgets_data, budgets_markdown, by_budget
from diffmoe.report.table import mean_sd

SMALL, MIDDLE, WHOLE = 7_936, 32_000, 128_000


def mixed_records(rows: tuple[str, ...] = ("dense", "diffmoe"), seeds: tuple[int, ...] = (0, 1)) -> list[Record]:
    """Return the records of some rows at three budgets."""
    whole = fake_records(rows, seeds, scale="cifar10")
    return [at_budget(record, budget) for budget in (SMALL, MIDDLE) for record in whole] + whole


def lines_of(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line[:2] == "| "]


def test_budgets_are_told_apart_by_their_steps_smallest_first() -> None:
    found = by_budget(mixed_records()[::-1])
    assert {name: {record.training["images"] for record in same} for name, same in found.items()} == {
        "62-steps": {SMALL}, "250-steps": {MIDDLE}, "1000-steps": {WHOLE}}
    assert list(found) == ["62-steps", "250-steps", "1000-steps"]


def test_one_budget_is_one_report_whether_or_not_it_is_the_whole_run() -> None:
    whole = fake_records(["dense", "tc"], [0])
    for records in (whole, [at_budget(record, SMALL) for record in whole]):
        assert by_budget(records) == {"": records}


def test_rows_of_other_batch_sizes_share_a_budget_by_images() -> None:
    records = mixed_records()
    records[0] = replace(records[0], training=records[0].training | {"steps": 31})
    assert list(by_budget(records)) == ["7936-images", "250-steps", "1000-steps"]


def with_training(record: Record, digest: str, **settings: object) -> Record:
    """Return the record of another training, of these settings."""
    config = record.config | {"training": record.config["training"] | settings}
    return replace(record, config=config, config_digest=digest, training_digest=digest)


def test_a_row_trained_otherwise_or_measured_differently_is_refused() -> None:
    records = mixed_records()
    with pytest.raises(ConfigError, match=f"budgets of two trainings.*{records[-1].id}") as error:
        by_budget([*records[:-1], with_training(records[-1], "other", learning_rate=1.0)])
    assert "other" in one_line(error.value)
    with pytest.raises(ConfigError, match="mixed sample counts"):
        by_budget([*records[:-1], replace(records[-1], sampling={"num_samples": 500, "seconds": 1.0})])


def test_a_longer_run_of_a_rows_settings_is_one_more_budget_and_says_what_became_of_the_trend() -> None:
    records = mixed_records(("dense",))
    longer = [replace(with_training(record, "longer", num_images=4 * WHOLE, budgets=[]), training=record.training | {
        "steps": 4000, "images": 4 * WHOLE}, metrics=record.metrics | {"distance": 5.0}) for record in records[-2:]]
    assert list(by_budget([*records, *longer])) == ["62-steps", "250-steps", "1000-steps", "4000-steps"]
    assert list(by_budget([*records[-2:], *longer])) == ["1000-steps", "4000-steps"]
    page = budgets_markdown([*records, *longer])
    assert "Those of 4,000 steps are trainings of their own." in page
    trends = [line for line in lines_of(page) if line[0] == "Dense"][1:]
    assert [line[3:] for line in trends] == [[], ["5 (2)"], []]  # foretold from 250 and 1,000 steps; no others were run


def test_a_row_whose_budgets_are_of_two_trainings_is_named() -> None:
    records = mixed_records()
    assert "Except" not in budgets_markdown(records)
    step, losses = records[0].training["losses"][0]
    again = [[step, losses | {"mse": losses["mse"] * (1 + 1e-7)}], *records[0].training["losses"][1:]]
    records[0] = replace(records[0], training=records[0].training | {"losses": again})
    assert "Except for seed 0 of Dense: trained again" in budgets_markdown(records)


def test_the_trend_is_that_of_each_seed_between_two_budgets() -> None:
    lines = {line[0]: line[1:] for line in lines_of(budgets_markdown(mixed_records(seeds=(0, 1)))) if len(line) == 3}
    assert lines["system"] == ["exponent, 250 to 1,000 steps", "4,000 steps, if straight"]
    whole = [record.metrics["distance"] for record in fake_records(["dense"], (0, 1), scale="cifar10")]
    share = MIDDLE / WHOLE  # fake distances are a power of the budget
    assert lines["Dense"] == [f"{mean_sd([-0.3, -0.3])} (2)", f"{mean_sd([d * share**0.3 for d in whole])} (2)"]


def test_the_page_across_has_a_line_a_row_and_a_column_a_budget() -> None:
    records = [record for record in mixed_records() if not (record.row == "diffmoe" and record.training["steps"] == 62)]
    for index, record in enumerate(records):
        distance = {"dense": 9.0, "diffmoe": 8.0}[record.row] + record.seed
        records[index] = replace(record, metrics=record.metrics | {"distance": distance})
    table, costs = lines_of(budgets_markdown(records))[:3], lines_of(budgets_markdown(records))[3:7]
    assert table == [["system", "62 steps", "250 steps", "1,000 steps"],
                     ["Dense", *["9.50 ± 0.71 (2)"] * 3], ["DiffMoE (dynamic)", "-", *["8.50 ± 0.71 (2)"] * 2]]
    assert [line[:4] for line in costs[1:]] == [["62 steps", "[62-steps](62-steps/table.md)", "7,936", "2"],
                                                ["250 steps", "[250-steps](250-steps/table.md)", "32,000", "4"],
                                                ["1,000 steps", "[1000-steps](1000-steps/table.md)", "128,000", "4"]]
    # two rows, seeds of 61 and 62 s to the end: 246 s at 1,000 steps, a quarter at 250; Dense alone at 62
    assert [line[costs[0].index("training, min")] for line in costs[1:]] == ["0.1", "1.0", "4.1"]
    # each training once: 246 s; 10 records of 12 + 3 s; sweeps of 2 budgets x 2 seeds x 8 x 9 s
    assert f"{(246 + 150 + 288) / 60:.1f} minutes" in budgets_markdown(records)


def test_the_figures_data_are_the_records() -> None:
    records = mixed_records()
    found = {(line.row, line.images, line.seed): line.distance for line in budgets_data(records).itertuples()}
    assert found == {(record.row, record.training["images"], record.seed): record.metrics["distance"]
                     for record in records}
    other = [replace(record, row=f"{record.row}-other") for record in records]
    assert set(budgets_data([*records, *other]).row) == {record.row for record in records}  # those of claims
    assert set(budgets_data(other).row) == {record.row for record in other}


def test_a_folder_of_budgets_has_a_report_each_and_keeps_nothing_of_budgets_that_are_gone(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], few_figures: None) -> None:
    records = mixed_records(("dense", "diffmoe"), (0,))
    whole = [record for record in records if record.training["images"] == WHOLE]
    for record in whole:
        write_record(tmp_path / "records", record)
    assert report.main([str(tmp_path)]) == 0
    alone = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for record in records:
        write_record(tmp_path / "records", record)
    capsys.readouterr()
    assert report.main([str(tmp_path), "--check"]) == 1
    assert f"{tmp_path / 'table.md'}: the records have no data for it" in capsys.readouterr().err
    assert report.main([str(tmp_path)]) == 0
    assert report.check_report(tmp_path) == []
    assert {path.name for path in tmp_path.iterdir()} == {"records", "budgets.md", "figures", "62-steps", "250-steps",
                                                          "1000-steps"}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"distance_vs_budget.csv",
                                                                        "distance_vs_budget.png"}
    for path, content in alone.items():  # the whole run's report is what it was alone
        if path.parts[0] != "records":
            assert (tmp_path / "1000-steps" / path).read_bytes() == content, path
    kept = tmp_path / "250-steps/notes.txt"
    kept.write_text("a reader's own")
    for record in records:
        if record.training["images"] != WHOLE:
            (tmp_path / f"records/{record.id}.json").unlink()
    assert any("62-steps" in line for line in report.check_report(tmp_path))
    assert report.main([str(tmp_path)]) == 0
    kept.unlink()
    (tmp_path / "250-steps").rmdir()
    assert {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == alone
