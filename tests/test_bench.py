"""The bench: cases, clock, runner, reference adapter, record and report, all tiny and on the CPU."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import one_line

from diffmoe.bench import capacity, parts, runner, startup, timing
from diffmoe.bench.__main__ import main
from diffmoe.bench.cases import LARGEST, Case, Settings, list_groups, run_config, split_size
from diffmoe.bench.gaps import PartLine, find_gaps, gaps_markdown
from diffmoe.bench.parts import (
    attention_costs,
    feed_forward_costs,
    list_parts,
    routing_costs,
    time_call_parts,
    time_parts,
)
from diffmoe.bench.record import BenchRecord, Result, peak_of, read_benches, record_id, write_bench
from diffmoe.bench.reference import Reference, ReferenceSubject, group_of_one
from diffmoe.bench.report import check_bench_report, table_markdown, write_bench_report
from diffmoe.bench.runner import Options, Runner
from diffmoe.bench.subjects import OURS, Forward, Sampling, Shared, Training
from diffmoe.bench.targets import Target, judge, read_targets
from diffmoe.config import ConfigError, Precision
from diffmoe.evaluation.sampling import sample_images
from diffmoe.models.counting import flops_per_call
from diffmoe.records import environment

CPU = torch.device("cpu")
SETTINGS = Settings(compile=False, precision=Precision.FP32, sampling_steps=2, rounds=2, visit_seconds=0.001)
PUBLISHED = Path(__file__).parents[1] / "results" / "digits" / "records"


def case(system: str = "diffmoe", work: str = "train", batch: int = 2, **changes: str) -> Case:
    """Return a case that a CPU does in milliseconds."""
    return Case(**{"workload": "cifar10", "size": "nano-E4", "system": system, "work": work, "batch": batch} | changes)


def empty_record(**changes: object) -> BenchRecord:
    """Return a record without results, with ceilings."""
    return BenchRecord(**{"id": "bench-test", "started": "2030-01-01T00:00:00Z", "environment": environment(CPU),
                          "settings": dataclasses.asdict(SETTINGS) | {"largest": False}, "peak_flops": 1e12,
                          "ceilings": {"matmul_flops": 1e12, "copy_bytes": 1e11}} | changes)


def result(ms: float = 10.0, parts: tuple = (), **changes: str | int) -> Result:
    """Return a result with four equal samples of a case."""
    return Result(case=case(**changes), status="ok", flops_per_image=1e9, samples_ms=[[ms] * 2] * 2, parts=list(parts))


@dataclasses.dataclass
class FakeSubject:
    """Notes its calls."""

    name: str
    log: list[str]

    def call(self) -> None:
        self.log.append(self.name)

    def scope(self) -> nullcontext:
        return nullcontext()

    def facts(self) -> dict[str, float]:
        return {"capacity": 1.0, "flops_per_image": 1.0}


def fake_run(cases: list[Case], make: Callable, **changes: object) -> BenchRecord:
    """Run a group of cases whose subjects `make` returns."""
    record = empty_record()
    options = Options(**{"say": lambda line: None} | changes)
    Runner(record, SETTINGS, CPU, make, options).run([cases])
    return record


def test_sizes_name_their_experts() -> None:
    assert split_size("S") == ("S", 16)
    assert split_size("L-E8") == ("L", 8)
    with pytest.raises(ConfigError, match="size Q-E2"):
        split_size("Q-E2")


@pytest.mark.parametrize("system", ["dense", "diffmoe", "token_choice", "expert_choice", "expert_race"])
@pytest.mark.parametrize("workload", ["cifar10", "latent"])
def test_each_system_has_the_runs_of_both_workloads(workload: str, system: str) -> None:
    config = run_config(case(system, workload=workload, size="L-E8"), SETTINGS)
    assert config.model.hidden_size == 1024 and config.model.num_tokens == {"cifar10": 64, "latent": 256}[workload]
    assert (config.model.moe is None) == (system == "dense")
    assert config.model.moe is None or config.model.moe.num_experts == 8


def test_unknown_names_are_one_line_that_says_what_there_is() -> None:
    for changes in ({"workload": "mnist"}, {"system": "nothing"}):
        with pytest.raises(ConfigError) as caught:
            run_config(case(**changes), SETTINGS)
        assert "use" in one_line(caught.value)


def test_groups_hold_what_is_compared_in_the_order_asked_for() -> None:
    groups = list_groups("latent", ["S", "L-E8"], ["dense", "diffmoe"], ["train", "sample"], [], ["balanced", "skewed"],
                         [("diffmoe", "reference-tf32")], SETTINGS)
    assert [(group[0].size, group[0].work, group[0].batch) for group in groups] == [
        ("S-E16", "train", 256), ("S-E16", "sample", 256), ("L-E8", "train", 128), ("L-E8", "sample", 128)]
    assert [(one.system, one.load, one.implementation) for one in groups[1]] == [
        ("dense", "", "ours"), ("diffmoe", "balanced", "ours"), ("diffmoe", "skewed", "ours"),
        ("diffmoe", "balanced", "reference-tf32"), ("diffmoe", "skewed", "reference-tf32")]


def test_a_visit_warms_up_and_has_three_calls_or_one_that_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds_a_call, visit, expected in ((0.001, 0.01, 10), (0.4, 1.0, 3), (2.0, 1.0, 1), (1e-9, 1.0, 50)):
        clock = iter(range(10**6))
        monkeypatch.setattr(timing.time, "perf_counter", lambda c=clock, s=seconds_a_call: next(c) * s)
        calls: list[None] = []
        samples = timing.time_visit(lambda calls=calls: calls.append(None), visit, CPU)
        assert len(samples) == expected == len(calls) - 1
        assert samples[0] == pytest.approx(1e3 * seconds_a_call)


def test_quartiles() -> None:
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert timing.spread([7.0]) == (7.0, 7.0, 7.0)


def test_ceilings_are_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MATMUL_SIDE", {"cpu": 32})
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 4096})
    assert timing.measure_matmul(CPU) > 0 and timing.measure_copy(CPU) > 0
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12 and peak_of("2 CPU cores") is None


@pytest.fixture
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the machine's ceilings unmeasured."""
    monkeypatch.setattr(runner, "measure_matmul", lambda device: 1.0)


