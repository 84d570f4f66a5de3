"""The weight average against its closed form; what the two rules do with buffers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import rand, random_model
from torch import nn

from diffmoe.config import EmaBuffers, TrainingConfig
from diffmoe.training.ema import Ema


def module(seed: int, steps: int | None = None) -> nn.Module:
    """Return a module with a trained and a frozen parameter, a float buffer and (with `steps`) an integer one."""
    holder = nn.Linear(3, 2)
    holder.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
    holder.register_buffer("running", torch.zeros(5))
    for index, value in enumerate([*holder.parameters(), holder.running]):
        value.data.copy_(rand(*value.shape, seed=10 * seed + index))
    if steps is not None:
        holder.register_buffer("steps", torch.tensor(steps))
    return holder


@pytest.mark.parametrize("decay", [0.9999, 0.9, 0.5])
@pytest.mark.parametrize("rule", EmaBuffers)
def test_after_n_updates_by_a_constant_model_decay_to_the_n_of_the_start_is_left(rule, decay):
    start, constant = module(1), module(2)
    ema = Ema(start, rule)
    for n in range(1, 21):
        ema.update(constant, decay)
        for name, value in ema.model.state_dict().items():
            v, left = constant.state_dict()[name], decay**n
            if rule is EmaBuffers.COPY and name == "running":
                left = 0
            torch.testing.assert_close(value, v + left * (start.state_dict()[name] - v), atol=2e-6, rtol=0)


def test_the_average_of_changing_models_is_their_weighted_sum():
    models, decay = [module(seed) for seed in range(6)], 0.7
    ema = Ema(models[0], EmaBuffers.AVERAGE)
    for model in models[1:]:
        ema.update(model, decay)
    weights = [decay**5] + [(1 - decay) * decay ** (5 - n) for n in range(1, 6)]
    assert sum(weights) == pytest.approx(1)
    for name, value in ema.model.state_dict().items():
        expected = sum(weight * model.state_dict()[name] for weight, model in zip(weights, models, strict=True))
        torch.testing.assert_close(value, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("decay", [0.9999, 0.5])
def test_copy_takes_buffers_bit_for_bit_integers_among_them(decay):
    ema = Ema(module(1, steps=0), EmaBuffers.COPY)
    for seed in (2, 3):
        model = module(seed, steps=1000 + seed)
        ema.update(model, decay)
        for name, buffer in model.named_buffers():
            copied = ema.model.get_buffer(name)
            assert copied.dtype == buffer.dtype and torch.equal(copied, buffer)
            assert copied.data_ptr() != buffer.data_ptr()
        assert not torch.equal(ema.model.weight, model.weight)


@pytest.mark.parametrize("rule", EmaBuffers)
def test_decay_zero_copies_everything_bit_for_bit_and_decay_one_keeps_the_parameters(rule):
    start, model = module(1), module(2)
    copied, kept = Ema(start, rule), Ema(start, rule)
    copied.update(model, 0.0)
    kept.update(model, 1.0)
    for name, value in model.state_dict().items():
        assert torch.equal(copied.model.state_dict()[name], value)
    for name, value in start.named_parameters():
        assert torch.equal(kept.model.get_parameter(name), value)


def test_the_average_is_a_detached_copy_in_eval_mode_that_takes_no_gradient():
    model = module(1).train()
    ema = Ema(model)
    assert ema.buffers is EmaBuffers.COPY and not ema.model.training and model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters()) and model.weight.requires_grad
    before = {name: value.clone() for name, value in ema.model.state_dict().items()}
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in ema.model.state_dict().items())
    ema.update(model, 0.9)
    assert all(parameter.grad_fn is None for parameter in ema.model.parameters())


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_an_average_by_width_is_as_wide_at_every_budget(width):
    training = TrainingConfig(batch_size=1, num_images=4000, ema_width=width)
    weights = np.zeros(4000)  # of each step's parameters in the average
    for step in range(1, 4001):
        decay = training.ema_decay(step)
        weights *= decay
        weights[step - 1] = 1 - decay
        if step in (1000, 4000):
            times = (np.arange(4000) + 0.5) / step
            mean = weights @ times
            assert weights.sum() == pytest.approx(1)
            assert weights @ (times - mean) ** 2 == pytest.approx(width**2, rel=0.02)


@pytest.mark.parametrize(("rule", "share"), [(EmaBuffers.COPY, 1.0), (EmaBuffers.AVERAGE, 1 - 0.999**5)])
def test_a_threshold_is_taken_as_it_is_or_pulled_towards_the_zero_that_it_started_from(rule, share):
    model = random_model("diffmoe")
    thresholds = [layer.router.threshold for layer in model.moe_layers().values()]
    learned = [threshold.clone() for threshold in thresholds]
    for threshold in thresholds:
        threshold.zero_()
    ema = Ema(model, rule)
    for threshold, value in zip(thresholds, learned, strict=True):
        threshold.copy_(value)
    for _ in range(5):
        ema.update(model, 0.999)
    for layer, value in zip(ema.model.moe_layers().values(), learned, strict=True):
        torch.testing.assert_close(layer.router.threshold, share * value, atol=1e-6, rtol=0)
    torch.testing.assert_close(ema.model.positions, model.positions, atol=1e-6, rtol=0)
