"""What sampling measures of every token, inference options that move after training, and a record's example images."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from conftest import random_model, run_config
from fake_records import fake_record

from diffmoe.cells import activation
from diffmoe.config import RunConfig, load_config
from diffmoe.evaluation import sampling, together
from diffmoe.evaluation.grid import decode_examples, examples
from diffmoe.evaluation.sampling import Samples, sample_images
from diffmoe.evaluation.together import sample_together
from diffmoe.models.dit import DiT, build_model
from diffmoe.train import CONFIGS


def diffmoe_config(*overrides: str) -> RunConfig:
    return load_config([CONFIGS / "digits.yaml"], [*overrides])


def noisy(config: RunConfig) -> DiT:
    """Return a DiffMoE whose every weight is random, so that nothing is zero by initialisation."""
    model = build_model(config.model)
    for index, tensor in enumerate(model.parameters()):
        torch.nn.init.normal_(tensor.detach(), std=0.3, generator=torch.Generator().manual_seed(index))
    for layer in model.moe_layers().values():
        layer.router.threshold.fill_(0.5)
    return model.eval()


def recorded_masks(model: DiT) -> list[torch.Tensor]:
    """Return a list that fills with the mask (S, E) of every layer and call."""
    masks = []
    for layer in model.moe_layers().values():
        layer.register_forward_hook(lambda module, inputs, output: masks.append(
            output[1].mask(inputs[0].shape[0] * inputs[0].shape[1], module.router.num_experts)))
    return masks


@pytest.mark.parametrize("guidance", [[], ["sampling.guidance_scale=1.5"],
                                      ["sampling.guidance_scale=1.5", "sampling.guided_forward=joint"]])
def test_the_load_of_each_token_is_counted_from_the_masks(guidance, monkeypatch):
    monkeypatch.setattr(sampling, "FIRST_ROW_BOUND", 8)  # no batch is run again
    config = diffmoe_config("sampling.num_steps=3", "sampling.batch_size=100", *guidance)
    model = noisy(config)
    masks = recorded_masks(model)
    samples = sample_images(model, config, range(5))
    pairs = torch.stack([mask.sum(1).view(-1, 5, 16).float().mean(0) for mask in masks])  # halves of a guided batch
    pairs = pairs.view(-1, 2, 5, 16).mean(1)  # two layers a call
    assert pairs.std(dim=(0, 1)).min() > 0
    torch.testing.assert_close(samples.token_load, pairs.mean(0))
    torch.testing.assert_close(samples.position_load, pairs.mean(1))
    torch.testing.assert_close(samples.capacity, pairs.mean(2))
    assert samples.capacity.shape[1] == len(samples.labels) == 5


def test_the_loads_of_unequal_batches_are_one_mean():
    config = diffmoe_config("sampling.num_steps=2", "sampling.batch_size=2")
    samples = sample_images(noisy(config), config, range(5))
    assert samples.token_load.shape == (5, 16)
    torch.testing.assert_close(samples.token_load.mean(0), samples.position_load.mean(0))
    torch.testing.assert_close(samples.token_load.mean(1), samples.capacity.mean(0))


@pytest.mark.parametrize("dense", [[], ["model.moe=null"]])
def test_two_processes_draw_what_one_does(dense, monkeypatch, tmp_path):
    monkeypatch.setattr(together, "sample_images", lambda *_: pytest.fail("it drew by itself"))
    config = diffmoe_config("sampling.num_steps=2", "sampling.batch_size=2", *dense)
    seeds = [7, 3, 3, 0, 12]  # three batches: one process has two
    model = noisy(config)
    ours, wanted = sample_together(model, config, seeds, 2, tmp_path), sample_images(model, config, seeds)
    assert torch.equal(ours.images, wanted.images) and torch.equal(ours.labels, wanted.labels)
    assert list(tmp_path.iterdir()) == []
    assert (ours.capacity is None) == bool(dense)
    for name in () if dense else ("capacity", "expert_load", "position_load", "token_load"):
        torch.testing.assert_close(getattr(ours, name), getattr(wanted, name))


def test_a_batch_is_for_one_process(tmp_path):
    config = diffmoe_config("sampling.num_steps=2")
    samples = sample_together(noisy(config), config, range(3), 8, tmp_path)
    assert torch.equal(samples.images, sample_images(noisy(config), config, range(3)).images)


def test_a_record_holds_the_load_by_position_in_all_calls_and_in_thirds():
    config = diffmoe_config()
    position_load = torch.arange(7.0)[:, None].expand(7, 16)  # 7 calls: thirds of 3, 2 and 2
    samples = Samples(torch.zeros(10, 1, 8, 8), torch.arange(10), torch.ones(7, 10), torch.ones(7, 2, 8), position_load,
                      torch.ones(10, 16))
    found = activation(config, samples)
    assert found["load_by_position"] == [3.0] * 16
    assert [third[0] for third in found["load_by_third"]] == [1.0, 3.5, 5.5]
    one_call = replace(samples, capacity=torch.ones(1, 10), position_load=position_load[:1])
    assert len(activation(config, one_call)["load_by_third"]) == 1


def test_a_global_threshold_is_the_threshold_of_every_expert():
    config = diffmoe_config("sampling.num_steps=2")
    filled = noisy(config)
    for layer in filled.moe_layers().values():
        layer.router.threshold.fill_(0.3)
    other = diffmoe_config("sampling.num_steps=2", "model.moe.router.global_threshold=0.3")
    ours, wanted = sample_images(filled, config, range(3)), sample_images(noisy(other), other, range(3))
    assert torch.equal(ours.images, wanted.images) and torch.equal(ours.capacity, wanted.capacity)
    assert not torch.equal(wanted.capacity, sample_images(noisy(config), config, range(3)).capacity)


@pytest.mark.parametrize("channels", [1, 3])
def test_examples_come_back_bit_for_bit_class_by_class(channels):
    images = torch.randint(256, (40, channels, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels = torch.arange(40) % 12
    found = json.loads(json.dumps(examples(images, labels, torch.arange(40.0)[:, None].expand(40, 64))))
    assert found["labels"] == [label for label in range(10) for _ in range(2)]
    chosen = [index for label in range(10) for index in (label, label + 12)]
    assert [load[0] for load in found["token_load"]] == chosen
    back = torch.from_numpy(decode_examples(found)).view(20, 32, 32, channels).permute(0, 3, 1, 2)
    assert torch.equal(back, images[chosen])


def test_a_dense_model_has_no_loads_and_latents_have_no_examples():
    assert "token_load" not in examples(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4), None)
    assert examples(torch.zeros(4, 4, 8, 8, dtype=torch.uint8), torch.arange(4), None) == {}


def test_a_record_of_the_size_of_cifar10_stays_small():
    images = torch.randint(256, (20, 3, 32, 32)).to(torch.uint8)  # noise: what a PNG cannot shrink
    load = torch.rand(20, 64)
    record = fake_record("diffmoe", 0)
    losses = [[25 * step, {"mse": 0.123456789012345, "predictor": 0.123456789012345}] for step in range(320)]
    record = replace(record, examples=examples(images, torch.arange(20) // 2, load),
                     training=record.training | {"losses": losses}, activation=record.activation | {
                         "load_by_position": load[0].tolist(), "load_by_third": load[:3].tolist()})
    assert len(json.dumps(asdict(record), indent=1)) < 300_000


def test_an_adaptive_solver_reports_the_mean_over_its_calls():
    model = random_model("diffmoe").eval()
    config = run_config({"sampling.sampler": "dopri5", "sampling.batch_size": 2})
    samples = sample_images(model, config, range(5))
    tokens = model.config.num_tokens
    assert samples.capacity.shape == (1, 5) and samples.position_load.shape == (1, tokens)
    torch.testing.assert_close(samples.expert_load.sum(-1).mean(), samples.capacity.mean())
    torch.testing.assert_close(samples.token_load.mean(1), samples.capacity[0])
