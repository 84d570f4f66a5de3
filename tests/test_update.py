"""Clipping, AdamW and averages in one pass against torch's own, in Triton's interpreter where there is no GPU."""

import math
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import needs_interpreter, rand
from processes import run_together, tiny_config
from test_robustness_numbers import make_trainer, spoil_gradient
from torch import nn

from diffmoe.config import EmaBuffers, RunConfig
from diffmoe.data import load_data
from diffmoe.models.kernels import HAS_TRITON
from diffmoe.training import parallel
from diffmoe.training.checkpoint import load_weights, save_weights
from diffmoe.training.ema import Ema
from diffmoe.training.parallel import local, whole
from diffmoe.training.trainer import GRADIENT_NORM, Trainer

if HAS_TRITON:
    from diffmoe.training.update_kernels import ALIGNED, OnePass, one_pass_applies

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_device = pytest.mark.skipif(not (HAS_TRITON and (INTERPRETED or torch.cuda.is_available())),
                               reason="needs a CUDA device, or Triton's interpreter")
SHAPES = [(1,), (3,), (4095,), (4097,), (33, 65), (2, 3, 5), (4096,)]
CLIPPED = slice(0, 5)
SHARES = (0.1, 0.003)
ONE_BIT = 2**-7 if INTERPRETED else 0
"""The interpreter cuts bits off where a GPU rounds to bf16."""
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.999)}


@pytest.mark.skipif(INTERPRETED, reason="is no part of itself")
@needs_interpreter
def test_the_pass_equals_torch_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, text=True, capture_output=True,
                         check=False)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout + run.stderr


class Side:
    """Parameters, their averages and an AdamW, which `step` moves in one pass or by torch's operators."""

    def __init__(self, clip_norm, *, one_pass, num_averages=1, offset=0, copies=False, **options):
        self.network = nn.Module()
        self.behind = []
        """What lies in memory behind each weight, and is nobody's."""
        for index, shape in enumerate(SHAPES):
            memory = torch.ones(offset + torch.Size(shape).numel() + 1, device=DEVICE)
            weight = memory[offset:-1].view(shape).copy_(rand(*shape, seed=index))
            self.network.register_parameter(f"w{index}", nn.Parameter(weight))
            self.behind.append(memory[-1])
        self.parameters = list(self.network.parameters())
        self.emas = [Ema(self.network) for _ in range(num_averages)]
        self.clip_norm = clip_norm
        self.optimizer = torch.optim.AdamW(self.parameters, foreach=False, **OPTIONS | options)
        averages = [list(ema.model.parameters()) for ema in self.emas]
        self.copied = [copies and index % 2 == 0 for index in range(len(SHAPES))]
        self.trained = [nn.Parameter(parameter.detach().bfloat16()) if copied and one_pass else parameter
                        for copied, parameter in zip(self.copied, self.parameters, strict=True)]
        self.one_pass = None
        if one_pass:
            self.one_pass = OnePass(self.optimizer, self.parameters[CLIPPED], clip_norm, averages, self.trained)

    def step(self, step, broken=False, without=()):
        """Move by gradients that depend on the step's number alone."""
        for index, trained in enumerate(self.trained):
            gradient = rand(*trained.shape, seed=100 * step + index).to(DEVICE) * 10.0 ** (index - 3)
            if self.copied[index]:
                gradient = gradient.bfloat16().to(trained.dtype)
            trained.grad = None if index in without else gradient
        self.finish(broken)

    def finish(self, broken=False):
        clipped = self.parameters[CLIPPED]
        if self.one_pass is not None:
            norm = torch.nn.utils.get_total_norm([p.grad.float() for p in self.trained[CLIPPED] if p.grad is not None])
            self.one_pass.step(None if self.clip_norm is None else norm, torch.tensor(broken, device=DEVICE),
                               SHARES[:len(self.emas)])
        elif not broken:
            if self.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(clipped, self.clip_norm)
            self.optimizer.step()
            for ema, share in zip(self.emas, SHARES, strict=False):
                ema.update(self.network, 1 - share)

    def state(self):
        found = {f"weight {index}": parameter.detach() for index, parameter in enumerate(self.parameters)}
        found |= {f"{name} {index}": value for index, parameter in enumerate(self.parameters)
                  for name, value in self.optimizer.state.get(parameter, {}).items()}
        return found | {f"average {which} {index}": value for which, ema in enumerate(self.emas)
                        for index, value in enumerate(ema.model.parameters())}


