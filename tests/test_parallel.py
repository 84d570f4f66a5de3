"""Several processes: their number changes nothing where it must not, however the model lies in them.

Two processes run every case once (`work_of_two`) and write what came out to files, which are compared with one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from unittest import mock
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from conftest import rand, random_router, randomise
from processes import as_torchrun, free_port, run_together
from test_training import CPU, digits_config
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._pytree import tree_leaves

from diffmoe.config import ConfigError, PoolScope
from diffmoe.data import load_data
from diffmoe.models.dit import ModelOutput
from diffmoe.moe.routing import Router, Routing, largest
from diffmoe.training import graph
from diffmoe.training.checkpoint import load_weights, save_weights
from diffmoe.training.distributed import ALONE, Heartbeat, World, join_world
from diffmoe.training.parallel import GradientParts, distribute, local, own_part
from diffmoe.training.run import Interrupted, train_run
from diffmoe.training.trainer import Trainer, micro_batch_size

pytestmark = pytest.mark.timeout(900)  # the first test waits for all that two processes do: 30 seconds of a core
STEPS = 10
SMALL = ["model.hidden_size=16", "model.num_heads=2", "model.depth=2", "training.batch_size=8",
         "training.num_images=2400", "training.learning_rate=0.01", "training.clip_norm=0.05"]
GLOBAL, FSDP, FP64 = "model.moe.pool_scope=global", "runtime.parallel=fsdp", "training.precision=fp64"
SPARSE = ("diffmoe", "token_choice", "expert_race", "expert_choice")
# (system, overrides): all of it is trained by one process and by several
CASES = {f"{system} in float64": (system, [FP64, GLOBAL]) for system in SPARSE} | {
    "expert_race in float64": ("expert_race", [FP64, GLOBAL, "model.moe.router.similarity_loss_weight=0.1"]),
    "dense in float64": ("dense", [FP64]),
    "diffmoe, pools across processes": ("diffmoe", [FP64, GLOBAL, "training.batch_size=12",
                                                    "model.moe.router.pool_images=4"]),
    "diffmoe, pools within processes": ("diffmoe", [FP64, GLOBAL, "model.moe.router.pool_images=2"]),
    "diffmoe, experts in turn": ("diffmoe", [FP64, GLOBAL, f"model.moe.router.warmup_steps={STEPS // 2}"]),
    "diffmoe, micro-batches": ("diffmoe", [FP64, GLOBAL, "model.moe.router.pool_images=2",
                                           "runtime.micro_batch_size=2"]),
    "diffmoe in float64, fsdp": ("diffmoe", [FP64, GLOBAL, FSDP, "model.depth=4", "training.expert_rate=0.5"]),
    "token_choice in float64, fsdp": ("token_choice", [FP64, GLOBAL, FSDP]),
    "diffmoe in float32": ("diffmoe", [GLOBAL]),
    "diffmoe in float32, fsdp": ("diffmoe", [GLOBAL, FSDP]),
}
RUN = ["diffmoe", *SMALL, FP64, GLOBAL, "training.num_images=240"]
BF16 = ["training.precision=bf16", GLOBAL, "model.hidden_size=32"]


def make_trainer(system: str, overrides: list[str], world: World = ALONE) -> Trainer:
    config = digits_config(system, *SMALL, *overrides)
    return Trainer(config, 0, load_data(config.data, config.model), CPU, world)


def trained(system: str, overrides: list[str], world: World = ALONE, steps: int = STEPS,
            row_bound: float | None = None) -> dict[str, Tensor]:
    """Train; return the state at the end and the losses of every step, (steps, losses)."""
    trainer = make_trainer(system, overrides, world)
    trainer.row_bound = row_bound
    losses = [torch.stack(world.mean(list(trainer.train_step().values()))) for _ in range(steps)]
    state = trainer.state() | {"losses": torch.stack(losses)}
    return {name: value for name, value in state.items() if name != "idle.experts"}  # of one process's tokens


def tied_routing(kind: str, world: World, row_bound: float | None = None) -> tuple[Router, Routing]:
    """Route this process's share of `tied_input`."""
    router = random_router(kind).train()
    router.pool_scope, router.world = PoolScope.GLOBAL, world
    return router, router(tied_input()[world.share(8)], row_bound)


