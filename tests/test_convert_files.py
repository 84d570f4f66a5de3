"""Converting files: bit for bit both ways for four systems, in the memory of one file, and no pickled code."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import one_line, rand, random_model

from diffmoe import convert
from diffmoe.cli import run_command
from diffmoe.config import ConfigError, ProcessKind
from diffmoe.models.dit import build_model
from diffmoe.sample import load_trained
from diffmoe.training.checkpoint import load_weights

SYSTEMS = {"models_DiT": None, "models_TCDiT": "tc", "models_ECDiT": "ec", "models_DiffMoE": "diffmoe"}


def settings(module, **params):
    """Return a configuration as the authors write it, for the models of conftest."""
    moe = {"n_shared_experts": 0, "num_experts": 4, "capacity": 1, "init_MoeMLP": False, "interleave": True}
    return {"basic": {"rf": True, "global_batch_size": 512, "global_seed": 1234},
            "model": {"ckpt": None, "target": f"models.{module}.DiT", "params": {
                "input_size": 8, "num_classes": 10, "patch_size": 2, "depth": 4, "hidden_size": 32, "num_heads": 4,
                "mlp_ratio": 4, "use_swiglu": False} | ({} if module == "models_DiT" else {"MoE_config": moe}) | (
                {"CapacityPred_loss_weight": 0.5} if module == "models_DiffMoE" else {}) | params},
            "optim": {"base_learning_rate": 0.0002, "weight_decay": 0}}


def theirs(router, seed=0):
    model = random_model(router, seed=seed, in_channels=4)
    return {name: value.clone() for name, value in convert.to_reference(model.state_dict(), model.config).items()}


def write(tmp_path, module, content, **params):
    torch.save(content, tmp_path / "0700000.pt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings(module, **params)))
    return [str(tmp_path / "0700000.pt"), str(tmp_path / "ours.safetensors"), "--config", str(tmp_path / "config.yaml")]


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


@pytest.mark.parametrize(("module", "router"), SYSTEMS.items())
@pytest.mark.parametrize("weights", ["ema", "model"])
def test_a_checkpoint_of_theirs_becomes_ours_and_theirs_again_bit_for_bit(module, router, weights, tmp_path):
    ema, model = theirs(router, 1), theirs(router, 2)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    arguments = write(tmp_path, module, {"model": model, "ema": ema, "opt": optimizer.state_dict(),
                                         "args": argparse.Namespace(config="x.yaml")})
    assert convert.main([*arguments, "--weights", weights]) == 0
    trained = load_trained(tmp_path / "ours.safetensors", [])      # digest checked, as any weights of ours
    network = trained.model(torch.device("cpu"))                   # strict
    original = build_model(trained.config.model)
    original.load_state_dict(dict(convert.from_reference(ema if weights == "ema" else model, trained.config.model)))
    assert_same(network.state_dict(), original.state_dict())
    assert trained.description["step"] == 700_000 and trained.config.training.batch_size == 512
    assert trained.config.training.learning_rate == 0.0002
    back = tmp_path / "back.pt"
    assert convert.main([arguments[1], str(back), "--to", "reference", "--weights", weights]) == 0
    for mapped in (True, False):
        (found,) = torch.load(back, weights_only=True, mmap=mapped).items()
        assert found[0] == weights
        assert_same(found[1], ema if weights == "ema" else model)


def test_a_bare_state_dict_is_taken_as_it_is_and_settings_reach_the_configuration(tmp_path):
    arguments = write(tmp_path, "models_DiffMoE", theirs("diffmoe"))
    assert convert.main(arguments) == 0
    config = load_trained(tmp_path / "ours.safetensors", []).config
    assert config.model.moe.num_experts == 4 and config.model.moe.router.predictor_loss_weight == 0.5
    assert config.diffusion.process is ProcessKind.FLOW and config.sampling.num_steps == 250
    assert load_weights(tmp_path / "ours.safetensors")[1]["config"]["data"]["vae"] is None


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(("content", "named"), [
    ({"ema": Harmful()}, "refused"), ([1, 2], "no state dict"), ({"opt": {}}, "--weights"), ({}, "no state dict")])
def test_pickled_code_and_other_files_are_refused_in_one_line(content, named, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["convert", *write(tmp_path, "models_DiT", content)])
    assert run_command(convert.main) == 2
    output = capsys.readouterr()
    assert named in output.err and output.err.count("\n") == 1 and "executed" not in output.out
    assert not (tmp_path / "ours.safetensors").exists()


@pytest.mark.parametrize(("module", "params", "named"), [
    ("models_DSMoE", {}, "models_DSMoE"), ("models_DiffMoE", {"use_swiglu": True}, "use_swiglu"),
    ("models_DiffMoE", {"rope_type": "2d"}, "rope_type"), ("models_DiffMoE", {"hidden_size": 64}, "another model"),
    # EfficientMoE's file for L-E16 says 8 experts; a checkpoint of 16 then names them
    ("models_DiffMoE", {"MoE_config": {"num_experts": 2, "capacity": 1, "interleave": True}}, "in the configuration")])
def test_settings_of_another_model_are_one_line(module, params, named, tmp_path):
    arguments = write(tmp_path, module, theirs("diffmoe"), **params)
    with pytest.raises(ConfigError) as caught:
        convert.main(arguments)
    assert named in one_line(caught.value)


@pytest.mark.parametrize(("arguments", "named"), [
    (["missing.pt", "out", "--config", "digits"], "missing.pt"), (["text.pt", "out", "--config", "digits"], "text.pt"),
    (["text.pt", "out"], "--config"), (["text.pt", "out", "--to", "reference"], "text.pt"),
    (["text.pt", "text.pt", "--config", "digits"], "there already"),
    (["text.pt", "out", "--config", "no.yaml"], "no.yaml")])
def test_files_that_cannot_be_used_are_one_line(arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("no archive")
    digits = str(convert.IMAGENET.with_name("digits.yaml"))
    with pytest.raises(ConfigError) as caught:
        convert.main([digits if word == "digits" else word for word in arguments])
    assert named in one_line(caught.value)


MEASURE = """
import re, sys
from pathlib import Path
from diffmoe import convert
# not getrusage: its peak is that of the process that started this one, too
kilobytes = lambda name: int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = kilobytes("VmRSS")
convert.main(sys.argv[1:])
print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_the_peak_of_memory_is_below_1_3_times_the_file(tmp_path):
    size = {"hidden_size": 512, "depth": 4, "num_heads": 8, "in_channels": 4}
    model = build_model(random_model("diffmoe", **size, num_experts=8).config)
    for index, parameter in enumerate(model.parameters()):
        parameter.data.copy_(rand(1, seed=index).expand(parameter.shape))
    moe = {"num_experts": 8, "capacity": 1, "interleave": True}
    params = {name: value for name, value in size.items() if name != "in_channels"} | {"MoE_config": moe}
    arguments = write(tmp_path, "models_DiffMoE",
                      {"ema": dict(convert.to_reference(model.state_dict(), model.config))}, **params)
    file = (tmp_path / "0700000.pt").stat().st_size
    assert file > 150e6
    for words in (arguments, [arguments[1], str(tmp_path / "back.pt"), "--to", "reference"]):
        done = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True)
        assert 0.3 < int(done.stdout.split()[-1]) / file < 1.3, words