def test_cases_that_stand_together_take_turns(quick_probe: None) -> None:
    log: list[str] = []
    fake_run([case("dense"), case("diffmoe")], lambda one, config: FakeSubject(one.system, log))
    order = [name for index, name in enumerate(log) if index == 0 or log[index - 1] != name]
    assert order == ["dense", "diffmoe", "dense", "diffmoe"]


def test_what_does_not_fit_beside_the_others_is_timed_in_the_next_wave(quick_probe: None) -> None:
    standing: list[str] = []

    def make(one: Case, config: object) -> FakeSubject:
        if one.system == "diffmoe" and standing:
            standing.clear()  # freed between waves
            raise torch.OutOfMemoryError("CUDA out of memory")
        standing.append(one.system)
        return FakeSubject(one.system, [])

    record = fake_run([case("dense"), case("diffmoe"), case("token_choice")], make)
    assert [(one.case.system, one.status, one.wave) for one in record.results] == [
        ("dense", "ok", 1), ("diffmoe", "ok", 2), ("token_choice", "ok", 2)]
    assert len(record.probes) == 2


def test_a_case_that_fails_is_recorded_and_the_rest_goes_on(quick_probe: None) -> None:
    errors = {"dense": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
              "diffmoe": ValueError("broken\nin two lines")}

    def make(one: Case, config: object) -> FakeSubject:
        if one.system in errors:
            raise errors[one.system]
        return FakeSubject(one.system, [])

    saved: list[int] = []
    record = fake_run([case("dense"), case("diffmoe"), case("token_choice")], make, save=lambda: saved.append(1))
    assert [(one.status, one.message) for one in record.results] == [
        ("out of memory", "out of memory"), ("error", "ValueError: broken in two lines"), ("ok", "")]
    assert len(saved) >= 4


