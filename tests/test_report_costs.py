"""Distance against costs: what a swept threshold costs, the wall-clock of a training, the floor of the training set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from fake_records import fake_record, fake_records
from matplotlib.figure import Figure

from diffmoe.records import Record, read_records
from diffmoe.report.cost import cost_markdown, training_minutes
from diffmoe.report.distances import (
    cost_data,
    distance_against_capacity,
    distance_against_cost,
    distance_against_parameters,
)
from diffmoe.report.style import FLOOR
from diffmoe.report.table import table_markdown

DIGITS = Path(__file__).parent.parent / "results/digits/records"


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def with_floor(floor: float) -> list[Record]:
    """Return records of some rows with the floor of their distance and of another."""
    return [replace(record, evaluation=record.evaluation | {"floor": {"FD-digits64": floor, "FD-cifar64": 0.25}})
            for record in fake_records(["dense", "diffmoe"], [0, 1])]


def floor_labels(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts if text.get_text() == FLOOR]


def test_a_swept_threshold_costs_what_a_record_of_its_capacity_costs() -> None:
    record = next(record for record in read_records(DIGITS) if record.row == "diffmoe")
    point = {"threshold": 0.5, "capacity": record.activation["capacity"], "activated_params": 1.0, "distance": 1.0}
    own, swept = cost_data([replace(record, threshold_sweep=[point])]).to_dict("records")
    for cost in ("activated_params_strict", "gflops"):
        assert own[cost] == record.activation[cost]
        assert swept[cost] == pytest.approx(own[cost], rel=1e-12)


def test_what_a_sweep_recorded_is_taken_as_it_is() -> None:
    point = {"threshold": 0.5, "capacity": 1.0, "activated_params": 1.0, "distance": 1.0,
             "activated_params_strict": 7.0, "gflops": 5.0}
    swept = cost_data([replace(fake_record("diffmoe", 0), threshold_sweep=[point])]).iloc[1]
    assert (swept.activated_params_strict, swept.gflops) == (7.0, 5.0)


def test_wall_clock_is_images_by_the_median_throughput_and_of_old_records_all_their_seconds() -> None:
    record = fake_record("dense", 0)  # 128,000 images in 61 s
    assert training_minutes(record) == pytest.approx(61 / 60)
    faster = replace(record, training=record.training | {"images_per_second": 4000.0})
    assert training_minutes(faster) == pytest.approx(128_000 / 4000 / 60)
    assert "4,000" in cost_markdown([faster]) and "median" in cost_markdown([faster])
    assert "median" not in cost_markdown([record])


@pytest.mark.parametrize("draw", [distance_against_parameters, distance_against_capacity, distance_against_cost])
def test_the_floor_is_drawn_where_it_is_in_view_and_never_moves_the_view(draw) -> None:
    views = [draw(fake_records(["dense", "diffmoe"], [0, 1])).axes[0].get_ylim()]
    for floor, labels in ((8.0, [FLOOR]), (1.0, []), (30.0, [])):
        figure = draw(with_floor(floor))
        assert floor_labels(figure) == labels
        views.append(figure.axes[0].get_ylim())
    assert len(set(views)) == 1


def test_the_table_states_the_floors_that_the_records_have() -> None:
    assert "floor, as many of its images measured in place of samples: FD-digits64 3.25, FD-cifar64 0.25." in \
        table_markdown(with_floor(3.25))
    assert "floor" not in table_markdown(fake_records(["dense"], [0]))


@pytest.mark.parametrize("hardware, training, sampling, wanted", [
    ("a card", {}, {}, "a card"), ("a card", {"processes": 8}, {"processes": 8}, "8 x a card"),
    ("a card", {"processes": 8}, {}, "8 x a card"), ("2 CPU cores", {"processes": 2}, {}, "2 CPU cores, 1 thread")])
def test_the_cost_of_several_cards_says_how_many(hardware: str, training: dict[str, int], sampling: dict[str, int],
                                                 wanted: str) -> None:
    record = fake_record("dense", 0)
    record = replace(record, environment=record.environment | {"hardware": hardware, "threads": 1},
                     training=record.training | training, sampling=record.sampling | sampling)
    assert f"| {wanted.ljust(len('hardware'))} |" in cost_markdown([record]).splitlines()[2]
