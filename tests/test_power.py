"""What the seeds can show: spreads and pooled gaps against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from fake_records import fake_records

from diffmoe.records import Record
from diffmoe.report.comparison import smallest_gap
from diffmoe.report.power import pooled_variance, power_markdown, row_variances
from diffmoe.report.table import results_table
from diffmoe.report.verdicts import verdicts_markdown


def with_logs(row: str, logs: list[float]) -> list[Record]:
    """Return a row's records of given log distances, one a seed."""
    return [replace(record, metrics=record.metrics | {"distance": math.exp(value)})
            for value, record in zip(logs, fake_records([row], range(len(logs)), scale="cifar10"), strict=True)]


def test_the_pooled_variance_weighs_rows_by_their_degrees_of_freedom() -> None:
    records = with_logs("dense", [2.0, 2.02]) + with_logs("tc", [2.0, 2.03, 2.06]) + with_logs("diffmoe", [1.0])
    rows = row_variances(records)
    assert rows == {"tc": (3, pytest.approx(0.0009)), "dense": (2, pytest.approx(0.0002)), "diffmoe": (1, None)}
    assert pooled_variance(list(rows.values())) == pytest.approx((2 * 0.0009 + 0.0002) / 3)


def test_the_page_states_each_spread_and_the_pooled_gaps() -> None:
    records = with_logs("dense", [2.0, 2.02]) + with_logs("tc", [2.0, 2.03, 2.06]) + with_logs("diffmoe", [1.0])
    text = power_markdown(records)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:2] == "| "]
    assert lines[1:4] == [["tc", "3", "3 %"], ["dense", "2", "1.41 %"], ["diffmoe", "1", "-"]]
    variance = (2 * 0.0009 + 0.0002) / 3
    assert f"Pooled over the rows: {100 * math.sqrt(variance):.3g} %." in text
    assert lines[4:] == [["seeds a row", "2", "3", "5", "10"], ["smallest gap", *(
        f"{100 * math.expm1(smallest_gap((variance, variance), seeds, 0.05)):.3g} %" for seeds in (2, 3, 5, 10))]]


def test_the_error_of_sampling_stands_beside_the_spread_where_records_have_it() -> None:
    records = with_logs("dense", [2.0, 2.02, 2.04]) + with_logs("tc", [2.0, 2.03])
    assert "sampling error" not in power_markdown(records)
    for record, share in zip(records, [0.01, 0.02], strict=False):  # of the first two
        record.metrics["distance_se"] = share * record.metrics["distance"]
    assert "distance se" not in results_table(records)[0]  # this page has it
    text = power_markdown(records)
    assert text.count("Sampling error:") == 1 and "Pooled over the rows" in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:2] == "| "]
    assert [line[3] for line in lines[:3]] == ["sampling error", "-", f"{100 * math.sqrt(2.5e-4):.3g} %"]


def test_a_pooled_gap_of_many_seeds_is_the_normal_approximation() -> None:
    # (z_.975 + z_.8) sqrt(2 / n) sd
    assert smallest_gap((0.02**2,) * 2, 500, 0.05) == pytest.approx((1.95996 + 0.84162) * math.sqrt(2 / 500) * 0.02,
                                                                    rel=0.002)


def test_one_seed_tells_nothing_of_the_spread_and_digits_has_no_such_section() -> None:
    text = power_markdown(with_logs("dense", [2.0]) + with_logs("tc", [2.1]))
    assert "smallest gap" not in text and "| -" in text
    heading = "What these seeds can show"
    assert heading in verdicts_markdown(fake_records(scale="cifar10"))
    assert heading not in verdicts_markdown(fake_records())


def test_pooling_recovers_the_spread_that_the_records_were_drawn_with() -> None:
    generator = np.random.default_rng(0)
    records = [record for row in ("dense", "tc", "ec-static")
               for record in with_logs(row, (2 + 0.02 * generator.normal(size=200)).tolist())]
    assert math.sqrt(pooled_variance(list(row_variances(records).values()))) == pytest.approx(0.02, rel=0.07)