def test_after_the_deadline_cases_are_recorded_as_skipped(quick_probe: None) -> None:
    record = fake_run([case("dense"), case("diffmoe")], lambda *_: FakeSubject("", []), deadline=-math.inf)
    assert [one.status for one in record.results] == ["skipped", "skipped"]


def test_the_largest_batch_is_doubled_by_memory_and_halved_when_that_was_too_much(
        quick_probe: None, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    monkeypatch.setattr(runner, "available_memory", lambda device: 5.0e9)
    monkeypatch.setattr(timing.MemoryMeter, "peak", lambda self: (0, built[-1] * 10**6))

    def make(one: Case, config: object) -> FakeSubject:
        built.append(one.batch)
        if one.batch > 2048:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return FakeSubject("", [])

    record = fake_run([case("dense", batch=LARGEST)], make)
    assert built == [512, 4096, 2048]
    assert [(one.case.batch, one.status) for one in record.results] == [(2048, "ok")]
    monkeypatch.setattr(runner, "available_memory", lambda device: 0.0)
    built.clear()
    runner_record = fake_run([case("dense", batch=LARGEST)], lambda one, config: built.append(one.batch) or (
        FakeSubject("", []) if one.batch <= 128 else (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))))
    assert built == [512, 256, 128, 128] and runner_record.results[0].case.batch == 128


@pytest.mark.parametrize("work", ["train", "sample", "forward"])
@pytest.mark.parametrize("system", ["dense", "diffmoe", "token_choice", "expert_choice"])
def test_each_system_is_timed_at_each_work(quick_probe: None, system: str, work: str) -> None:
    load = "balanced" if system == "diffmoe" and work != "train" else ""
    shared = Shared(CPU)
    record = fake_run([case(system, work, load=load)], lambda one, config: OURS[one.work](one, config, shared))
    found = record.results[0]
    assert found.status == "ok", found.message
    model = run_config(found.case, SETTINGS).model
    factor = {"train": 3, "sample": SETTINGS.sampling_steps, "forward": 1}[work]
    assert found.flops_per_image == pytest.approx(factor * flops_per_call(model, found.capacity))
    assert len(found.samples_ms) == SETTINGS.rounds and found.images_per_second > 0


def test_calibrated_thresholds_give_capacity_one_and_the_load_asked_for() -> None:
    config = run_config(case(work="sample", batch=16), SETTINGS)
    model = capacity.drawn_model(config.model, CPU).eval()
    record = next(PUBLISHED.glob("diffmoe-1*-s0-*.json"))
    for load in ("balanced", "skewed"):
        rates_LE = capacity.expert_rates(config.model, load, record)
        assert rates_LE.shape == (2, 4) and torch.allclose(rates_LE.sum(1), torch.ones(2))
        capacity.calibrate(model, config, rates_LE)
        samples = sample_images(model, config, range(16))
        assert samples.capacity.mean().item() == pytest.approx(1, abs=0.01)
        assert (samples.expert_load.mean(0) - rates_LE).abs().max() < 0.005
    with pytest.raises(ConfigError, match="expert-load"):
        capacity.expert_rates(config.model, "skewed", None)


def test_a_step_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "VISIT_SECONDS", 0.001)
    config = run_config(case("diffmoe"), SETTINGS)
    lines = {line["name"]: line for line in time_parts(Training(case("diffmoe"), config, Shared(CPU)).trainer)}
    assert not [line for line in lines.values() if "error" in line]
    assert set(lines) == {"optimiser", "average", "data", "embeddings, final layer", "attention",
                          "norms, modulation, residual", "dense feed-forward", "routing", "expert products",
                          "forward and backward"}
    assert all(line["ms"] > 0 for line in lines.values())


def test_what_cannot_be_taken_apart_costs_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no such part")

    monkeypatch.setattr(runner, "time_parts", fail)
    said: list[str] = []
    record = fake_run([case("dense"), case("diffmoe")], lambda each, config: Training(each, config, Shared(CPU)),
                      parts="all", say=said.append)
    assert all(result.status == "ok" and result.samples_ms and not result.parts for result in record.results)
    assert [line.endswith("not taken apart: ValueError: no such part") for line in said].count(True) == 2


