"""What the diagnosis says of a network: against arithmetic, nested loops and autograd; what it must leave alone."""

from __future__ import annotations

import copy
import json
import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from conftest import ROUTERS, random_model, run_config
from torch import Tensor

from diffmoe.config import RunConfig
from diffmoe.data import ImageData
from diffmoe.diffusion import build_process
from diffmoe.evaluation.diagnosis import NUM_LEVELS, diagnose
from diffmoe.models.dit import DiT, build_model
from diffmoe.moe.routing import Router, Routing
from diffmoe.training.trainer import Batch, Trainer

CPU = torch.device("cpu")
BATCH, TOKENS, EXPERTS, CLASSES = 6, 16, 4, 10
PROCESSES = {"flow": {}, "ddpm": {"diffusion.process": "ddpm", "sampling.sampler": "ddim", "model.learn_sigma": True}}


class Halves(Router):
    """Expert 0 takes every second image with weight 1/2, expert 1 all images with 1/4; the first passes everywhere."""

    def forward(self, x_BTD: Tensor, row_bound: float | None = None) -> Routing:
        tokens = torch.arange(x_BTD.shape[0] * x_BTD.shape[1])
        even = tokens[tokens // x_BTD.shape[1] % 2 == 0]
        counts = torch.tensor([len(even), len(tokens), 0, 0], dtype=torch.int32)
        return Routing(token_N=torch.cat([even, tokens]), tokens_per_expert=counts,
                       gate_N=torch.cat([torch.full((len(even),), 0.5), torch.full((len(tokens),), 0.25)]))

    def passes(self, x_BTD: Tensor) -> Tensor:
        return torch.arange(EXPERTS).expand(x_BTD.shape[0] * x_BTD.shape[1], -1) == 0


def digits(num_images: int = 40, seed: int = 0) -> ImageData:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (num_images, 3, 8, 8), generator=generator).to(torch.uint8)
    return ImageData("noise", images, torch.arange(num_images) % CLASSES, CLASSES)


def config_of(router: str | dict | None, **changes: Any) -> RunConfig:
    return run_config({"training.batch_size": BATCH, "training.num_images": 60} | changes, router)


