"""Compiled training: the gradients of plain training, on a GPU as a CUDA graph and with this suite's kernels."""

import pytest
import torch
from conftest import ROUTERS, one_line, rand, random_model, randomise
from test_training import SYSTEMS, digits_config
from torch.torch_version import TorchVersion

from diffmoe.config import ConfigError
from diffmoe.data import load_data
from diffmoe.training.graph import compile_blocks
from diffmoe.training.trainer import Trainer


def losses_and_gradients(system, device, compiled, *overrides):
    config = digits_config(system, *overrides, f"runtime.compile={str(compiled).lower()}")
    trainer = Trainer(config, 0, load_data(config.data, config.model), torch.device(device))
    randomise(trainer.model)
    trainer.round_weights()
    batch = trainer.batch(0)
    for _ in range(5 if compiled and device == "cuda" else 1):  # the capture, and replays of it
        losses, *_ = trainer.gradients(batch.images, batch.labels, batch.noise, batch.times)
    trained = {id(parameter): copied for parameter, copied in zip(trainer.parameters, trainer.trained, strict=True)}
    return losses, {name: trained[id(parameter)].grad.float() for name, parameter in trainer.model.named_parameters()}


def assert_compiled_as_plain(system, device, *overrides):
    torch._dynamo.reset()
    plain, compiled = (losses_and_gradients(system, device, flag, *overrides) for flag in (False, True))
    for wanted, got in zip(plain, compiled, strict=True):
        assert wanted.keys() == got.keys()
        for name in wanted:  # by rounding, a token at the edge of a selection may go the other way
            assert (got[name] - wanted[name]).norm() <= 5e-2 * wanted[name].norm(), name


@pytest.mark.parametrize("router", ROUTERS)
def test_a_router_compiled_under_autocast_keeps_float32_backward(router):
    layer = random_model(router).train().moe_layers()[1]

    def gradients(route):
        x = rand(5, 16, 32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            routing = route(x)
        layer.zero_grad()
        (routing.gate_N.square().sum() + sum(routing.losses.values())).backward()
        return [x.grad, *(parameter.grad for parameter in layer.router.parameters())]

    torch._dynamo.reset()
    compiled = torch.compile(layer.route, backend="aot_eager")
    for got, wanted in zip(gradients(compiled), gradients(layer.route), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(torch.__version__ < "2.14", reason="refused")
def test_compiled_gradients_are_those_of_plain_calls():
    assert_compiled_as_plain("diffmoe", "cpu", "model.depth=1", "model.moe.interleave=false")


@pytest.mark.skipif(torch.__version__ < "2.14", reason="refused")
def test_the_loop_over_experts_is_not_compiled_anew_for_other_numbers_of_rows():
    config = digits_config("token_choice", "model.depth=2", "runtime.compile=true", "runtime.backend=loop")
    trainer = Trainer(config, 0, load_data(config.data, config.model), torch.device("cpu"))
    torch._dynamo.reset()
    trainer.train_step()
    rows = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            trainer.train_step()
            _, output = trainer.losses(trainer.batch(step))
            rows.add(tuple(output.routings[0].tokens_per_expert.tolist()))
    assert len(rows) > 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_compiled_gradients_on_a_gpu_are_those_of_plain_calls(system, precision):
    assert_compiled_as_plain(system, "cuda", "model.depth=4", f"training.precision={precision}")


def test_a_compiler_that_gets_gradients_wrong_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0+cpu"))
    with pytest.raises(ConfigError) as caught:
        losses_and_gradients("diffmoe", "cpu", True)
    assert "torch 2.13.0" in one_line(caught.value)


def test_compiling_blocks_never_lowers_what_a_program_allowed_to_compile():
    with torch._dynamo.config.patch(recompile_limit=10_000):  # as the bench does for its many cases
        compile_blocks(torch.nn.ModuleList())
        assert torch._dynamo.config.recompile_limit == 10_000
