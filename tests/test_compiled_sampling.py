"""Compiled sampling: the same images and capacities, whatever the batches, with full batches compiled and no other."""

import pytest
import torch
from conftest import randomise, set_threshold
from test_training import digits_config

from diffmoe.evaluation import sampling
from diffmoe.models.dit import build_model


@pytest.mark.parametrize("system", [
    "diffmoe", *(pytest.param(system, marks=pytest.mark.slow) for system in ("dense", "token_choice"))])
def test_compiled_sampling_gives_the_same_images_and_capacity(system, monkeypatch):
    compile_module, compiled_blocks = torch.nn.Module.compile, []

    def compile_without_inductor(block, *, dynamic):
        compiled_blocks.append(block)
        compile_module(block, backend="aot_eager", dynamic=dynamic, fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_inductor)
    monkeypatch.setattr(sampling, "FIRST_ROW_BOUND", 1.0)  # the first batch overflows
    config = [digits_config(system, "sampling.num_steps=2", "sampling.batch_size=3", "training.precision=bf16",
                            f"runtime.compile={flag}") for flag in ("false", "true")]
    model = randomise(build_model(config[0].model)).eval()
    for layer in model.moe_layers().values():
        set_threshold(layer.router)
    torch._dynamo.reset()
    plain, compiled = (sampling.sample_images(model, each, range(8)) for each in config)
    assert set(compiled_blocks) == set(model.blocks)
    assert (plain.images.int() - compiled.images.int()).abs().max() <= 1
    for name in ("capacity", "expert_load", "token_load"):
        wanted = getattr(plain, name)
        assert wanted is None or torch.allclose(wanted, getattr(compiled, name))
    compiled_blocks.clear()
    sampling.sample_images(model, config[1], range(4))
    assert not compiled_blocks, "less than two full batches are not worth compiling"
