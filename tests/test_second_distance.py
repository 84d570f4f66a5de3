"""A second distance: a column beside the first, and the claims judged by it alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_records import fake_records

from diffmoe.records import Record
from diffmoe.report.distances import distance_against_capacity, points_data
from diffmoe.report.table import results_table, second_distances
from diffmoe.report.verdicts import judge, summary_markdown, verdicts_markdown

SECOND = "FD-cifar64"


def with_second(records: list[Record], distances: dict[str, float]) -> list[Record]:
    """Return records with a second distance, a mean a row, and 1 % more each seed."""
    return [replace(record, metrics=record.metrics | {SECOND: distances[record.row] * 1.01**record.seed, "copied": 0.1})
            for record in records]


def test_it_stands_beside_the_first_where_all_records_have_it() -> None:
    records = with_second(fake_records(["dense", "diffmoe"], scale="cifar10"), {"dense": 2.0, "diffmoe": 1.0})
    header, *lines = results_table(records)
    assert header[header.index("FD-digits64") + 1] == SECOND and header.count(SECOND) == 1
    assert [line[header.index(SECOND)] for line in lines] == ["2.020 ± 0.020", "1.010 ± 0.010"]
    assert second_distances(records) == [SECOND]  # `copied` is no distance
    records[0].metrics.pop(SECOND)
    assert second_distances(records) == [] and "## By" not in verdicts_markdown(records)


def test_its_verdicts_are_its_own() -> None:
    records = with_second(fake_records(["dense", "diffmoe"], scale="cifar10"), {"dense": 1.0, "diffmoe": 1.2})
    first, second = judge(records)[0], judge(records, distance=SECOND)[0]
    assert (first.claim.text, first.verdict) == ("diffmoe < dense", "reproduced")
    assert (second.verdict, second.reason) == ("not reproduced", "the other way round")
    assert second.comparison.effect == pytest.approx(0.1823, abs=1e-4)  # ln 1.2
    page, section = verdicts_markdown(records).split(f"## By {SECOND}\n")
    assert "+20.0 %" in section and "+20.0 %" not in page


def test_the_summary_has_both_effects_and_verdicts_beside_the_papers() -> None:
    records = with_second(fake_records(["dense", "diffmoe"], scale="cifar10"), {"dense": 1.0, "diffmoe": 1.2})
    header, _, first, second, *_ = ([cell.strip() for cell in line.split("|")[1:-1]]
                                    for line in summary_markdown(records).splitlines())
    assert header == ["the paper's claim", "paper", "FD-digits64", "verdict", SECOND, "verdict"]
    effect, interval = judge(records)[0].cells(paired=False)[:2]
    assert first == ["DiffMoE (dynamic) before Dense", "-15.3 %", f"{effect} ({interval})", "reproduced",
                     "+20.0 % (+17.3 % to +22.7 %)", "not reproduced"]
    assert second[0] == "DiffMoE (dynamic) before ec-static" and second[2:] == ["-", "undecided"] * 2


def test_a_sweep_has_a_panel_of_it_where_it_was_measured_by_it() -> None:
    records = with_second(fake_records(["diffmoe"], [0]), {"diffmoe": 1.0})
    assert points_data(records)[SECOND].notna().sum() == 1  # the record's own point
    assert len(distance_against_capacity(records).axes) == 1
    records[0].threshold_sweep[:] = [point | {SECOND: point["capacity"] / 2} for point in records[0].threshold_sweep]
    points = points_data(records).dropna(subset="threshold")
    assert len(points) and list(points[SECOND]) == list(points.capacity / 2)
    panels = distance_against_capacity(records).axes
    assert [axes.get_ylabel() for axes in panels] == ["FD-digits64 (lower is better)", f"{SECOND} (lower is better)"]


def test_a_sweep_without_it_has_no_test_at_equal_capacity() -> None:
    rows = {"diffmoe": 1.0, "diffmoe-static": 1.2}
    records = with_second(fake_records(list(rows)), rows)
    assert judge(records)[-1].comparison.num_seeds == 3
    last = judge(records, distance=SECOND)[-1]
    assert last.claim.equal_capacity and last.verdict == "undecided" and last.comparison.num_seeds == 0
