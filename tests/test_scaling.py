"""Scaling over several processes: which cases there are, their numbers, and what goes on after an interruption."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from diffmoe.bench import scaling, scaling_report
from diffmoe.bench.cases import Settings
from diffmoe.bench.record import write_bench
from diffmoe.bench.scaling_report import Measured, ScalingCase, ScalingRecord, draw, markdown, read_scaling
from diffmoe.config import ConfigError, Precision, to_dict
from diffmoe.training.distributed import ALONE

CPU = torch.device("cpu")
SETTINGS = Settings(compile=False, precision=Precision.FP32, sampling_steps=2, rounds=1, visit_seconds=0.01)
CASE = ScalingCase(work="train", size="nano-E4", system="diffmoe", processes=1, batch=8)


def result(case: ScalingCase, ms: float, images: int, **others: object) -> Measured:
    return Measured(case=case, status="ok", quartiles_ms=(ms, ms, ms), calls=5, images=images, **others)


def record(*results: Measured, peak: float | None = None) -> ScalingRecord:
    return ScalingRecord(id="scaling-0", peak_flops=peak, results=list(results),
                         environment={"commit": "0" * 40, "dirty": False, "hardware": "a card", "versions":
                                      {"torch": "2.14.1"}},
                         settings=to_dict(SETTINGS) | {"sampled": 100, "cards": 8})


def test_the_cases_compare_each_number_of_gpus_with_one() -> None:
    cases = scaling.list_cases(["L/dense", "L-E16/diffmoe"], [8, 1], "cuda", ["train", "sample"])
    assert [case.processes for case in cases] == [1] * 4 + [8] * (5 + 9 + 2)
    dense = [case for case in cases if case.system == "dense" and case.work == "train" and case.processes == 8]
    assert {(case.scaling, case.parallel, case.pool_scope, case.batch) for case in dense} == {
        ("weak", "apart", "", 1024),
        ("weak", "ddp", "", 1024), ("weak", "fsdp", "", 1024), ("strong", "ddp", "", 128), ("strong", "fsdp", "", 128)}
    scopes = {(case.scaling, case.parallel, case.pool_scope) for case in cases if case.pool_scope}
    assert {case.scaling for case in cases if case.work == "sample" and case.processes == 8} == {"weak"}
    assert len(scopes) == 8 and {scope for *_, scope in scopes} == {"process", "global"}


@pytest.mark.parametrize("scope, pool", [("process", 8), ("global", None)])
def test_a_pool_is_a_process_or_all_of_them(scope: str, pool: int | None) -> None:
    case = dataclasses.replace(CASE, processes=2, batch=16, scaling="weak", parallel="fsdp", pool_scope=scope)
    config = scaling.configure(case, SETTINGS)
    assert (config.model.moe.pool_scope, config.model.moe.router.pool_images) == (scope, pool)
    assert (config.training.batch_size, config.runtime.parallel) == (16, "fsdp")


@pytest.mark.parametrize("runs, gpus", [(["L-E16"], [1]), (["L/dense"], [3])])
def test_what_cannot_be_run_is_said(runs: list[str], gpus: list[int]) -> None:
    with pytest.raises(ConfigError, match="SIZE/SYSTEM|divided"):
        scaling.list_cases(runs, gpus, "cuda", ["train"])


def test_efficiency_and_mfu_are_those_of_a_process() -> None:
    two = dataclasses.replace(CASE, processes=2, batch=16, scaling="weak", parallel="ddp", pool_scope="process")
    lone, pair = result(CASE, 10.0, 8), result(two, 12.5, 16, flops_per_image=1e6)
    apart = result(dataclasses.replace(two, parallel="apart", pool_scope=""), 10.5, 16)
    strong = result(dataclasses.replace(two, scaling="strong", batch=8), 8.0, 8)
    found = record(lone, apart, pair, strong, peak=1e10)
    assert found.efficiency(pair) == pytest.approx(0.8)  # 1,280 images/s of two, 800 of one
    assert found.mfu(pair) == pytest.approx(1e6 * 640 / 1e10)
    assert record(pair).efficiency(pair) is None
    assert found.of_apart(pair) == pytest.approx(10.5 / 12.5)
    assert all(found.of_apart(other) is None for other in (lone, apart, strong)) and record(pair).of_apart(pair) is None
    assert found.cells(pair)[-4:-1] == ["80.0%", "84.0%", "6.4%"] and found.cells(lone)[-4] == "-"


@pytest.mark.parametrize("work, images", [("train", 8), ("sample", 6)])
def test_one_process_measures_its_case(work: str, images: int) -> None:
    found = scaling.measure(dataclasses.replace(CASE, work=work, batch=8 if work == "train" else 2), SETTINGS, 6, CPU,
                            ALONE)
    low, middle, high = found.quartiles_ms
    assert found.status == "ok" and 0 < low <= middle <= high and found.images == images
    assert found.calls == (1 if work == "sample" else 5) and found.flops_per_image > 0 and found.peak_bytes > 0


@pytest.mark.parametrize("how", [{"scaling": "strong", "parallel": "ddp", "pool_scope": "process"},
                                 {"scaling": "weak", "parallel": "apart", "batch": 16}])
def test_two_processes_measure_their_case(how: dict[str, object], tmp_path: Path) -> None:
    case = dataclasses.replace(CASE, processes=2, **how)
    found = scaling.run_case(case, SETTINGS, 6, "cpu", tmp_path, 240)
    assert found.case == case and found.status == "ok", found.message
    assert found.images == case.batch and found.calls >= 5


def test_apart_each_trains_what_one_alone_does() -> None:
    apart = dataclasses.replace(CASE, processes=2, batch=16, scaling="weak", parallel="apart")
    assert scaling.configure(apart, SETTINGS) == scaling.configure(CASE, SETTINGS)


def test_why_a_case_failed_is_in_its_result(tmp_path: Path) -> None:
    found = scaling.run_case(dataclasses.replace(CASE, size="none"), SETTINGS, 6, "cpu", tmp_path, 240)
    assert found.status == "error" and found.message.startswith("error: ") and "none" in found.message
    assert scaling.run_case(CASE, SETTINGS, 6, "cpu", tmp_path, 0.1).status == "skipped"


def test_the_same_command_goes_on_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run_case(case: ScalingCase, *_: object) -> Measured:
        ran.append(case.name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return result(case, 10.0, case.batch)

    monkeypatch.setattr(scaling, "run_case", run_case)
    command = ["--device", "cpu", "--gpus", "1,2", "--runs", "nano/dense", "--work", "train", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        scaling.main(command)
    assert scaling.main(command) == 0
    assert len(ran) == 1 + 6 and ran[1] == ran[2]  # the interrupted one again, the first one not
    (path,) = tmp_path.glob("scaling-*.json")
    assert [found.case.name for found in read_scaling(path).results] == [ran[0], *ran[2:]]
    assert scaling_report.main([str(tmp_path), "--check"]) == 0
    (tmp_path / "scaling.md").write_text("another")
    assert scaling_report.main([str(tmp_path), "--check"]) == 1


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = record(result(CASE, 10.0, 8), Measured(case=CASE, status="out of memory"), peak=1.0)
    assert read_scaling(write_bench(tmp_path, written)) == written
    assert "| out of memory" in markdown([written])
    (tmp_path / "scaling-0.json").write_text(json.dumps({"schema": 0}))
    with pytest.raises(ConfigError, match="not a record"):
        read_scaling(tmp_path / "scaling-0.json")


def test_the_figure_draws_each_way_alike_in_all_panels_and_no_two_alike() -> None:
    cases = scaling.list_cases(["L/dense", "L-E16/diffmoe"], [1, 2], "cuda", ["train", "sample"])
    results = [result(case, 10.0, case.batch) for case in cases]
    figure = draw([record(*results), record(*results[:1], *results[-4:])])
    seen: dict[str, set[object]] = {}
    for axes in figure.axes:
        drawn = [line for line in axes.get_lines() if "/" in str(line.get_label())]
        looks = [(line.get_color(), line.get_marker(), str(line._dash_pattern)) for line in drawn]
        assert len(set(looks)) == len(drawn) > 0
        for line, look in zip(drawn, looks, strict=True):
            seen.setdefault(str(line.get_label()), set()).add(look)
    assert len(seen) == 2 + (1 + 2) + (1 + 4) and all(len(looks) == 1 for looks in seen.values())