def assert_same(side, other):
    mine, wanted = side.state(), other.state()
    assert mine.keys() == wanted.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, wanted[name], rtol=2e-6, atol=2e-7 * wanted[name].abs().max().item(),
                                   check_device=False, msg=lambda text, name=name: f"{name}: {text}")


@on_device
@pytest.mark.parametrize("options", [{"weight_decay": 0.0}, {"weight_decay": 0.3, "eps": 0.1}], ids=str)
@pytest.mark.parametrize("clip_norm", [None, 0.05, 1e6])
@pytest.mark.parametrize("num_averages", [1, 2])
def test_several_steps_and_a_broken_one_equal_those_of_torch(clip_norm, options, num_averages):
    pair = [Side(clip_norm, one_pass=one_pass, num_averages=num_averages, **options) for one_pass in (True, False)]
    for step, broken in enumerate([False, False, True, False]):
        before = {name: value.clone() for name, value in pair[0].state().items()}
        for side in pair:
            side.step(step, broken)
        assert_same(*pair)
        after = pair[0].state()
        assert all(torch.equal(value, after[name]) for name, value in before.items()) == broken
    assert all(value == 1 for value in pair[0].behind)


@on_device
def test_copies_train_in_bf16_and_are_the_weights_rounded():
    pair = [Side(0.5, one_pass=one_pass, copies=True) for one_pass in (True, False)]
    for step in range(3):
        for side in pair:
            side.step(step, broken=step == 1)
        assert_same(*pair)
    mine = pair[0]
    for copied, trained, parameter in zip(mine.copied, mine.trained, mine.parameters, strict=True):
        assert (trained is parameter) != copied
        torch.testing.assert_close(trained.detach(), parameter.detach().to(trained.dtype), rtol=ONE_BIT, atol=0)


@on_device
def test_the_corrections_of_the_first_and_the_hundred_thousandth_step_are_exact():
    for past in (0, 99_999):
        pair = [Side(None, one_pass=one_pass) for one_pass in (True, False)]
        for side in pair:
            side.step(0)
            for state in side.optimizer.state.values():
                state["step"].fill_(past)
            side.step(1)
        assert_same(*pair)


@on_device
def test_a_parameter_without_a_gradient_stays_and_its_averages_still_move():
    pair = [Side(0.5, one_pass=one_pass) for one_pass in (True, False)]
    for step, without in enumerate([(1, 3), (3, 6), ()]):
        for side in pair:
            side.step(step, without=without)
            with torch.no_grad():
                side.parameters[3].add_(1)  # moved by somebody else
    assert_same(*pair)


@on_device
def test_tensors_at_odd_addresses_are_moved_alike():
    pair = [Side(0.5, one_pass=True, offset=offset) for offset in (1, 0)]
    for step in range(2):
        for side in pair:
            side.step(step)
    assert [side.one_pass.table[ALIGNED.value].tolist() for side in pair] == [[0] * len(SHAPES), [1] * len(SHAPES)]
    assert_same(*pair)


