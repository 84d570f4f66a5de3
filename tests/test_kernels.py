"""Every Triton kernel against plain float64: in Triton's interpreter where there is no GPU, and on a GPU in bf16."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_interpreter, network_inputs, rand, random_model

from diffmoe.models import attention, layers
from diffmoe.models.kernels import HAS_TRITON
from diffmoe.models.layers import Stream
from diffmoe.moe import experts
from diffmoe.moe.routing import Routing

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_device = pytest.mark.skipif(not (HAS_TRITON and (INTERPRETED or torch.cuda.is_available())),
                               reason="needs a CUDA device, or Triton's interpreter")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=[pytest.mark.slow] if INTERPRETED else [])]


@pytest.mark.skipif(INTERPRETED, reason="is no part of itself")
@needs_interpreter
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_every_kernel_equals_plain_arithmetic_in_tritons_interpreter(chosen):
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", chosen, __file__]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, text=True, capture_output=True,
                         check=False)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout + run.stderr


def assert_near(actual, expected, relative):
    """Compare by norm, so that a NaN never passes."""
    for index, (mine, wanted) in enumerate(zip(actual, expected, strict=True)):
        error, size = (mine.double().cpu() - wanted.double().cpu()).norm(), wanted.double().norm().cpu()
        assert error <= relative * size, f"{index}: {error:.2e} of {size:.2e}"


# ---------------------------------------------------------------- bias and GELU by expert


def exact_bias(x, bias, ends, gelu):
    """Add biases to rows one expert after another."""
    starts = [0, *ends[:-1]]
    parts = [x[start:end] + bias[expert] for expert, (start, end) in enumerate(zip(starts, ends, strict=True))]
    rows = torch.cat(parts)
    return torch.cat([F.gelu(rows, approximate="tanh") if gelu else rows, torch.zeros_like(x[ends[-1]:])])


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize(("ends", "pads", "width"), [
    ([150], 0, 130), ([64, 128], 0, 128), ([0, 5, 5, 70, 200], 13, 33), ([0, 0], 3, 16), ([1, 65, 65], 70, 7)],
    ids=str)
def test_bias_and_gelu_by_expert(ends, pads, width, gelu, dtype):
    from diffmoe.models.bias_kernels import grouped_bias

    x, bias = rand(ends[-1] + pads, width, seed=1), rand(len(ends), width, seed=2)
    grad = rand(*x.shape, seed=3) + 1
    x[ends[-1]:] = grad[ends[-1]:] = float("nan")  # pads hold anything
    x, bias, grad = (value.to(DEVICE, dtype) for value in (x, bias, grad))
    leaves = [x.requires_grad_(), bias.requires_grad_()]
    y = grouped_bias(*leaves, torch.tensor(ends, dtype=torch.int32, device=DEVICE), gelu)
    exact = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    wanted = exact_bias(*exact, ends, gelu)
    grads = torch.autograd.grad(y, leaves, grad)
    wanted_grads = torch.autograd.grad(wanted, exact, grad.double().cpu().nan_to_num(0))
    assert y.dtype == dtype
    assert_near([y, *grads], [wanted, *(value.nan_to_num(0) for value in wanted_grads)], TOLERANCES[dtype])
    again = grouped_bias(*leaves, torch.tensor(ends, dtype=torch.int32, device=DEVICE), gelu)
    assert all(map(torch.equal, grads, torch.autograd.grad(again, leaves, grad)))


# ---------------------------------------------------------------- tokens and pairs


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "num_experts", "width", "share", "rows"), [
    (50, 4, 33, 0.4, None), (64, 3, 64, 1.0, 200), (7, 16, 130, 0.1, 40), (5, 2, 8, 0.0, 6)], ids=str)
def test_rows_of_tokens_and_the_sum_of_their_pairs(tokens, num_experts, width, share, rows, dtype):
    from diffmoe.models.pair_kernels import add_pairs, row_table, rows_of_tokens

    mask = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(1)) < share
    routing = Routing.from_mask(mask, rand(tokens, num_experts, seed=2), num_rows=rows)
    token, expert = routing.token_N.to(DEVICE), routing.expert_of_pair(num_experts).to(DEVICE)
    pairs = int(mask.sum())
    values = [rand(tokens, width, seed=3).to(DEVICE, dtype), rand(len(token), width, seed=4).to(DEVICE, dtype),
              routing.gate_N.to(DEVICE)]
    grads = [rand(len(token), width, seed=5).to(DEVICE, dtype), (rand(tokens, width, seed=6) + 1).to(DEVICE)]
    values[1][pairs:] = 0  # a pad's row; its gradient may hold anything
    grads[0][pairs:] = float("nan")

    def measure(values, grads, by_kernels):
        x, y, gate = leaves = [value.detach().requires_grad_() for value in values]
        if by_kernels:
            table = row_table(token, expert, tokens, num_experts)
            outputs = rows_of_tokens(x, token, table), add_pairs(y, gate, token, table, torch.float32)
        else:
            picked = x[token.cpu()]
            outputs = picked, torch.zeros_like(x).index_add(0, token.cpu(), y * gate[:, None])
        return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]

    found = measure(values, grads, by_kernels=True)
    wanted = measure([value.double().cpu() for value in values],
                     [grad.double().cpu().nan_to_num(0) for grad in grads], by_kernels=False)
    assert [value.dtype for value in found] == [dtype, torch.float32, dtype, dtype, torch.float32]
    assert_near(found, wanted, TOLERANCES[dtype])
    assert all(map(torch.equal, found, measure(values, grads, by_kernels=True)))


# ---------------------------------------------------------------- residual sum, norm and modulation


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("shape", [(2, 16, 32), (3, 7, 33), (1, 66, 48)], ids=str)
def test_residual_sum_norm_and_modulation(shape, rounded, dtype):
    from diffmoe.models.norm_kernels import residual_norm

    batch, _, width = shape
    x, y = rand(*shape, seed=1).to(DEVICE) + 1, rand(*shape, seed=2).to(DEVICE, dtype)
    gate, shift, scale = (rand(batch, width, seed=seed).to(DEVICE, dtype) for seed in (3, 4, 5))
    h_dtype = dtype if rounded else torch.float32
    grads = [rand(*shape, seed=6).to(DEVICE), (rand(*shape, seed=7) + 1).to(DEVICE, h_dtype)]
    leaves = [value.requires_grad_() for value in (x, gate, y, shift, scale)]
    outputs = residual_norm(*leaves, 1e-6, h_dtype)
    assert [value.dtype for value in outputs] == [torch.float32, h_dtype]
    exact = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    wanted = Stream(*exact[:3]).modulated_norm(*exact[3:])
    wanted_grads = torch.autograd.grad(wanted, exact, [grad.double().cpu() for grad in grads])
    assert_near([*outputs, *torch.autograd.grad(outputs, leaves, grads)], [*wanted, *wanted_grads], TOLERANCES[dtype])


# ---------------------------------------------------------------- the whole model


def measure_model(router, kernels, monkeypatch):
    """Return prediction and gradients in bf16, with or without the kernels."""
    for module in (layers, experts, *([] if INTERPRETED else [attention])):  # the interpreter's bf16 products are wrong
        monkeypatch.setattr(module, "kernels_apply", lambda x: kernels)
    # As much capacity as experts: rounding cannot change what is selected.
    model = random_model(router, depth=2, num_heads=2, capacity=4.0, shared_experts=1).to(DEVICE)
    x, t, labels = (value.to(DEVICE) for value in network_inputs(2))
    with torch.autocast(DEVICE, torch.bfloat16):
        output = model(x, t, labels)
    (output.prediction.float().square().mean() + sum(output.losses().values())).backward()
    return [output.prediction, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.slow
@on_device
@pytest.mark.parametrize("router", [None, "diffmoe", "tc"])
def test_a_model_with_every_kernel_equals_one_with_none(router, monkeypatch):
    plain, fused = (measure_model(router, kernels, monkeypatch) for kernels in (False, True))
    assert not torch.equal(plain[0], fused[0]), "no kernel ran"
    assert_near(fused, plain, 3e-2)
