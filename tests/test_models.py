"""The backbone: its start (adaLN-Zero, moments, seeds), its geometry against explicit loops, its sizes."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROUTERS, model_config, model_data, network_inputs, rand, random_model, randomise

from diffmoe.config import SIZES, ModelConfig, from_dict
from diffmoe.models.counting import count_parameters, flops_per_call
from diffmoe.models.dit import DiT, build_model
from diffmoe.models.layers import TimestepEmbedder, sincos_positions, unpatchify
from diffmoe.moe.layer import MoE

SYSTEMS = {"dense": None, "tc": "tc", "ec": "ec", "diffmoe": "diffmoe", "race": "race"}

# ---------------------------------------------------------------- the start


@pytest.mark.parametrize("router", [None, *ROUTERS])
@pytest.mark.parametrize("train", [True, False])
def test_at_the_start_every_block_is_the_identity_and_the_prediction_is_zero(router, train):
    model = build_model(model_config(router, shared_experts=1)).train(train)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append((args[0].total(), output[0].total())))
    output = model(*network_inputs(3))
    assert len(seen) == 4 and all(torch.equal(x, y) and x.any() for x, y in seen)
    assert output.prediction.shape == (3, 6, 8, 8) and not output.prediction.any()


D, F_SIZE, EXPERTS = 64, 256, 8
XAVIER = {  # (fan in, fan out) of each matrix
    r"patch_embed\.proj": (3 * 2 * 2, D), r"blocks\.\d\.attn\.qkv": (D, 3 * D), r"blocks\.\d\.attn\.proj": (D, D),
    r"blocks\.\d\.ffn\.fc1": (D, F_SIZE), r"blocks\.\d\.ffn\.fc2": (F_SIZE, D),
    r"blocks\.\d\.ffn\.shared\.fc1": (D, 2 * F_SIZE), r"blocks\.\d\.ffn\.shared\.fc2": (2 * F_SIZE, D),
    r"blocks\.\d\.ffn\.router\.predictor\.0": (D, D), r"blocks\.\d\.ffn\.router\.predictor\.2": (D, EXPERTS)}
EXPERT_FANS = {"w1": (D, F_SIZE), "w2": (F_SIZE, D)}


def check_uniform(name, value, bound):
    """Check the largest entry, the variance a^2 / 3 and the mean of U(-a, a), each within 5 standard errors."""
    size, top = value.numel(), value.abs().max().item()
    assert bound * (1 - 12 / size) <= top <= bound * (1 + 1e-6), f"{name}: {top} is not near {bound}"
    assert abs(value.square().mean().item() / (bound**2 / 3) - 1) < 5 * math.sqrt(0.8 / size), name
    assert abs(value.mean().item()) < 5 * bound / math.sqrt(3 * size), name


def check_normal(name, value, std):
    """Check mean, standard deviation and kurtosis of N(0, std), each within 5 standard errors."""
    z, size = value.double() / std, value.numel()
    assert abs(z.mean().item()) < 5 / math.sqrt(size), name
    assert abs(z.square().mean().item() - 1) < 5 * math.sqrt(2 / size), name
    assert abs((z**4).mean().item() - 3) < 5 * math.sqrt(96 / size), name


def check_start(name, value):
    stem, _, kind = name.rpartition(".")
    fans = [fans for pattern, fans in XAVIER.items() if re.fullmatch(pattern, stem) and kind == "weight"]
    if fans:
        check_uniform(name, value, math.sqrt(6 / sum(fans[0])))
    elif kind in EXPERT_FANS and stem.endswith("ffn.experts"):
        for expert, matrix in enumerate(value):
            check_uniform(f"{name}[{expert}]", matrix, math.sqrt(6 / sum(EXPERT_FANS[kind])))
    elif re.fullmatch(r"time_embed\.mlp\.[02]\.weight|label_embed\.weight", name):
        check_normal(name, value, 0.02)
    elif not name.endswith("router.gate.weight"):
        assert kind in ("bias", "b1", "b2") or re.search(r"adaln\.1\.weight|final\.linear\.weight", name), name
        assert not value.any(), f"{name} starts at zero"


@pytest.mark.parametrize("router", SYSTEMS.values(), ids=SYSTEMS)
def test_every_tensor_starts_with_the_moments_of_its_rule(router):
    model = build_model(model_config(router, hidden_size=D, num_experts=EXPERTS, shared_experts=2), seed=3)
    for name, value in model.named_parameters():
        check_start(name, value.detach())
    gates = [layer.router.gate.weight.detach() for layer in model.moe_layers().values()]
    for gate in gates:
        check_uniform("gate", gate, 1 / math.sqrt(D)) if router == "tc" else check_normal("gate", gate, 0.006)


def test_packed_experts_blocks_and_parameters_differ_from_one_another():
    model = build_model(model_config("diffmoe", num_experts=EXPERTS, depth=6))
    drawn = [matrix.flatten()[:64].tolist() for name, value in model.named_parameters()
             for matrix in (value.detach() if "experts.w" in name else [value.detach()]) if matrix.any()]
    assert len(drawn) == 3 * 8 * 2 + 6 * 2 + 3 * 2 + 3 * 3 + 4
    assert len({tuple(entries) for entries in drawn}) == len(drawn)


def states(*systems, seeds=(0,), **changes):
    return [build_model(model_config(system, **changes), seed).state_dict() for system in systems for seed in seeds]


@pytest.mark.parametrize("router", ["tc", "ec", "diffmoe", "race"])
def test_systems_of_one_seed_share_every_weight_but_the_gate_of_another_rule(router):
    dense, diffmoe, other = states(None, "diffmoe", router)
    for reference in (dense, diffmoe):
        common = [name for name in reference if name in other and not name.endswith("router.threshold")]
        differing = {name for name in common if not torch.equal(reference[name], other[name])}
        gates = {f"blocks.{index}.ffn.router.gate.weight" for index in (1, 3)}
        assert len(common) > 40 and differing == (gates if router == "tc" and reference is diffmoe else set())
    assert "blocks.1.ffn.experts.w1" in common


def test_a_weight_depends_on_seed_and_name_and_not_on_depth_experts_or_the_global_generator():
    torch.manual_seed(1)
    (base,) = states("diffmoe")
    torch.manual_seed(2)
    again, deep, wide = states("diffmoe")[0], states("diffmoe", depth=8)[0], states("diffmoe", num_experts=8)[0]
    assert all(torch.equal(value, again[name]) for name, value in base.items())
    assert all(torch.equal(value, deep[name]) for name, value in base.items())
    for name in ("w1", "w2"):
        packed = f"blocks.1.ffn.experts.{name}"
        assert torch.equal(base[packed], wide[packed][:4])


def test_another_seed_draws_every_random_tensor_anew():
    one, two = states("diffmoe", seeds=(0, 1))
    same = {name for name in one if torch.equal(one[name], two[name])}
    assert same == {name for name in one if not one[name].any()} | {"positions"}


def test_under_the_meta_device_nothing_is_allocated():
    with torch.device("meta"):
        model = build_model(from_dict(ModelConfig, model_data("diffmoe") | SIZES["XXXL"]))
    assert all(value.is_meta for value in model.state_dict().values())


# ---------------------------------------------------------------- sizes


def count(size: str, router=None, num_experts: int = 16) -> int:
    """Count a preset's parameters for latents 4x32x32, the position table included as the authors do."""
    moe = router and {"router": ROUTERS[router], "num_experts": num_experts}
    data = {"size": size, "input_size": 32, "patch_size": 2, "in_channels": 4, "num_classes": 1000, "moe": moe}
    with torch.device("meta"):
        model = DiT(from_dict(ModelConfig, data))
    return sum(parameter.numel() for parameter in model.parameters()) + model.positions.numel()


