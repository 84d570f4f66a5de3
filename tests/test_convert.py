"""Conversion of the authors' checkpoint layout: bit for bit both ways, and one line for a state that does not fit."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from conftest import GOLDEN, MODEL_FILES, ROUTERS, model_config, one_line, random_model

from diffmoe.config import ConfigError
from diffmoe.convert import from_reference, to_reference
from diffmoe.models.dit import build_model
from diffmoe.verify import fixture_config, load_fixture

REFERENCE_FILES = [*MODEL_FILES, GOLDEN / "samplers.npz", GOLDEN / "samplers_seed1.npz"]


@functools.cache
def reference(path):
    """Return the recorded state in the authors' layout and its configuration."""
    fixture = load_fixture(path)
    state = {name.removeprefix("state/"): value for name, value in fixture.items() if name.startswith("state/")}
    return state, fixture_config(fixture)


def changed(system="diffmoe", **entries):
    """Return a recorded state with entries replaced (None drops one), and its configuration."""
    state, config = reference(GOLDEN / f"{system}.npz")
    return {name: value for name, value in (state | entries).items() if value is not None}, config


def assert_same(actual, expected):
    """Compare two state dicts: names, shapes, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


@pytest.mark.parametrize("path", REFERENCE_FILES, ids=lambda path: path.stem)
def test_a_recorded_state_survives_the_way_to_our_layout_and_back(path):
    state, config = reference(path)
    ours = from_reference(state, config)
    assert_same(to_reference(ours, config), state)
    build_model(config).load_state_dict(ours)  # strict


@pytest.mark.parametrize("router", [None, "tc", "ec", "ec_dynamic", "diffmoe", "diffmoe_static"])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("interleave", [True, False])
def test_a_model_of_ours_survives_the_way_to_their_layout_and_back(router, shared, interleave):
    model = random_model(router, shared_experts=shared, interleave=interleave)
    theirs = to_reference(model.state_dict(), model.config)
    assert_same(from_reference(theirs, model.config), model.state_dict())
    assert any(".mlp.shared_experts.fc1." in name for name in theirs) == bool(router and shared)


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_expert_e_of_theirs_is_slice_e_of_ours_transposed(path):
    state, config = reference(path)
    ours = from_reference(state, config)
    for index in range(config.depth):
        if not config.is_moe_block(index):
            for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
                assert torch.equal(ours[f"blocks.{index}.ffn.{part}"], state[f"blocks.{index}.mlp.{part}"])
            continue
        for e in range(config.moe.num_experts):
            for layer in (1, 2):
                theirs = f"blocks.{index}.mlp.experts.{e}.fc{layer}"
                packed = f"blocks.{index}.ffn.experts"
                assert torch.equal(ours[f"{packed}.w{layer}"][e], state[f"{theirs}.weight"].T)
                assert torch.equal(ours[f"{packed}.b{layer}"][e], state[f"{theirs}.bias"])


@pytest.mark.parametrize("system", ["dense", "tc", "ec", "diffmoe"])
def test_our_models_have_the_names_and_shapes_of_their_layout(system):
    state, config = reference(GOLDEN / f"{system}.npz")
    theirs = to_reference(build_model(config).state_dict(), config)
    assert {name: value.shape for name, value in theirs.items()} == {name: value.shape for name, value in state.items()}


def test_a_part_of_a_state_converts_by_itself():
    model = random_model("diffmoe")
    gradients = {name: torch.full_like(value, index) for index, (name, value) in enumerate(model.named_parameters())}
    theirs = to_reference(gradients, model.config)
    packed = list(gradients).index("blocks.3.ffn.experts.w2")
    assert all(theirs[f"blocks.3.mlp.experts.{e}.fc2.weight"].unique().tolist() == [packed] for e in range(4))
    assert not any(name.endswith("ema_decay") for name in theirs)


# ---------------------------------------------------------------- what does not fit


def test_experts_of_another_width_have_no_place_in_their_layout():
    model = random_model("diffmoe", expert_ratio=2.0)
    with pytest.raises(ConfigError, match="expert_ratio=2.0"):
        to_reference(model.state_dict(), model.config)


def test_a_router_that_warmed_up_has_no_place_in_their_layout():
    model = random_model(ROUTERS["diffmoe"] | {"warmup_steps": 3})
    with pytest.raises(ConfigError, match="warmup_steps=3"):
        to_reference(model.state_dict(), model.config)


@pytest.mark.parametrize(("system", "changes"), [
    ("dense", {"hidden_size": 64}), ("dense", {"depth": 5}), ("dense", {"patch_size": 4}),
    ("dense", {"in_channels": 3}), ("dense", {"num_classes": 9}), ("dense", {"learn_sigma": False}),
    ("dense", {"mlp_ratio": 2}), ("dense", {"router": "tc"}), ("diffmoe", {"router": None}),
    ("diffmoe", {"router": "ec"}), ("ec", {"router": "diffmoe"}), ("diffmoe", {"num_experts": 8}),
    ("diffmoe", {"num_experts": 2}), ("diffmoe", {"interleave": False}), ("diffmoe", {"shared_experts": 2})])
def test_a_configuration_of_another_model_is_one_line(system, changes):
    state, _ = changed(system)
    settings = {"router": {"dense": None}.get(system, system), "in_channels": 4} | changes
    with pytest.raises(ConfigError) as caught:
        from_reference(state, model_config(**settings))
    one_line(caught.value)


@pytest.mark.parametrize("system", ["dense", "tc", "ec", "diffmoe"])
def test_every_missing_tensor_is_noticed_and_a_threshold_decay_may_be_absent(system):
    state, config = changed(system)
    for name in state:
        if re.match(r"blocks\.[23]|.*experts\.[13]", name):  # like blocks 0 and 1, experts 0 and 2
            continue
        part = {key: value for key, value in state.items() if key != name}
        if name.endswith("ema_decay"):
            from_reference(part, config)
            continue
        with pytest.raises(ConfigError) as caught:
            from_reference(part, config)
        one_line(caught.value)


@pytest.mark.parametrize(("entries", "named"), [
    ({"blocks.0.attn.qkv.weight": None}, ("blocks.0.attn.qkv.weight", "missing")),
    ({"blocks.0.attn.qkv.weight": torch.zeros(96, 31)}, ("blocks.0.attn.qkv.weight", "31", "32")),
    ({"blocks.0.attn.q_norm.weight": torch.zeros(8)}, ("blocks.0.attn.q_norm.weight", "no such tensor")),
    ({"blocks.1.mlp.experts.0.w3.weight": torch.zeros(8)}, ("blocks.1.mlp.experts.0.w3.weight", "SwiGLU")),
    ({"register_tokens": torch.zeros(4, 32)}, ("register_tokens",)),
    ({"blocks.9.attn.qkv.weight": torch.zeros(96, 32)}, ("blocks.9.attn.qkv.weight", "no such tensor")),
    ({"blocks.1.mlp.ema_decay": torch.tensor([0.9])}, ("blocks.1.mlp.ema_decay", "0.9", "threshold_decay=0.95")),
    ({"blocks.1.mlp.experts.4.fc1.weight": torch.zeros(128, 32)}, ("experts", "5", "4")),
    ({"blocks.1.mlp.experts.2.fc1.weight": None}, ("blocks.1.", "experts", "3")),
    ({"blocks.1.mlp.experts.2.fc1.weight": torch.zeros(64, 32)}, ("experts", "64")),
    ({"blocks.1.mlp.experts.2.fc1.weight": None, "blocks.1.mlp.experts.7.fc1.weight": torch.zeros(128, 32)},
     ("experts", "7")),
    ({"blocks.1.mlp.gate.weight": torch.zeros(4, 32)}, ("blocks.1.mlp.gate",)),
])
def test_a_state_that_does_not_fit_is_one_line_that_names_the_tensor(entries, named):
    state, config = changed("diffmoe", **entries)
    with pytest.raises(ConfigError) as caught:
        from_reference(state, config)
    message = one_line(caught.value)
    assert [part for part in named if part not in message] == [], message


def test_a_threshold_decay_in_a_dense_state_is_one_line():
    state, config = changed("dense", **{"blocks.1.mlp.ema_decay": torch.tensor([0.95])})
    with pytest.raises(ConfigError) as caught:
        from_reference(state, config)
    assert "blocks.1.mlp.ema_decay" in one_line(caught.value)


def test_a_router_that_the_authors_do_not_have_has_no_place_in_their_layout():
    model = random_model("race")
    with pytest.raises(ConfigError) as caught:
        to_reference(model.state_dict(), model.config)
    assert "baselines.expert_race:ExpertRace" in one_line(caught.value)