def tied_input() -> Tensor:
    """Return the tokens of eight images (8, 16, 32), of which only 12 differ."""
    return rand(8, 4, 32)[[0, 1, 1, 0, 2, 0, 1, 2]].repeat(1, 4, 1)


# ---------------------------------------------------------------- what the two processes do


def train_cases(world: World, folder: Path) -> None:
    """Train all of CASES; the main process writes the outcome to `cases.safetensors`."""
    found = {f"{case}/{name}": value for case, (system, overrides) in CASES.items()
             for name, value in trained(system, overrides, world).items()}
    if world.is_main:
        save_weights(folder / "cases.safetensors", found, {})


def work_of_two(world: World, folder: Path) -> None:
    """Do everything that needs two processes; the main one writes the outcome to `two.safetensors`, too."""
    train_cases(world, folder)
    found: dict[str, Tensor] = {}

    def keep(case: str, outcome: dict[str, Tensor]) -> None:
        found.update({f"{case}/{name}": value for name, value in outcome.items()})

    keep("process scope", trained("token_choice", [FP64], world, steps=3))
    keep("few rows", trained("diffmoe", [FP64, GLOBAL], world, steps=3, row_bound=0.3))
    for parallel in ("ddp", "fsdp"):
        keep(f"bf16 {parallel}", trained("diffmoe", [*BF16, f"runtime.parallel={parallel}"], world, steps=3))
        keep(f"buffers {parallel}", thresholds_after_gradients(parallel, world))
    keep("shards", shards(world))
    keep("copies", gradients_of_copies(world))
    keep("buckets", {name: torch.tensor(buckets_sent(overrides, world)) for name, overrides in {
        "whole": [], "parts": ["runtime.micro_batch_size=2"]}.items()})
    for kind in ("diffmoe", "race"):
        router, routing = tied_routing(kind, world)
        mask_SE = routing.mask(64, router.num_experts)  # of 4 images of 16 tokens
        keep(f"ties {kind}", {"mask": world.gather(mask_SE), "observed": routing.observed,
                              "short of rows": world.sum(tied_routing(kind, world, 0.1)[1].overflow.int())})
    keep("reshard", resharded(folder, world))
    config = digits_config(*RUN, FSDP)
    with suppress(Interrupted):
        train_run(config, 0, load_data(config.data, config.model), folder / "run", CPU, world=world, deadline=0.0)
    if world.is_main:
        save_weights(folder / "two.safetensors", found, {})


def thresholds_after_gradients(parallel: str, world: World) -> dict[str, Tensor]:
    """Give each process thresholds of its own, then train a step; return them by process, and the all-reduces made."""
    trainer = make_trainer("diffmoe", [GLOBAL, f"runtime.parallel={parallel}"], world)
    thresholds = [layer.router.threshold for layer in trainer.model.moe_layers().values()]
    for threshold in thresholds:
        threshold.fill_(world.rank + 0.25)
    batch = trainer.batch(0).rows(world.share(8))
    trainer.gradients(batch.images, batch.labels, batch.noise, batch.times)
    kept = world.gather(torch.stack(thresholds))
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *arguments: calls.append(0) or all_reduce(*arguments)
    trainer.train_step()
    dist.all_reduce = all_reduce
    return {"kept": kept, "calls": torch.tensor(len(calls))}


def buckets_sent(overrides: list[str], world: World) -> int:
    """Count the buckets of gradients that DDP sends in a step."""
    trainer, sent = make_trainer("dense", overrides, world), []
    trainer.network.register_comm_hook(sent, lambda _, bucket: sent.append(bucket) or allreduce_hook(None, bucket))
    trainer.train_step()
    return len(sent)


