"""A loss or gradient that is no number changes nothing, is counted and named; spikes and idle experts are told."""

import math
from dataclasses import replace

import pytest
import torch
from processes import CPU, LOG_EVERY, images, tiny_config
from test_run import newest

from diffmoe.config import ConfigError
from diffmoe.data import ImageOrder, load_data
from diffmoe.training import run
from diffmoe.training.log import read_lines
from diffmoe.training.run import train_run
from diffmoe.training.trainer import Trainer
from diffmoe.training.watch import IDLE_STEPS, SPIKE_PAUSE, WINDOW, Watch

TOKEN_CHOICE = ["model.moe.router.kind=baselines.token_choice:TokenChoice"]


def make_trainer(*overrides, on_device=False):
    """Return a trainer; `on_device`: as on a GPU, where nobody looks at the flag."""
    config = tiny_config(*overrides)
    trainer = Trainer(config, 0, load_data(config.data, config.model), CPU)
    if on_device:
        groups = [{"params": group["params"]} for group in trainer.optimizer.param_groups]
        trainer.optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0, fused=True)
    return trainer


def spoil_loss(trainer):
    batch = trainer.batch
    trainer.batch = lambda *which: replace(batch(*which), images=batch(*which).images * math.nan)


def spoil_gradient(trainer):
    trainer.model.label_embed.weight.register_hook(lambda gradient: gradient * math.inf)


def spoil_predictor_gradient(trainer):
    bias = trainer.model.predictor_parameters()[-1]
    bias.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(1), math.nan))


@pytest.mark.fault("a loss or gradient that is not finite")
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("spoil", [spoil_loss, spoil_gradient, spoil_predictor_gradient])
@pytest.mark.parametrize("first", [0, 4])
def test_a_step_without_numbers_changes_nothing(spoil, on_device, first):
    trainer = make_trainer("training.clip_norm=1.0", on_device=on_device)
    for _ in range(first):
        trainer.train_step()
    before = {name: value.clone() for name, value in trainer.state().items()}
    spoil(trainer)
    trainer.train_step()
    assert not trainer.objective.isfinite()
    after = trainer.state()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert trainer.step == first + 1
    if first == 0:
        assert all((value == 0).all() for name, value in after.items() if name.startswith("optimizer"))


def with_too_few_rows(trainer, short):
    """Let a trainer find rows too few in so many layers of its next attempts, and an expert idle in all of them."""
    trainer.row_bound, captured = 1.0, trainer._captured

    def capture():
        plain = captured()

        def gradients(*inputs):
            losses, (*observed, overflow), counts = plain(*inputs)
            counts = counts.index_put((torch.tensor(0), torch.tensor(0)), counts.new_zeros(()))
            return losses, [*observed, overflow + (short.pop(0) if short else 0)], counts

        return gradients

    trainer._captured = capture
    trainer.gradients = capture()


@pytest.mark.parametrize("on_device", [False, True])
def test_a_step_with_too_few_rows_is_made_again_and_counts_once(on_device):
    plain, bounded = (make_trainer("training.clip_norm=1.0", on_device=on_device) for _ in range(2))
    with_too_few_rows(plain, [])
    with_too_few_rows(bounded, [0, 2, 1, 0])  # twice in the second step
    for trainer in (plain, bounded):
        losses = [trainer.train_step() for _ in range(4)]
        trainer.losses_seen = torch.stack([torch.stack(list(step.values())) for step in losses])
    assert bounded.row_bound == 4.0 and bounded.step == bounded.idle_LE[0, 0] == 4
    assert torch.equal(plain.losses_seen, bounded.losses_seen)
    after = bounded.state()
    assert [name for name, value in plain.state().items() if not torch.equal(after[name], value)] == []


@pytest.mark.parametrize("system", [[], TOKEN_CHOICE, ["model.moe=null"]])
def test_the_way_of_a_gpu_gives_the_same_steps_as_that_of_a_cpu(system):
    system = [*system, "training.precision=fp64"]
    here, there = make_trainer(*system), make_trainer(*system, on_device=True)
    for _ in range(5):
        here.train_step(), there.train_step()
    mine, other = here.state(), there.state()
    for name, value in mine.items():
        torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-12, check_dtype=False)


@pytest.fixture
def frequent(monkeypatch):
    monkeypatch.setattr(run, "LOG_EVERY", LOG_EVERY)
    monkeypatch.setattr(run, "SAVE_EVERY_S", 0.0)