@pytest.mark.parametrize(("size", "router", "number"), [
    # counted by building the authors' models
    ("S", None, 32_963_360), ("B", None, 130_512_416), ("L", None, 458_102_816),
    ("S", "tc", 139_341_344), ("S", "ec", 139_341_344), ("B", "tc", 555_605_024), ("B", "ec", 555_605_024),
    ("L", "ec", 1_969_170_464), ("S", "diffmoe", 140_265_344), ("B", "diffmoe", 559_222_400)])
def test_a_preset_has_the_parameters_of_the_authors_model(size, router, number):
    assert count(size, router) == number


@pytest.mark.parametrize(("size", "millions"), [("XL", 675), ("XXL", 951), ("XXXL", 1353)])
def test_a_preset_has_the_printed_parameter_count(size, millions):
    assert round(count(size) / 1e6) == millions


@pytest.mark.parametrize(("interleave", "expected"), [(True, [1, 3, 5]), (False, [0, 1, 2, 3, 4, 5])])
def test_experts_sit_in_the_odd_blocks_or_in_all(interleave, expected):
    config = model_config("diffmoe", depth=6, interleave=interleave)
    assert [index for index in range(6) if config.is_moe_block(index)] == expected
    model = build_model(config)
    assert list(model.moe_layers()) == expected
    assert [index for index, block in enumerate(model.blocks) if isinstance(block.ffn, MoE)] == expected
    assert len(model(*network_inputs(2)).routings) == len(expected)
    assert not any(model_config(None, depth=6).is_moe_block(index) for index in range(6))