def gradients_of_copies(world: World) -> dict[str, Tensor]:
    """Return of each gradient of bf16 copies that of each process's loss, what each holds of the mean, and how much."""
    overrides = [override for override in BF16 if override != GLOBAL]
    trainer = make_trainer("diffmoe", [*overrides, "model.moe.num_experts=3", "training.batch_size=12"])
    model, average = randomise(trainer.model), trainer.ema.model
    trainer.network = copied = model.rounded(torch.bfloat16)

    def backward() -> list[Tensor]:
        copied.zero_grad()
        losses, _ = trainer.losses(trainer.batch(0, world.share(12)))
        sum(losses.values()).backward()
        return [parameter.grad.clone() for parameter in copied.parameters()]

    own = backward()
    with mock.patch("diffmoe.training.parallel.LEAST_SENT", 300):  # the embedding of 11 labels, too
        assert distribute(model, copied, [average], trainer.config, world, CPU) is copied
        assert copied.label_embed.weight.numel() > 300
        parts = GradientParts(list(copied.parameters()), list(model.parameters()), world)
    assert max(parameter.numel() for parameter in parts.small) < 300
    backward()
    parts.finish()
    found = {}
    for (name, parameter), trained, mine in zip(model.named_parameters(), copied.parameters(), own, strict=True):
        held, averaged = local([parameter, average.get_parameter(name)])
        assert held.shape == averaged.shape
        found |= {f"own/{name}": world.gather(mine[None]), f"share/{name}": torch.tensor(held.numel() / mine.numel()),
                  f"mean/{name}": world.gather(own_part(trained.grad, parameter)[None])}
    return found


def shards(world: World) -> dict[str, Tensor]:
    """Return which part of weights, averages and moments a process holds, and dtypes that the layers compute in."""
    trainer = make_trainer("diffmoe", [*BF16, FSDP], world)
    seen = {}
    layer = trainer.model.moe_layers()[1]
    hooks = [module.register_forward_hook(lambda module, *_, name=name: seen.update(
                 {name: next(module.parameters()).element_size()}))
             for name, module in {"router": layer.router, "predictor": layer.router.predictor,
                                  "experts": layer.experts, "final": trainer.model.final}.items()]
    trainer.train_step()
    for hook in hooks:
        hook.remove()
    full = sum(parameter.numel() for parameter in trainer.model.parameters())
    held = {name: sum(part.numel() for part in local(tensors)) / full for name, tensors in {
        "weights": list(trainer.model.parameters()), "average": list(trainer.ema.model.parameters()),
        "moments": [moments["exp_avg"] for moments in trainer.optimizer.state.values()]}.items()}
    return {name: torch.tensor(value) for name, value in (held | seen).items()}


def resharded(folder: Path, world: World) -> dict[str, Tensor]:
    """Save with two processes, load and save with one, load with two; return the state each time and a step later."""
    def state(trainer: Trainer) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in trainer.state().items()}

    def load(name: str, overrides: list[str], world: World) -> Trainer:
        trainer = make_trainer("diffmoe", overrides, world)
        trainer.load_state(load_weights(folder / name)[0], 3)
        return trainer

    trainer = make_trainer("diffmoe", [GLOBAL, FSDP], world)
    states = {"start": state(trainer)}
    for _ in range(3):
        trainer.train_step()
    states["two"] = state(trainer)
    if world.is_main:
        save_weights(folder / "of-two", states["two"], {})
        save_weights(folder / "of-one", load("of-two", [GLOBAL], ALONE).state(), {})
    dist.barrier()
    again = load("of-one", [GLOBAL, FSDP], world)
    states |= {"again": state(again), "ddp": state(load("of-one", [GLOBAL], world)), "average": again.averages()[None]}
    trainer.train_step(), again.train_step()
    states |= {"two later": state(trainer), "again later": state(again)}
    return {f"{key}/{name}": value for key, state in states.items() for name, value in state.items()}


# ---------------------------------------------------------------- what must be true of it


@pytest.fixture(scope="module")
def folder_of_two(tmp_path_factory):
    """Let two processes do everything, once; return the folder of what they left."""
    folder = tmp_path_factory.mktemp("two")
    run_together(work_of_two, folder)
    return folder


@pytest.fixture(scope="module")
def two(folder_of_two):
    """Return a function that gives the outcome of one case in two processes."""
    return outcomes(folder_of_two, "cases", "two")


def outcomes(folder: Path, *files: str) -> Callable[[str], dict[str, Tensor]]:
    """Return a function that gives the outcome of one case by what processes have left."""
    found = {key: value for file in files for key, value in load_weights(folder / f"{file}.safetensors")[0].items()}
    return lambda case: {name.removeprefix(f"{case}/"): value for name, value in found.items()
                         if name.startswith(f"{case}/")}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], rtol: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        # Adam's first steps turn a gradient that is 0 but for rounding into one of size 1: compare beside the largest.
        torch.testing.assert_close(value, other[name], rtol=rtol, atol=rtol * value.abs().max().item(), msg=lambda text,
                                   name=name: f"{name}: {text}")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def several(request, tmp_path_factory):
    """Return a function that gives the outcome of one case in as many processes."""
    if request.param == 2:
        return request.getfixturevalue("two")
    folder = tmp_path_factory.mktemp("several")
    run_together(train_cases, folder, request.param)
    return outcomes(folder, "cases")