@pytest.mark.parametrize("kind", [Training, Forward])
def test_the_compiler_leaves_nothing_of_a_part_out(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "VISIT_SECONDS", 0.001)
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: plain(function, backend="eager", **how))
    settings = dataclasses.replace(SETTINGS, compile=True)
    subject = kind(case("diffmoe"), run_config(case("diffmoe"), settings), Shared(CPU))

    def time_routing() -> dict[str, object]:
        (line,) = (time_parts(subject.trainer, only="routing") if kind is Training else
                   time_call_parts(subject.model, subject.config, 2, subject.calls, only="routing"))
        return line

    assert time_routing()["how"] == "compiled"
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *inputs: function(*inputs) if inputs else [])
    assert "not all of it" in time_routing()["error"]


@pytest.mark.parametrize("system", ["dense", "diffmoe", "token_choice"])
def test_parts_add_up_to_the_operations_of_a_step(system: str) -> None:
    config = run_config(case(system), SETTINGS)
    found = list_parts(Training(case(system), config, Shared(CPU)).trainer)
    counted = sum(part.count * part.flops for part in found if part.name not in ("optimiser", "average", "data"))
    assert counted == pytest.approx(3 * 2 * flops_per_call(config.model, 1.0), rel=0.02)


@pytest.mark.parametrize("kind, calls", [(Forward, 1), (Sampling, 2)])
def test_a_call_at_inference_is_taken_apart(kind: type, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "VISIT_SECONDS", 0.001)
    config = run_config(case("diffmoe"), SETTINGS)
    subject = kind(case("diffmoe"), config, Shared(CPU))
    for layer in subject.model.moe_layers().values():
        layer.router.threshold.copy_(torch.tensor([-1.0, 2.0, 2.0, 2.0]))  # the first expert takes every token
    lines = {line["name"]: line for line in time_call_parts(subject.model, config, 2, subject.calls)}
    assert not [line for line in lines.values() if "error" in line] and all(line["ms"] > 0 for line in lines.values())
    assert {name: line["count"] for name, line in lines.items()} == {name: calls * count for name, count in {
        "embeddings, final layer": 1, "attention": 4, "norms, modulation, residual": 4, "dense feed-forward": 2,
        "routing": 2, "expert products": 2, "network call": 1}.items()}
    counted = sum(line["count"] * line["flops"] for line in lines.values())
    assert counted == pytest.approx(calls * 2 * flops_per_call(config.model, 1.0), rel=0.02)


def test_costs_in_closed_form() -> None:
    model = run_config(case("diffmoe"), SETTINGS).model  # D 48, F 192, T 64, batch 2: S 128
    assert attention_costs(model, 2)[0] == 3 * (128 * 8 * 48**2 + 128 * 4 * 64 * 48)
    assert feed_forward_costs(48, 192, 100, 4) == (3 * 4 * 100 * 48 * 192, 3 * 2 * 100 * 480 + 8 * 2 * 4 * 48 * 192)
    assert feed_forward_costs(48, 192, 100, 4, False) == (4 * 100 * 48 * 192, 2 * 100 * 480 + 2 * 2 * 4 * 48 * 192)
    router = torch.nn.Sequential(torch.nn.Linear(48, 4))
    assert routing_costs(router, model, 2) == (6 * 128 * 48 * 4, 3 * 128 * (2 * 48 + 4 * 4))


MODEL = """
    import torch
    from diffmoe.config import ModelConfig, from_dict
    from diffmoe.convert import from_reference
    from diffmoe.models.dit import DiT as Ours

    class DiT(torch.nn.Module):
        def __init__(self, MoE_config=None, CapacityPred_loss_weight=None, **options):
            super().__init__()
            moe = MoE_config and {"num_experts": MoE_config.num_experts, "router": {"kind": "expert_choice"}}
            assert MoE_config is None or MoE_config.get("capacity_schedule") is None
            self.inner = Ours(from_dict(ModelConfig, options | {"moe": moe}))
            print("noise")

        def load_state_dict(self, state):
            return self.inner.load_state_dict(from_reference(state, self.inner.config))

        def forward(self, x, t, y):
            return self.inner(x, t, y).prediction * SCALE
    """