def drawn_batch(config: RunConfig, seed: int = 0) -> Batch:
    """Return the batch that a diagnosis looks at: the one after the last of the training."""
    return Trainer(config, seed, digits(), CPU).batch(config.training.num_images // BATCH)


def flat(nested: Any) -> list[float | None]:
    return [number for part in nested for number in flat(part)] if isinstance(nested, list) else [nested]


def assert_close(found: list, expected: Any) -> None:
    """Compare numbers of four significant digits."""
    assert flat(found) == pytest.approx(flat(torch.as_tensor(expected).tolist()), rel=6e-4, abs=1e-9)


def test_a_hand_made_router_gives_what_arithmetic_says():
    found = diagnose(build_model(config_of({"kind": f"{__name__}:Halves"}).model).eval(),
                     config_of({"kind": f"{__name__}:Halves"}), 0, digits())
    for name, value in {"pair": (0.5 / 2 + 0.25) / 1.5, "token": 0.5 / 2 + 0.25}.items():
        assert_close(found["gates"][name], torch.full((2, NUM_LEVELS), value))
    assert_close(found["capacity"], torch.full((2, NUM_LEVELS), 1.5))
    load = torch.tensor([0.5, 1, 0, 0])[None, :, None]
    assert_close(found["load_by_level"], load.expand(2, -1, NUM_LEVELS))
    assert_close(found["passes"]["precision"], torch.full((2, NUM_LEVELS), 0.5))
    assert_close(found["passes"]["recall"], torch.full((2, NUM_LEVELS), 0.5 / 1.5))
    assert "thresholds" not in found


def test_the_size_of_a_branch_is_that_of_what_is_added_behind_its_gate():
    """Constant branches on a stream of positions, half of whose squares are sin^2 and half cos^2."""
    config = config_of({"kind": f"{__name__}:Halves"}, **{"model.depth": 2})
    model = build_model(config.model).eval()
    for parameter in model.parameters():
        parameter.detach().zero_()
    model.blocks[0].ffn.fc2.bias.detach().fill_(3.0)
    model.blocks[1].ffn.experts.b2.detach().fill_(-2.0)
    for block, gate in zip(model.blocks, (0.5, 0.25), strict=True):
        block.adaln[1].bias.detach().view(6, -1)[5].fill_(gate)
    found = diagnose(model, config, 0, digits())["blocks"]
    mixture = 2 * math.sqrt((0.75**2 + 0.25**2) / 2)
    after_first = (model.positions + 1.5).square().mean().sqrt()
    assert found["is_moe"] == [False, True]
    assert_close(found["rms"], [[3.0] * NUM_LEVELS, [mixture] * NUM_LEVELS])
    assert_close(found["share"], [[1.5 / math.sqrt(0.5)] * NUM_LEVELS, [0.25 * mixture / after_first] * NUM_LEVELS])


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("router", ROUTERS)
def test_gates_loads_and_passes_are_those_of_nested_loops_over_the_pairs(router, process):
    config = config_of(router, **PROCESSES[process])
    model = random_model(router, learn_sigma=config.model.learn_sigma).eval()
    batch = drawn_batch(config)
    sums: dict[tuple, float] = defaultdict(float)
    for training in (False, True):
        for turn in range(NUM_LEVELS):
            levels = [(image + turn) % NUM_LEVELS if training else turn for image in range(BATCH)]
            add_up(sums, copy.deepcopy(model).train(training), build_process(config.diffusion), batch, levels)
    found = diagnose(model, config, 0, digits())
    assert found["batch"] == config.training.num_images // BATCH
    assert_close(found["loss"], [sums["loss", False, level] / BATCH for level in range(NUM_LEVELS)])
    assert_close(found["mixed_loss"], [sums["loss", True, level] / BATCH for level in range(NUM_LEVELS)])
    tokens = BATCH * TOKENS
    for layer in range(2):
        for level in range(NUM_LEVELS):
            def total(name: str, training: bool, place: tuple = (layer, level)) -> float:
                return sum(value for key, value in sums.items() if key[:4] == (name, training, *place))

            assert_close([found["capacity"][layer][level]], [total("pairs", False) / tokens])
            assert_close([found["gates"]["token"][layer][level]], [total("weight", False) / tokens])
            assert_close([found["gates"]["pair"][layer][level]], [total("weight", False) / total("pairs", False)])
            assert_close([by[level] for by in found["load_by_level"][layer]],
                         [sums["pairs", True, layer, level, expert] / tokens for expert in range(EXPERTS)])
            if "passes" in found:
                hits = total("hits", True)
                assert_close([found["passes"]["precision"][layer][level]], [hits / total("passed", True)])
                assert_close([found["passes"]["recall"][layer][level]], [hits / total("pairs", True)])
        for label in range(CLASSES):
            images = (batch.labels == label).sum().item() * NUM_LEVELS
            load = [by[label] for by in found["load_by_class"][layer]]
            if images == 0:
                assert load == [None] * EXPERTS
                continue
            assert_close(load, [sums["class", layer, label, expert] / (images * TOKENS) for expert in range(EXPERTS)])
    has_threshold = router not in ("tc", "ec")
    assert ("passes" in found) == ("thresholds" in found) == has_threshold
    if has_threshold:
        assert_close(found["thresholds"], [layer.router.threshold.tolist() for layer in model.moe_layers().values()])


@torch.no_grad()
def add_up(sums: dict[tuple, float], model: DiT, process: Any, batch: Batch, levels: list[int]) -> None:
    """Call the network once and count its pairs one by one."""
    t = process.even_times(NUM_LEVELS)[levels]
    inputs: list[Tensor] = []
    for layer in model.moe_layers().values():
        layer.router.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    output = model(process.add_noise(batch.images, batch.noise, t), t, batch.labels)
    target = batch.noise if t.dtype is torch.int64 else batch.images - batch.noise
    for level, prediction, wanted in zip(levels, output.prediction, target, strict=True):
        sums["loss", model.training, level] += (prediction[:3] - wanted).square().mean().item()
    for index, (routing, layer) in enumerate(zip(output.routings, model.moe_layers().values(), strict=True)):
        mask = routing.mask(len(levels) * TOKENS, EXPERTS)
        scores, passes = layer.router.scores(inputs[index]), layer.router.passes(inputs[index])
        for token in range(len(mask)):
            level, label = levels[token // TOKENS], batch.labels[token // TOKENS].item()
            for expert in range(EXPERTS):
                taken, passed = bool(mask[token, expert]), passes is not None and bool(passes[token, expert])
                key = model.training, index, level
                sums["pairs", *key, expert] += taken
                sums["weight", *key, expert] += taken * scores[token, expert].item()
                sums["passed", *key, expert] += passed
                sums["hits", *key, expert] += taken and passed
                if model.training:
                    sums["class", index, label, expert] += taken


def test_a_fixed_count_is_shared_out_by_level_in_the_trainings_pools_alone():
    """EC takes as much of every image; DiffMoE, static, as much at each level of sampling, but not in training."""
    ec, batch_pool = (diagnose(random_model(router).eval(), config_of(router), 0, digits())
                      for router in ("ec", "diffmoe_static"))
    for found in (ec, batch_pool):
        assert_close(found["capacity"], torch.ones(2, NUM_LEVELS))
    assert_close(ec["load_by_level"], torch.full((2, EXPERTS, NUM_LEVELS), 0.25))
    shared = torch.tensor(batch_pool["load_by_level"])
    assert shared.std(-1).min() > 0.01
    assert_close(shared.mean((1, 2)).tolist(), [0.25, 0.25])


@pytest.mark.parametrize("router", ["diffmoe", "tc", None])
def test_norms_of_gradients_are_those_of_autograd(router):
    config = config_of(router, **{"training.batch_size": BATCH})
    model = random_model(router).train()
    batch = drawn_batch(config)
    t = batch.times[:, None, None, None]
    output = model(t * batch.images + (1 - t) * batch.noise, batch.times, batch.labels)
    loss = (output.prediction[:, :3] - (batch.images - batch.noise)).square().mean() + sum(output.losses().values())
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = diagnose(model.eval(), config, 0, digits())
    of_part = {"embedding": ("patch_embed", "time_embed", "label_embed"), "attention": (".attn.",),
               "adaln": ("0.adaln.", "1.adaln.", "2.adaln.", "3.adaln."), "router": (".router.gate",),
               "predictor": (".router.predictor",), "experts": (".experts.",), "ffn": (".fc1.", ".fc2."),
               "final": ("final.",)}
    of_part = {part: marks for part, marks in of_part.items() if any(mark in name for name in names for mark in marks)}
    assert found["gradients"].keys() == found["weights"].keys() == of_part.keys()
    counted = 0
    for part, marks in of_part.items():
        chosen = [index for index, name in enumerate(names) if any(mark in name for mark in marks)
                  and (part == "final") == name.startswith("final.")]
        counted += len(chosen)
        for kind, tensors in (("gradients", gradients), ("weights", parameters)):
            square = sum(tensors[index].double().square().sum() for index in chosen if tensors[index] is not None)
            assert_close([found[kind][part]], [square.sqrt().item()])
    assert counted == len(names)


@pytest.mark.parametrize("changes", [{}, {"model.moe.shared_experts": 1}, {"model.moe.pool_scope": "global"},
                                     {"runtime.micro_batch_size": 2, "model.moe.router.pool_images": 2},
                                     {"training.precision": "bf16"}, {"training.precision": "fp64"},
                                     {"sampling.batch_size": 4}, {"model.moe.router.predictor": False,
                                                                  "model.moe.router.inference": "static"}])
def test_nothing_is_changed_and_the_same_again_is_the_same(changes):
    config = config_of("diffmoe", **changes)
    model = build_model(config.model, 3).eval().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    first = diagnose(model, config, 0, digits())
    assert torch.equal(random_state, torch.get_rng_state())
    torch.manual_seed(6)
    assert first == diagnose(model, config, 0, digits()) == json.loads(json.dumps(first, allow_nan=False))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert first != diagnose(model, config, 1, digits())


def test_the_diagnosis_of_many_classes_leaves_classes_out():
    config = config_of("diffmoe", **{"model.num_classes": 40})
    data = ImageData("noise", digits().images, torch.arange(40), 40)
    assert "load_by_class" not in diagnose(build_model(config.model).eval(), config, 0, data)


def test_evenly_spaced_times_are_middles_from_noise_to_data():
    flow, ddpm = (build_process(run_config(changes).diffusion) for changes in PROCESSES.values())
    torch.testing.assert_close(flow.even_times(5), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    assert ddpm.even_times(10).tolist() == list(range(950, 0, -100))
    for process in (flow, ddpm):
        data, noise = torch.ones(4, 1, 1, 1), torch.full((4, 1, 1, 1), -1.0)
        assert (process.add_noise(data, noise, process.even_times(4)).flatten().diff() > 0).all()