@pytest.mark.parametrize("case", [name for name in CASES if "float32" not in name])
def test_several_processes_equal_one_in_float64(several, case):
    assert_close(trained(*CASES[case]), several(case), rtol=1e-9)


@pytest.mark.parametrize("case", [name for name in CASES if "float32" in name])
def test_the_losses_of_several_processes_are_those_of_one_in_float32(several, case):
    torch.testing.assert_close(trained(*CASES[case])["losses"], several(case)["losses"], rtol=1e-4, atol=0)


def test_the_process_scope_gives_another_result_on_two_processes(two):
    """So that the comparisons above can fail: the load statistics of a process are not those of the batch."""
    one, several = trained("token_choice", [FP64], steps=3)["losses"], two("process scope")["losses"]
    assert (one[-1] - several[-1]).abs().max() > 1e-6 * one[-1].abs().max()


def test_too_few_rows_change_no_result(two):
    assert_close(trained("diffmoe", [FP64, GLOBAL], steps=3), two("few rows"), rtol=1e-9)


@pytest.mark.parametrize("kind", ["diffmoe", "race"])
def test_equal_scores_go_to_the_first_token_of_the_batch(two, kind):
    router, routing = tied_routing(kind, ALONE)
    found, scores_SE = two(f"ties {kind}"), router.scores(tied_input())
    mask_SE = routing.mask(*scores_SE.shape)
    assert torch.equal(found["mask"], mask_SE)
    assert torch.equal(mask_SE, first_of_the_largest(kind, scores_SE))
    torch.testing.assert_close(found["observed"], routing.observed)
    assert found["short of rows"] > 0