FLOW = """
    import torch
    import torch.distributed as dist

    class RectifiedFlow(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x, cond):
            assert self.model.training
            dist.all_reduce(torch.zeros(1))
            error = self.model(x, torch.rand(len(x)), cond)[:, :x.shape[1]] - x
            return {"loss": error.square().mean(), "cp_loss": 0, "mse": error.square().mean((1, 2, 3))}

        def sample(self, z, cond, sample_steps):
            for step in range(sample_steps):
                z = z + self.model(z, torch.full((len(z),), step / sample_steps), cond)[:, :z.shape[1]] / sample_steps
            return [z]
    """
UTILS = """
    import a_package_that_nobody_has

    def update_ema(ema_model, model, decay=0.9):
        with torch.no_grad():
            for name, value in OrderedDict(model.named_parameters()).items():
                dict(ema_model.named_parameters())[name].mul_(decay).add_(value, alpha=1 - decay)
    """


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Write what has the outer form of the authors' repository around this suite's own network."""
    files = {f"models/models_{name}.py": MODEL.replace("SCALE", "1.0") for name in ("DiT", "TCDiT", "ECDiT", "DiffMoE")}
    for name, text in (files | {"diffusion/rectified_flow.py": FLOW, "utils.py": UTILS}).items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return tmp_path / "checkout"


@pytest.mark.parametrize("work", ["train", "sample", "forward"])
@pytest.mark.parametrize("system", ["dense", "diffmoe"])
def test_a_checkout_does_the_same_work_with_our_weights(checkout: Path, system: str, work: str,
                                                        capsys: pytest.CaptureFixture) -> None:
    load = "balanced" if system == "diffmoe" and work != "train" else ""
    one = case(system, work, load=load, implementation="reference-tf32")
    subject = ReferenceSubject(one, run_config(one, SETTINGS), Shared(CPU), Reference(checkout))
    before = torch.backends.cuda.matmul.allow_tf32, torch.cat([p.flatten() for p in subject.model.parameters()])
    with group_of_one(CPU), subject.scope():
        assert torch.backends.cuda.matmul.allow_tf32
        output = subject.call()
    assert torch.backends.cuda.matmul.allow_tf32 == before[0]
    moved = not torch.equal(before[1], torch.cat([p.flatten() for p in subject.model.parameters()]))
    assert output.isfinite().all() and moved == (work == "train")
    assert subject.facts()["relative_error"] < 1e-6
    assert "noise" not in capsys.readouterr().out
    assert "models" not in sys.modules and str(checkout) not in sys.path


def test_a_checkout_that_computes_something_else_is_an_error(checkout: Path) -> None:
    (checkout / "models/models_DiT.py").write_text(textwrap.dedent(MODEL.replace("SCALE", "1.01")))
    one = case("dense", implementation="reference-tf32")
    with pytest.raises(RuntimeError, match="not the same work"):
        ReferenceSubject(one, run_config(one, SETTINGS), Shared(CPU), Reference(checkout))


def test_what_a_checkout_lacks_is_named_in_one_line(checkout: Path, tmp_path: Path) -> None:
    (checkout / "diffusion/rectified_flow.py").write_text("import an_integrator_not_installed")
    with pytest.raises(ConfigError, match="pip install an_integrator_not_installed") as caught:
        Reference(checkout)
    one_line(caught.value)
    with pytest.raises(ConfigError, match=r"models/models_DiT\.py is missing"):
        Reference(tmp_path)


def test_a_record_survives_the_disk_and_names_no_machine(tmp_path: Path) -> None:
    record = empty_record(results=[result()], startup=[])
    path = write_bench(tmp_path, record)
    assert read_benches(tmp_path) == [record]
    assert write_bench(tmp_path, record) == path and len(list(tmp_path.iterdir())) == 1
    text = path.read_text()
    assert str(tmp_path) not in text and str(Path.home()) not in text
    assert record_id("latent", {}, {}, "a") != record_id("latent", {}, {}, "b")
    path.write_text(text.replace('"schema": 1', '"schema": 99'))
    with pytest.raises(ConfigError, match="schema 99"):
        read_benches(tmp_path)
    path.unlink()
    with pytest.raises(ConfigError, match="no records"):
        read_benches(tmp_path)


def test_ratios_compare_within_a_record_and_across_batches_only_after_a_search() -> None:
    fast, dense = result(5.0), result(10.0, system="dense")
    reference = result(20.0, implementation="reference-tf32", batch=4)
    record = empty_record(results=[fast, dense, reference])
    assert record.ratio(fast, system="dense") == 2
    assert record.ratio(fast, implementation="reference-tf32") is None
    record.settings["largest"] = True
    assert record.ratio(fast, implementation="reference-tf32") == 2  # 400 images/s over 200
    sample = result(10.0, work="sample", load="skewed")
    record.results += [sample, result(5.0, work="sample", system="dense")]
    assert record.ratio(sample, system="dense") == 0.5
    assert sample.images_per_second == 1e3 * 4 / 10  # a call draws two batches


def test_targets_are_judged_by_the_latest_record_that_has_them() -> None:
    assert len(read_targets()) == len({(target.name, target.against) for target in read_targets()})
    kind = {"workload": "latent", "size": "L-E16", "batch": 128}
    whole = {"name": "forward and backward", "count": 1, "flops": 0.0, "bytes": 0.0}
    old, new = (empty_record(id=f"bench-{name}", results=[
        result(10.0, [whole | {"ms": 8.0}], **kind), result(ms, [whole | {"ms": 4.0}], system="dense", **kind)])
        for name, ms in (("old", 5.0), ("new", 9.0)))
    new.startup = [{"workload": "cifar10", "size": "S-E16", "system": "diffmoe", "cache": "warm", "total": 50.0}]
    found = {(target.name, target.against): (value, source, value is not None and target.is_met(value))
             for target, value, source in judge([old, new])}
    assert found["latent L-E16 diffmoe train", "dense"] == (0.9, "bench-new", True)
    assert found["latent L-E16 diffmoe train", "gradients"] == (0.5, "bench-new", False)
    assert found["latent L-E16 diffmoe train", "mfu"][0] == pytest.approx(12_800 * 1e9 / 1e12)
    assert found["cifar10 S-E16 diffmoe train warm cache", "startup"] == (50.0, "bench-new", False)
    assert found["latent L-E16 diffmoe train largest batch", "reference"][0] is None


@pytest.mark.parametrize("ms, routing_ms, routing_least, attempts, status", [
    (10.0, 4.9, 0.1, 2, "closed: attempts left it unmet"), (10.0, 4.9, 0.1, 1, "open: 1 more to attempt"),
    (10.0, 3.0, 0.1, 2, "open: parts do not add up"), (11.0, 5.5, 5.5, 0, "closed: out of reach"),
    (11.0, 4.0, 4.0, 0, "open: parts do not add up"), (10.0, 6.1, 0.1, 2, "open: parts do not add up")])
def test_a_gap_closes_by_an_account_and_two_attempts(ms: float, routing_ms: float, routing_least: float, attempts: int,
                                                     status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(workload="latent", size="L-E16", system="diffmoe", work="train", against="dense", at_least=0.9,
                    attempts=("0123456",) * attempts)
    monkeypatch.setattr("diffmoe.bench.targets.read_targets", lambda: [target])
    kind = {"workload": "latent", "size": "L-E16", "batch": 128}
    part = {"name": "attention", "count": 4, "ms": 1.25, "flops": 0.9e9, "bytes": 1e3, "how": "eager"}
    whole = {"name": "forward and backward", "count": 1, "ms": ms, "flops": 0.0, "bytes": 0.0, "how": "eager"}
    routing = part | {"name": "routing", "count": 1, "ms": routing_ms, "flops": routing_least * 1e9}
    record = empty_record(results=[result(ms, [part, routing, whole], **kind),
                                   result(8.0, [part, whole], system="dense", **kind)])
    (gap,) = find_gaps([record])
    assert gap.status == status
    assert gap.needs_ms == pytest.approx(8 / 0.9) and gap.accounted == pytest.approx((5 + routing_ms) / ms)
    assert gap.least_ms == pytest.approx(8 + routing_least)  # ceilings: a TFLOP/s; attention is dense's, too
    later = dataclasses.replace(record, id="later", results=[result(ms, **kind), result(8.0, system="dense", **kind)])
    assert find_gaps([record, later])[0].status == "open: taken apart before that"
    bare = dataclasses.replace(record, results=[record.results[0], result(8.0, system="dense", **kind)])
    (gap,) = find_gaps([bare])
    assert gap.dense_ms is None and gap.least_ms == pytest.approx(ms - (5 - 3.6) - (routing_ms - routing_least))
    page = gaps_markdown([record])
    assert f"{int(status.startswith('closed'))} of 1 unmet targets" in page
    assert "| routing   " in page and "| forward and backward" not in page


def test_an_account_from_another_gpu_closes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(workload="latent", size="L-E16", system="diffmoe", work="train", against="reference", at_least=6)
    monkeypatch.setattr("diffmoe.bench.targets.read_targets", lambda: [target])
    kind = {"workload": "latent", "size": "L-E16", "batch": 128}
    part = {"name": "attention", "count": 1, "ms": 9.5, "flops": 9e9, "bytes": 1e3, "how": "eager"}
    beside = empty_record(id="bench-a", results=[result(10.0, **kind),
                                                 result(40.0, implementation="reference-tf32", **kind)])
    apart = empty_record(id="bench-b", results=[result(10.0, [part], **kind)])
    assert find_gaps([beside, apart])[0].status == "closed: out of reach"
    elsewhere = dataclasses.replace(apart, environment=apart.environment | {"hardware": "another"})
    assert find_gaps([beside, elsewhere])[0].status == "open: taken apart on another GPU"


def test_forward_and_backward_that_failed_alone_are_no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(workload="latent", size="L-E16", system="diffmoe", work="train", against="gradients", at_least=0.9)
    monkeypatch.setattr("diffmoe.bench.targets.read_targets", lambda: [target])
    kind = {"workload": "latent", "size": "L-E16", "batch": 128}
    part = {"name": "attention", "count": 4, "ms": 1.25, "flops": 0.9e9, "bytes": 1e3, "how": "eager"}
    failed = {"name": "forward and backward", "count": 1, "flops": 0.0, "bytes": 0.0, "error": "out of memory"}
    first, second = (empty_record(id=name, results=[
        result(10.0, [part, mine], **kind), result(8.0, [part, failed | {"ms": 7.0}], system="dense", **kind)])
        for name, mine in (("bench-a", failed | {"ms": 9.0}), ("bench-b", failed)))
    assert find_gaps([first, second])[0].status == "open: not taken apart"


def test_what_is_less_than_in_dense_stands_as_measured() -> None:
    assert PartLine("dense feed-forward", 3.0, 2.0, 6.0, 4.0).more_ms == -3
    assert PartLine("routing", 3.0, 2.0, 0.0, 0.0).more_ms == 2


def test_the_report_follows_from_the_records(tmp_path: Path) -> None:
    part = {"name": "attention", "count": 4, "ms": 1.0, "flops": 1e8, "bytes": 1e6, "how": "eager"}
    record = empty_record(
        results=[*(Result(case=case(system), status="ok") for system in ("dense", "expert_choice")),  # stopped
                 result(8.0, [part, part | {"name": "routing", "error": "out of memory"}]), result(system="dense"),
                 result(40.0, implementation="reference-tf32"),
                 Result(case=case("token_choice"), status="out of memory", message="out of memory")],
        startup=[{"workload": "cifar10", "size": "S-E16", "system": "diffmoe", "batch": 512, "cache": "cold",
                  "seconds": {"import": 1.0, "build": 2.0}, "total": 3.0}],
        reference={"digest": "0", "differences": ["data: theirs lies ready"]})
    write_bench(tmp_path, record)
    names = {path.name for path in write_bench_report(tmp_path)}
    assert names == {"table.md", "targets.md", "gaps.md", "relative_speed.png", "roofline.png"}
    assert check_bench_report(tmp_path) == []
    table = (tmp_path / "table.md").read_text()
    assert "| 250 | 8 [8, 8] | 1.25 | 5.00 | 25.0% |" in table
    assert "| attention | 4 | 4 | 50% | 0.1 | 0.001 | 10% | eager |" in table
    assert table.count("stopped before it was timed") == 2
    assert "out of memory" in table and "data: theirs lies ready" in table and "not measured" in table
    targets = (tmp_path / "targets.md").read_text()
    assert "| cifar10 diffmoe train cold cache, s to start | **3** (≤ 45) |" in targets
    assert targets.startswith("1 of 29 targets") and "not measured (≥ 8)" in targets
    (tmp_path / "table.md").write_text(table + " ")
    (tmp_path / "roofline.png").unlink()
    assert len(check_bench_report(tmp_path)) == 2
    assert main(["--report", str(tmp_path), "--check"]) == 1
    assert main(["--report", str(tmp_path)]) == 0 and main(["--report", str(tmp_path), "--check"]) == 0


def test_a_record_without_a_success_still_has_a_report() -> None:
    record = empty_record(results=[Result(case=case(), status="skipped", message="the time was over")], ceilings={})
    assert "the time was over" in table_markdown([record])


@pytest.fixture
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the device's ceilings in no time."""
    monkeypatch.setattr(timing, "MATMUL_SIDE", {"cpu": 32})
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 4096})