@on_device
def test_addresses_are_sent_anew_where_they_have_changed_and_only_there():
    side, plain = Side(0.5, one_pass=True), Side(0.5, one_pass=False)
    side.step(0), plain.step(0)
    for moved in (False, True):
        table = side.one_pass.table
        for index, (parameter, theirs) in enumerate(zip(side.parameters, plain.parameters, strict=True)):
            gradient = rand(*parameter.shape, seed=50 + index).to(DEVICE)
            theirs.grad = gradient.clone()
            if moved:
                parameter.grad = gradient
            else:
                parameter.grad.copy_(gradient)
        side.finish(), plain.finish()
        assert (side.one_pass.table is table) == (not moved)
    assert_same(side, plain)


def trainers(*overrides):
    """Return a trainer whose update is one pass, and one whose update is torch's operators as on a GPU."""
    overrides = ["training.clip_norm=0.05", "training.warmup_images=100", *overrides]  # the rate changes each step
    if not INTERPRETED:
        config = tiny_config(*overrides)
        alone, plain = (Trainer(config, 0, load_data(config.data, config.model), torch.device(DEVICE))
                        for _ in range(2))
        plain.one_pass = None
        return alone, plain
    alone, plain = (make_trainer(*overrides, on_device=True) for _ in range(2))
    alone.one_pass = OnePass(alone.optimizer, alone.clipped, 0.05, alone.averaged, alone.trained)
    return alone, plain


def assert_near(mine, wanted, relative):
    assert list(mine) == list(wanted)
    for name, value in mine.items():
        assert value.dtype == wanted[name].dtype and value.shape == wanted[name].shape
        error, size = ((value - wanted[name]).double().norm(), wanted[name].double().norm())
        assert error <= relative * size, f"{name}: {error:.1e} of {size:.1e}"


@on_device
@pytest.mark.parametrize("overrides", [[], ["training.ema_buffers=average", "training.extra_ema_half_lives=[100]"],
                                       ["training.expert_rate=0.25"]], ids=str)
def test_a_trainer_takes_the_same_steps_in_one_pass_and_its_state_is_that_of_another(overrides):
    alone, plain = trainers(*overrides)
    assert alone.one_pass is not None and plain.one_pass is None
    for _ in range(3):
        assert_near(alone.train_step(), plain.train_step(), 1e-4)
    saved = {name: value.clone() for name, value in alone.state().items()}
    assert_near(saved, plain.state(), 1e-3)
    for trainer in (alone, plain):
        trainer.load_state({name: value.clone() for name, value in saved.items()}, 3)
        trainer.train_step()
    assert_near(alone.state(), plain.state(), 1e-4)


def move_shares(world, folder):
    """Be one of several processes that train under FSDP, in one pass and by torch's operators; keep both states."""
    config = tiny_config("runtime.parallel=fsdp", "model.moe.pool_scope=global", "training.clip_norm=0.05")
    for one_pass in (True, False):
        trainer = Trainer(config, 0, load_data(config.data, config.model), torch.device("cpu"), world)
        if one_pass:
            trainer.one_pass = OnePass(trainer.optimizer, trainer.clipped, 0.05, trainer.averaged, trainer.trained)
        norms = [trainer.train_step()[GRADIENT_NORM] for _ in range(3)]
        state = trainer.state() | {"norms": torch.stack(norms)}
        if world.is_main:
            save_weights(folder / f"{one_pass}.safetensors", state, {})


@pytest.mark.skipif(not INTERPRETED, reason="two processes need Triton's interpreter here")
def test_shares_of_two_processes_move_as_torch_moves_them(tmp_path):
    run_together(move_shares, tmp_path)
    mine, wanted = (load_weights(tmp_path / f"{one_pass}.safetensors")[0] for one_pass in (True, False))
    assert_near(mine, wanted, 1e-4)


def copies_and_weights(trainer):
    """Return all that a process computes with, and the weights behind it, rounded."""
    weights = [whole(parameter).detach().to(copied.dtype)
               for copied, parameter in zip(trainer.trained, trainer.parameters, strict=True)]
    return [torch.cat([tensor.detach().float().flatten() for tensor in tensors])
            for tensors in (trainer.trained, weights)]