@pytest.mark.parametrize(("changes", "shape"), [
    ({"learn_sigma": True}, (2, 6, 8, 8)), ({"learn_sigma": False}, (2, 3, 8, 8)), ({"patch_size": 4}, (2, 6, 8, 8)),
    ({"patch_size": 1, "learn_sigma": False}, (2, 3, 8, 8)), ({"class_dropout_prob": 0}, (2, 6, 8, 8))])
@pytest.mark.parametrize("router", [None, "diffmoe"])
def test_the_prediction_has_the_shape_of_the_image_and_twice_its_channels_with_sigma(router, changes, shape):
    model = random_model(router, **changes)
    x, t, labels = network_inputs(2)
    assert model(x, t, labels % 10).prediction.shape == shape
    assert model.label_embed.num_embeddings == (10 if changes.get("class_dropout_prob") == 0 else 11)


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize(("width", "side"), [(8, 3), (32, 4), (384, 2)])
def test_positions_equal_the_formula_written_as_loops(width, side):
    quarter = width // 4
    expected = np.zeros((side * side, width))
    for row in range(side):
        for column in range(side):
            for half, position in enumerate((column, row)):
                for i in range(quarter):
                    angle = position / 10000 ** (i / quarter)
                    expected[row * side + column, half * 2 * quarter + i] = math.sin(angle)
                    expected[row * side + column, half * 2 * quarter + quarter + i] = math.cos(angle)
    np.testing.assert_allclose(sincos_positions(width, side)[0].numpy(), expected, atol=1e-7)


def test_time_features_are_128_cosines_then_128_sines():
    embed = TimestepEmbedder(8)
    seen = []
    embed.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    times = [0.0, 0.37, 1.0, 999.0]
    embed(torch.tensor(times))
    expected = [[wave(t * 10000 ** (-i / 128)) for wave in (math.cos, math.sin) for i in range(128)] for t in times]
    np.testing.assert_allclose(seen[0].numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(seen[0][:3].numpy(), expected[:3], atol=1e-6)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_tokens_are_row_major_patches(patch):
    model = randomise(build_model(model_config(None, patch_size=patch)))
    x, side = rand(2, 3, 8, 8), 8 // patch
    weight, bias = (value.detach().double() for value in (model.patch_embed.proj.weight, model.patch_embed.proj.bias))
    actual = model.patch_embed(x)
    for row in range(side):
        for column in range(side):
            total = bias.repeat(2, 1)
            for c in range(3):
                for p in range(patch):
                    for q in range(patch):
                        pixel = x[:, c, row * patch + p, column * patch + q].double()
                        total = total + pixel[:, None] * weight[:, c, p, q]
            np.testing.assert_allclose(actual[:, row * side + column].detach().numpy(), total.numpy(), atol=1e-5)


@pytest.mark.parametrize(("side", "patch", "channels"), [(4, 2, 3), (2, 4, 1), (3, 1, 2)])
def test_unpatchify_puts_channel_fastest_then_column_then_row(side, patch, channels):
    patches = torch.arange(2.0 * side**2 * patch**2 * channels).view(2, side**2, -1)
    image = unpatchify(patches, side, patch)
    assert image.shape == (2, channels, side * patch, side * patch)
    for c in range(channels):
        for y in range(side * patch):
            for x in range(side * patch):
                token, entry = y // patch * side + x // patch, ((y % patch) * patch + x % patch) * channels + c
                assert torch.equal(image[:, c, y, x], patches[:, token, entry])


# ---------------------------------------------------------------- shared experts


@pytest.mark.parametrize("router", ["tc", "diffmoe", "race"])
@pytest.mark.parametrize("shared", [1, 2])
def test_shared_experts_add_that_many_dense_networks_on_every_token(router, shared):
    layer = random_model(router, shared_experts=shared).moe_layers()[1].eval()
    x = rand(3, 16, 32)
    total, routing = layer(x)
    routed = layer.experts(x.flatten(0, 1), routing).view_as(x)
    fc1, fc2, width = layer.shared.fc1, layer.shared.fc2, 128
    assert fc1.weight.shape == (shared * width, 32)
    expected = routed + fc2.bias
    for i in range(shared):
        part = slice(i * width, (i + 1) * width)
        hidden = F.gelu(x @ fc1.weight[part].T + fc1.bias[part], approximate="tanh")
        expected = expected + hidden @ fc2.weight[:, part].T
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)
    assert (total - routed).abs().min(-1).values.all()