def first_of_the_largest(kind: str, scores_SE: Tensor) -> Tensor:
    """Select by sorting (score downwards, place in the batch) in Python: the oracle."""
    def chosen(scores: list[float], k: int) -> list[bool]:
        best = sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:k]
        return [place in best for place in range(len(scores))]

    num_tokens, num_experts = scores_SE.shape
    if kind == "race":
        return torch.tensor(chosen(scores_SE.flatten().tolist(), num_tokens)).view_as(scores_SE)
    return torch.tensor([chosen(column.tolist(), num_tokens // num_experts) for column in scores_SE.t()]).t()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_no_wrapper_touches_thresholds_and_one_all_reduce_serves_all_layers(two, parallel):
    found = two(f"buffers {parallel}")
    kept = found["kept"].unflatten(0, (2, -1))
    assert (kept[0] == 0.25).all() and (kept[1] == 1.25).all()
    assert found["calls"] == 1


def test_of_large_copies_a_process_holds_the_mean_of_its_rows_and_of_others_all(two):
    found = two("copies")
    shares = {name.removeprefix("share/"): value for name, value in found.items() if name.startswith("share/")}
    assert set(map(float, shares.values())) == {0.5, 1.0} and shares["label_embed.weight"] == 1
    assert {float(value) for name, value in shares.items() if "experts.w" in name} == {0.5}  # of three experts
    for name, share in shares.items():
        own, held = found[f"own/{name}"], found[f"mean/{name}"]
        mean = own.float().mean(0).to(own.dtype)
        assert not torch.equal(*own), name
        assert torch.equal(held.flatten() if share < 1 else held[0].flatten(), mean.flatten()), name
        assert share < 1 or torch.equal(*held), name


def test_gradients_are_sent_once_a_step_however_many_micro_batches(two):
    found = two("buckets")
    assert found["parts"] == found["whole"] > 0


def test_fsdp_halves_weights_average_and_moments_and_keeps_the_router_in_float32(two):
    found = two("shards")
    for name in ("weights", "average", "moments"):
        assert found[name] == pytest.approx(0.5, abs=0.01), name
    assert {name: found[name].item() for name in ("router", "predictor", "experts", "final")} == {
        "router": 4, "predictor": 4, "experts": 2, "final": 4}


def test_in_bf16_fsdp_computes_what_ddp_does(two):
    ddp, fsdp = (two(f"bf16 {parallel}")["losses"] for parallel in ("ddp", "fsdp"))
    torch.testing.assert_close(ddp, fsdp, rtol=1e-4, atol=0)


def test_a_checkpoint_of_two_loads_in_one_and_back_bit_for_bit(two):
    found = two("reshard")

    def state(case: str) -> dict[str, Tensor]:
        return {name.removeprefix(f"{case}/"): value for name, value in found.items() if name.startswith(f"{case}/")}

    def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
        assert one.keys() == other.keys() and one
        assert all(torch.equal(value, other[name]) for name, value in one.items())

    alone = make_trainer("diffmoe", [GLOBAL]).state()
    assert_equal(state("start"), alone)
    for case in ("again", "ddp"):
        assert_equal(state("two"), state(case))
    assert_equal(state("two later"), state("again later"))
    assert {f"ema.{name}" for name in state("average")} <= state("two").keys()
    parts = {name.partition(".")[0] for name in state("two")}
    assert parts == {"model", "ema", "optimizer", "idle"}
    assert any("threshold" in name for name in state("two"))


def test_a_run_interrupted_on_two_processes_under_fsdp_goes_on_in_one(folder_of_two, tmp_path):
    config = digits_config(*RUN)
    data = load_data(config.data, config.model)
    assert not (folder_of_two / "run" / "ema.safetensors").exists()
    whole, resumed = (load_weights(train_run(config, 0, data, folder, CPU).folder / "ema.safetensors")[0]
                      for folder in (tmp_path, folder_of_two / "run"))
    assert_close(whole, resumed, rtol=1e-9)


def test_the_largest_are_found_with_ties_in_order():
    scores = torch.tensor([[3.0, 1.0, 3.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    mask, kth = largest(scores, 2)
    assert mask.int().tolist() == [[1, 0, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]
    assert kth.tolist() == [3.0, 1.0, 4.0]


def test_wrappers_see_the_tensors_in_what_a_network_returns():
    """FSDP of torch 2.11 hooks the leaves of an output and silently trains nothing behind those it does not see."""
    pair, loss = torch.ones(2), torch.zeros(())
    routing = Routing(token_N=pair, gate_N=pair, tokens_per_expert=2, losses={"balance": loss})
    leaves = tree_leaves(ModelOutput(pair, [routing]))
    assert sum(leaf is pair for leaf in leaves) == 3 and any(leaf is loss for leaf in leaves)


@pytest.mark.parametrize(("system", "overrides", "works"), [
    ("diffmoe", [], False), ("diffmoe", [GLOBAL], True), ("expert_race", [GLOBAL], True), ("token_choice", [], True),
    ("token_choice", [GLOBAL, "runtime.micro_batch_size=2"], False),
    ("diffmoe", [GLOBAL, "runtime.micro_batch_size=2"], False),
    ("diffmoe", [GLOBAL, "runtime.micro_batch_size=2", "model.moe.router.pool_images=2"], True)])
def test_the_global_scope_lets_a_pool_span_processes_but_no_micro_batch(system, overrides, works):
    config = digits_config(system, *SMALL, *overrides)
    if works:
        assert micro_batch_size(config, World(0, 2)) == (config.runtime.micro_batch_size or 4)
    else:
        with pytest.raises(ConfigError, match="pool spans 8 images"):
            micro_batch_size(config, World(0, 2))


@pytest.mark.parametrize("fails", [False, True])
def test_graphs_are_given_up_before_the_processes_part(monkeypatch, fails):
    """Else NCCL waits for ever for one that somebody holds: a frame of an error's traceback, for example."""
    done, captured, destroy = [], Mock(), dist.destroy_process_group
    captured.graph.reset.side_effect = lambda: done.append("given up")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("parted") or destroy())
    for name, value in as_torchrun(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    graph.captured.add(captured)
    with pytest.raises(ConfigError) if fails else nullcontext(), join_world(CPU):
        if fails:
            raise ConfigError("an error")
    assert done == ["given up", "parted"]


def test_a_process_may_say_that_its_next_step_takes_longer(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with Heartbeat(World(0, 2), 0.2) as heart:
        heart.start()
        heart.beat(60.0)
        heart.thread.join(0.6)
        assert not ended
        heart.beat()
        heart.thread.join(10)
    assert ended == [1]