@pytest.mark.usefixtures("small_ceilings")
def test_the_command_writes_one_record(tmp_path: Path) -> None:
    assert main(["--device", "cpu", "--sizes", "nano-E4", "--systems", "diffmoe", "--work", "forward", "--batch", "1,2",
                 "--rounds", "1", "--visit", "0.001", "--profile", "--out", str(tmp_path)]) == 0
    record = read_benches(tmp_path)[0]
    assert [(one.case.batch, one.status) for one in record.results] == [(1, "ok"), (2, "ok")]
    assert record.ceilings["copy_bytes"] > 0 and record.environment["versions"]["torch"]
    assert "kernels" in next(tmp_path.glob("profile-*.txt")).read_text()


@pytest.mark.usefixtures("small_ceilings")
def test_the_command_times_a_checkout_in_a_group_that_ends_with_it(checkout: Path, tmp_path: Path) -> None:
    assert main(["--device", "cpu", "--sizes", "nano-E4", "--systems", "diffmoe", "--work", "train", "--batch", "2",
                 "--rounds", "1", "--visit", "0.001", "--reference", str(checkout), "--out", str(tmp_path)]) == 0
    found = {one.case.implementation: one.status for one in read_benches(tmp_path)[0].results}
    assert found == {"ours": "ok", "reference-tf32": "ok"}
    assert not dist.is_initialized()


@pytest.mark.parametrize("arguments", [["--batch", "two"], ["--work", "dance"], ["--rounds", "0"], ["--sizes", "Q"],
                                       ["--systems", "nothing"], ["--reference", "nowhere"]])
def test_a_mistake_on_the_command_line_is_one_line(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        main(["--device", "cpu", "--out", str(tmp_path), *arguments])
    one_line(caught.value)
    assert not list(tmp_path.iterdir())


def test_start_up_is_measured_by_part() -> None:
    job = {"case": dataclasses.asdict(case()), "settings": dataclasses.asdict(SETTINGS), "device": "cpu"}
    seconds = startup.run_job(json.loads(json.dumps(job)))
    assert list(seconds) == ["import", "device", "data", "build", "first step", "capture"]
    assert all(value >= 0 for value in seconds.values())