def train_copies(world, folder):
    """Be one of several processes whose bf16 copies train, with the weights behind them shared out and whole."""
    config = tiny_config("model.moe.pool_scope=global", "training.precision=bf16", "training.clip_norm=0.05",
                         "training.extra_ema_half_lives=[100]")
    parallel.SENT_TOGETHER = 1000  # several times in a backward
    for name, least in {"shared": 32, "whole": 2**40}.items():
        with (mock.patch.object(RunConfig, "trains_copies", lambda *_: True),
              mock.patch.object(parallel, "LEAST_SENT", least),
              mock.patch("diffmoe.training.trainer.one_pass_applies", lambda _: True)):
            trainer = Trainer(config, 0, load_data(config.data, config.model), torch.device("cpu"), world)
        trainer.optimizer.defaults["fused"] = True
        losses = [trainer.train_step() for _ in range(2)]
        saved = {name: value.clone() for name, value in trainer.state().items()}
        if world.is_main:
            save_weights(folder / "saved.safetensors", saved, {})
        largest, first = max(trainer.trained, key=torch.numel), torch.tensor(0)
        hook = largest.register_hook(lambda gradient: gradient.index_fill(0, first, math.inf))  # in rank 0's part
        trainer.train_step()
        after = trainer.state()
        assert [key for key, value in saved.items() if not torch.equal(after[key], value)] == []
        hook.remove()
        trainer.train_step()
        copies, weights = copies_and_weights(trainer)
        torch.testing.assert_close(copies, weights, rtol=ONE_BIT, atol=0)
        assert (world.gather(copies[None]) == copies).all()
        dist.barrier()
        trainer.load_state(load_weights(folder / "saved.safetensors")[0], 2)
        assert torch.equal(*copies_and_weights(trainer))
        trainer.train_step()
        state = trainer.state()
        state |= {"losses": torch.stack([torch.stack(list(each.values())) for each in losses])}
        averages = [item for average in trainer.averages().values() for item in average.items()]
        state |= {f"average {key}": value.clone() for key, value in averages}
        if world.is_main:
            save_weights(folder / f"{name}.safetensors", state, {})
        held = sum(mine.numel() for mine in local(trainer.parameters)) / len(copies)
        assert (held < 1.2 / world.size) == (len(trainer.one_pass.launches) > 1) == (name == "shared")


@pytest.mark.skipif(not INTERPRETED, reason="several processes need Triton's interpreter here")
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_weights_shared_out_behind_copies_move_as_whole_ones(tmp_path, count):
    run_together(train_copies, tmp_path, count)
    mine, wanted = (load_weights(tmp_path / f"{name}.safetensors")[0] for name in ("shared", "whole"))
    if count == 2:
        assert_near(mine, wanted, 1e-5)
    else:  # a sum of two bf16 gradients is rounded once, of four up to three times; weights of size 0 show it enlarged
        assert_near(*({name: value for name, value in state.items() if name.endswith(".exp_avg")}
                      for state in (mine, wanted)), ONE_BIT)


@on_device
@pytest.mark.parametrize("rule", EmaBuffers)
def test_a_gradient_that_is_not_finite_changes_nothing_in_one_pass(rule):
    alone, _ = trainers(f"training.ema_buffers={rule}")
    alone.train_step()
    before = {name: value.clone() for name, value in alone.state().items()}
    spoil_gradient(alone)
    alone.train_step()
    assert not alone.objective.isfinite()
    assert [name for name, value in alone.state().items() if not torch.equal(value, before[name])] == []


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_the_pass_is_for_plain_float32_on_a_gpu():
    assert not one_pass_applies([torch.zeros(2)])
    if torch.cuda.is_available():
        value = torch.zeros(4, 4, device="cuda")
        assert one_pass_applies([value, nn.Parameter(value)])
        assert not one_pass_applies([value, value.double()])
        assert not one_pass_applies([value, value.T])