@pytest.mark.parametrize("router", ["tc", "ec", "diffmoe", "race"])
def test_twice_the_experts_of_half_the_width_two_a_token_cost_the_same(router):
    plain = model_config(router, num_experts=4)
    fine = model_config(router, num_experts=8, capacity=2.0, expert_ratio=2.0)
    model = build_model(fine).train()
    layers = model.moe_layers().values()
    assert [tuple(layer.experts.w1.shape) for layer in layers] == [(8, 32, 64)] * 2
    more_biases = len(layers) * (8 - 4) * 32  # of what an expert puts out
    assert count_parameters(fine).experts == count_parameters(plain).experts + more_biases
    assert flops_per_call(fine, 2.0) - flops_per_call(fine, 0.0) == (
        flops_per_call(plain, 1.0) - flops_per_call(plain, 0.0))
    assert model(*network_inputs(4)).prediction.isfinite().all()


def test_losses_are_summed_over_layers_by_name():
    output = random_model("tc").train()(*network_inputs(4))
    each = [routing.losses["balance"] for routing in output.routings]
    assert len(each) == 2 and torch.equal(output.losses()["balance"], each[0] + each[1])
    assert random_model(None)(*network_inputs(4)).losses() == {}


@pytest.mark.parametrize("router", [None, *ROUTERS])
def test_predictor_parameters_are_those_that_the_prediction_does_not_train(router):
    model = random_model(router).train()
    model(*network_inputs(4)).prediction.square().mean().backward()
    untrained = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    ids = {id(parameter) for parameter in model.predictor_parameters()}
    assert untrained == {name for name, parameter in model.named_parameters() if id(parameter) in ids}
    assert bool(untrained) == any(".predictor." in name for name in model.state_dict())


@pytest.mark.parametrize("router", [None, *ROUTERS])
def test_rounded_copies_give_the_same_bits_under_autocast_and_gradients_of_their_own(router):
    model = random_model(router).train()
    rounded = model.rounded(torch.bfloat16)
    outputs = []
    for network in (model, rounded):
        with torch.autocast("cpu", torch.bfloat16):
            output = network(*network_inputs(3))
        network.zero_grad(set_to_none=True)
        output.prediction.float().square().sum().backward()
        outputs.append([output.prediction.detach(), *(parameter.grad for parameter in network.parameters())])
    assert all(mine is None or torch.equal(mine.float(), wanted.float()) for mine, wanted in zip(*outputs, strict=True))
    kept = {name for name, value in model.named_parameters() if rounded.get_parameter(name) is value}
    assert kept == {name for name in model.state_dict(keep_vars=True) if "router." in name or "label_embed" in name} - {
        name for name, _ in model.named_buffers()}
    assert all(rounded.get_buffer(name) is value for name, value in model.named_buffers())
    assert all(value.dtype is torch.bfloat16 for name, value in rounded.named_parameters() if name not in kept)
