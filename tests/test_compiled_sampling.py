"""Compiled sampling: the same images and capacities, whatever the batches, with full batches compiled and no other."""

import functools

import pytest
import torch
from conftest import randomise, set_threshold
from test_training import digits_config
from torch._dynamo.utils import counters

from diffmoe.bench.subjects import network_inputs
from diffmoe.evaluation import sampling
from diffmoe.models.dit import build_model


@pytest.fixture
def compiled_blocks(monkeypatch):
    """Compile without inductor, and list the blocks that were."""
    compile_module, compile_function, blocks = torch.nn.Module.compile, torch.compile, []

    def compile_without_inductor(block, *, dynamic):
        blocks.append(block)
        compile_module(block, backend="aot_eager", dynamic=dynamic, fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_inductor)
    monkeypatch.setattr(torch, "compile", functools.partial(compile_function, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    return blocks


@pytest.mark.parametrize("system", [
    "diffmoe", *(pytest.param(system, marks=pytest.mark.slow) for system in ("dense", "token_choice"))])
def test_compiled_sampling_gives_the_same_images_and_capacity(system, compiled_blocks, monkeypatch):
    monkeypatch.setattr(sampling, "FIRST_ROW_BOUND", 1.0)  # the first batch overflows
    config = [digits_config(system, "sampling.num_steps=2", "sampling.batch_size=3", "training.precision=bf16",
                            f"runtime.compile={flag}") for flag in ("false", "true")]
    model = randomise(build_model(config[0].model)).eval()
    for layer in model.moe_layers().values():
        set_threshold(layer.router)
    plain, compiled = (sampling.sample_images(model, each, range(8)) for each in config)
    kinds, whole = [block.is_moe for block in compiled_blocks], [block.is_moe for block in model.blocks]
    assert kinds == whole * (len(kinds) // len(whole)) != []
    assert (plain.images.int() - compiled.images.int()).abs().max() <= 1
    for name in ("capacity", "expert_load", "token_load"):
        wanted = getattr(plain, name)
        assert wanted is None or torch.allclose(wanted, getattr(compiled, name))
    compiled_blocks.clear()
    sampling.sample_images(model, config[1], range(4))
    assert not compiled_blocks, "less than two full batches are not worth compiling"


def test_a_compiled_call_in_float32_is_the_plain_one(monkeypatch):
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **how: compile_module(block, backend="eager", **how))
    torch._dynamo.reset()
    config = digits_config("diffmoe", "training.precision=fp32", "runtime.compile=true")
    model = randomise(build_model(config.model)).eval()
    inputs = network_inputs(config.model, 2, torch.device("cpu"))
    with torch.no_grad():
        plain, compiled = (sampling.prepare_call(model, config, sampling.FIRST_ROW_BOUND, compiled=compiled)(*inputs)
                           for compiled in (False, True))
    torch.testing.assert_close(compiled.prediction, plain.prediction)


@pytest.mark.usefixtures("compiled_blocks")
@pytest.mark.parametrize("guidance", [[], ["sampling.guidance_scale=1.5", "sampling.guided_forward=joint"]])
def test_networks_with_any_thresholds_share_what_is_compiled_ahead(guidance):
    config = digits_config("diffmoe", "sampling.num_steps=2", "sampling.batch_size=3",
                           "training.precision=bf16", "runtime.compile=true", *guidance)
    before = counters["stats"]["unique_graphs"]
    sampling.compile_ahead(config, torch.device("cpu"), doublings=2)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > before
    model = randomise(build_model(config.model)).eval()
    capacities = []
    for threshold in (0.0, 0.8, 0.85):  # all 8 pairs a token, which take both doublings, and few
        for layer in model.moe_layers().values():
            layer.router.threshold.fill_(threshold)
        capacities.append(sampling.sample_images(model, config, range(6)).capacity.mean())
    assert capacities[0] == 8 and capacities[1] > capacities[2]
    assert counters["stats"]["unique_graphs"] == compiled