def spoil_steps(monkeypatch, *steps):
    """Spoil the losses of optimiser steps, counted from 1."""
    batch = Trainer.batch

    def spoiled(self, step, rows):
        found = batch(self, step, rows)
        if step + 1 in steps:
            found.images.mul_(math.nan)
        return found

    monkeypatch.setattr(Trainer, "batch", spoiled)


def train(folder, *overrides):
    config = tiny_config(images(40), *overrides)
    return train_run(config, 0, load_data(config.data, config.model), folder, CPU)


@pytest.mark.fault("steps without numbers, among others")
def test_steps_without_numbers_are_counted_with_their_images_and_training_goes_on(tmp_path, monkeypatch, frequent, rng):
    spoiled = [rng.randrange(1, 20), 5 * rng.randrange(4, 8)]  # the second one's losses would be logged
    spoil_steps(monkeypatch, *spoiled)
    finished = train(tmp_path)
    order = ImageOrder(1797, 0)
    assert read_lines(tmp_path / "events.jsonl") == [
        {"step": step, "event": "not finite", "skipped": count, "images": order.indices(4 * (step - 1), 4).tolist()}
        for count, step in enumerate(spoiled, 1)]
    assert [step for step, _ in finished.losses()] == [step for step in range(5, 41, 5) if step not in spoiled]
    assert finished.description["watch"]["skipped"] == 2


@pytest.mark.fault("too many steps without numbers")
def test_too_many_steps_without_numbers_stop_the_run_with_a_checkpoint_from_before(tmp_path, monkeypatch, frequent):
    spoil_steps(monkeypatch, 3, *range(22, 41))
    with pytest.raises(ConfigError, match=r"step 25: 5 steps changed nothing.*events\.jsonl"):
        train(tmp_path, "runtime.max_skipped_steps=4")
    assert newest(tmp_path)["step"] == 20
    assert not (tmp_path / "ema.safetensors").exists()
    monkeypatch.undo()
    assert train(tmp_path, "runtime.max_skipped_steps=4").description["watch"]["skipped"] == 1  # step 3, not forgotten


@pytest.mark.fault("a loss that spikes")
def test_a_spike_is_told_once_and_noise_is_not():
    generator = torch.Generator().manual_seed(0)
    losses = (1 + 0.1 * torch.randn(2 * WINDOW, generator=generator)).tolist()
    watch = Watch()
    assert watch.steps(1, losses) == []
    (event,) = watch.steps(401, [3.0, 3.0, 1.0])
    assert (event["step"], event["event"], event["loss"]) == (401, "loss spike", 3.0)
    assert 0.9 < event["median"] < 1.1
    assert [event["step"] for event in watch.steps(404, [1.0] * SPIKE_PAUSE + [5.0])] == [404 + SPIKE_PAUSE]


def test_what_a_watch_sees_does_not_depend_on_interruptions():
    losses = [1.0 + 0.01 * (step % 7) for step in range(500)]
    losses[100] = losses[333] = math.nan
    losses[310] = 9.0
    whole, events, parts = Watch(), [], Watch()
    expected = whole.steps(1, losses)
    for start in range(0, 500, 37):
        events += parts.steps(start + 1, losses[start:start + 37])
        parts = Watch(parts.state())
    assert events == expected and [event["step"] for event in events] == [101, 311, 334]


@pytest.mark.fault("an expert without tokens")
def test_an_expert_without_tokens_is_told_once(tmp_path, monkeypatch, frequent):
    trainer = make_trainer(*TOKEN_CHOICE)
    router = next(iter(trainer.model.moe_layers().values())).router
    logits = router.logits
    router.logits = lambda x: logits(x) - 1e9 * torch.tensor([0, 0, 1, 0])
    for _ in range(3):
        trainer.train_step()
    assert trainer.idle_LE.tolist()[0][2] == 3
    watch = Watch()
    assert watch.experts(25, [[0, 3], [IDLE_STEPS - 1, 0]]) == []
    assert watch.experts(50, [[0, 3], [IDLE_STEPS, 0]]) == [
        {"step": 50, "event": "expert without tokens", "layer": 1, "expert": 0, "steps": IDLE_STEPS}]
    assert Watch(watch.state()).experts(75, [[0, 3], [IDLE_STEPS + 25, 0]]) == []
    assert watch.experts(100, [[0, 0], [0, 0]]) == []
    assert len(watch.experts(2000, [[0, 0], [IDLE_STEPS, 0]])) == 1


@pytest.mark.parametrize("system", [[], ["model.moe.router.pool=sample"], ["model.moe=null"]])
def test_experts_that_choose_are_never_idle(system):
    trainer = make_trainer(*system)
    trainer.train_step()
    assert not trainer.idle_LE.any()
