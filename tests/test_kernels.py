"""Every Triton kernel against plain float64: in Triton's interpreter where there is no GPU, and on a GPU in bf16."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROUTERS, needs_interpreter, network_inputs, rand, random_model, random_router

from diffmoe.models import attention, layers
from diffmoe.models.kernels import HAS_TRITON
from diffmoe.models.layers import Stream
from diffmoe.moe import expert_choice, experts, float32, routing
from diffmoe.moe.routing import Routing

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_device = pytest.mark.skipif(not (HAS_TRITON and (INTERPRETED or torch.cuda.is_available())),
                               reason="needs a CUDA device, or Triton's interpreter")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
PRODUCTS = torch.float16 if INTERPRETED else torch.bfloat16
"""What tokens are in products: the interpreter's of bf16 are wrong."""
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


def exact_bias(x, bias, ends):
    """Add biases to rows one expert after another; nothing is said of pads."""
    starts = [0, *ends[:-1]]
    return torch.cat([x[start:end] + bias[expert]
                      for expert, (start, end) in enumerate(zip(starts, ends, strict=True))])


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ends", "pads", "width"), [
    ([150], 0, 130), ([64, 128], 0, 128), ([0, 5, 5, 70, 200], 13, 33), ([0, 0], 3, 16), ([1, 65, 65], 70, 7)],
    ids=str)
def test_bias_and_gelu_by_expert(ends, pads, width, dtype):
    from diffmoe.models.bias_kernels import bias_gelu

    x, bias = rand(ends[-1] + pads, width, seed=1), rand(len(ends), width, seed=2)
    grad = rand(*x.shape, seed=3) + 1
    x[ends[-1]:] = grad[ends[-1]:] = float("nan")  # pads hold anything
    x, bias, grad = (value.to(DEVICE, dtype) for value in (x, bias, grad))
    leaves = [x.requires_grad_(), bias.requires_grad_()]
    y = bias_gelu(*leaves, torch.tensor(ends, dtype=torch.int32, device=DEVICE))
    exact = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    wanted = F.gelu(exact_bias(*exact, ends), approximate="tanh")
    grads = torch.autograd.grad(y, leaves, grad)
    wanted_grads = torch.autograd.grad(wanted, exact, grad.double().cpu()[:ends[-1]])
    assert y.dtype == dtype

    def without_pads(values):
        return [values[0][:ends[-1]], *values[1:]]

    assert_near(without_pads([y]), [wanted], TOLERANCES[dtype])
    assert_near(without_pads(grads), without_pads(wanted_grads), TOLERANCES[dtype])
    again = bias_gelu(*leaves, torch.tensor(ends, dtype=torch.int32, device=DEVICE))
    assert all(map(torch.equal, without_pads(grads), without_pads(torch.autograd.grad(again, leaves, grad))))


@on_device
@pytest.mark.parametrize(("ends", "pads", "width", "hidden"), [
    ([150, 300], 0, 64, 256), ([0, 5, 5, 70, 200], 13, 33, 70), ([0, 0], 3, 16, 16), ([30, 70], 2, 576, 512)], ids=str)
def test_hidden_rows_of_experts_in_one(ends, pads, width, hidden):
    from diffmoe.moe.hidden_kernels import hidden_rows

    tokens, rows = 40, ends[-1] + pads
    values = rand(tokens, width), rand(len(ends), width, hidden, seed=1), rand(len(ends), hidden, seed=2)
    x, w1, b1 = (value.to(DEVICE, PRODUCTS) for value in values)
    token = torch.randint(0, tokens, (rows,), generator=torch.Generator().manual_seed(3))
    h = hidden_rows(x, token.to(DEVICE), w1, b1, torch.tensor(ends, dtype=torch.int32, device=DEVICE))
    x, w1, b1 = (value.double().cpu() for value in (x, w1, b1))
    sums = torch.cat([x[token[start:end]] @ w1[expert]
                      for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))])
    assert h.shape == (rows, hidden) and h.dtype == PRODUCTS
    assert_near([h[:ends[-1]]], [F.gelu(exact_bias(sums, b1, ends), approximate="tanh")], TOLERANCES[PRODUCTS])


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
    ends = routing.counts(num_experts).cumsum(0).int().to(DEVICE)
    values = [rand(tokens, width, seed=3).to(DEVICE, dtype), rand(len(token), width, seed=4).to(DEVICE, dtype),
              rand(num_experts, width, seed=7).to(DEVICE, dtype), routing.gate_N.to(DEVICE)]
    grads = [rand(pairs, width, seed=5).to(DEVICE, dtype), (rand(tokens, width, seed=6) + 1).to(DEVICE)]
    values[1][pairs:] = float("nan")  # a pad's row holds anything

    def measure(values, grads, by_kernels):
        x, y, bias, gate = leaves = [value.detach().requires_grad_() for value in values]
        if by_kernels:
            table = row_table(token, expert, tokens, num_experts)
            outputs = (rows_of_tokens(x, token, ends, table)[:pairs],
                       add_pairs(y, bias, gate, token, ends, table, torch.float32))
        else:
            picked = x[token.cpu()[:pairs]]
            weighted = (y[:pairs] + bias[expert.cpu()[:pairs]]) * gate[:pairs, None]
            outputs = picked, torch.zeros_like(x).index_add(0, token.cpu()[:pairs], weighted)
        d_x, d_y, d_bias, d_gate = torch.autograd.grad(outputs, leaves, grads)
        if by_kernels:
            assert not d_gate[pairs:].any()  # a product with 0 would keep a NaN
        return [*outputs, d_x, d_y[:pairs], d_bias, d_gate[:pairs]]

    found = measure(values, grads, by_kernels=True)
    wanted = measure([value.double().cpu() for value in values],
                     [grad.double().cpu().nan_to_num(0) for grad in grads], by_kernels=False)
    assert [value.dtype for value in found] == [dtype, torch.float32, dtype, dtype, dtype, torch.float32]
    assert_near(found, wanted, TOLERANCES[dtype])
    assert all(map(torch.equal, found, measure(values, grads, by_kernels=True)))


# ---------------------------------------------------------------- residual sum, norm and modulation


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 16, 32), (3, 7, 33), (1, 66, 48)], ids=str)
def test_residual_sum_norm_and_modulation(shape, dtype):
    from diffmoe.models.norm_kernels import residual_norm

    batch, _, width = shape
    x, y = rand(*shape, seed=1).to(DEVICE) + 1, rand(*shape, seed=2).to(DEVICE, dtype)
    gate, shift, scale = (rand(batch, width, seed=seed).to(DEVICE, dtype) for seed in (3, 4, 5))
    grads = [rand(*shape, seed=6).to(DEVICE), (rand(*shape, seed=7) + 1).to(DEVICE, dtype)]
    leaves = [value.requires_grad_() for value in (x, gate, y, shift, scale)]
    outputs = residual_norm(*leaves, 1e-6, dtype)
    assert [value.dtype for value in outputs] == [torch.float32, dtype]
    exact = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    wanted = Stream(*exact[:3]).modulated_norm(*exact[3:])
    wanted_grads = torch.autograd.grad(wanted, exact, [grad.double().cpu() for grad in grads])
    assert_near([*outputs, *torch.autograd.grad(outputs, leaves, grads)], [*wanted, *wanted_grads], TOLERANCES[dtype])


# ---------------------------------------------------------------- routers: float32 products, selection


@on_device
@pytest.mark.parametrize("shape", [(70, 48, 16), (200, 130, 150), (33, 64, 5)], ids=str)
def test_gates_are_products_in_float32(shape):
    from diffmoe.moe.router_kernels import gate

    rows, width, columns = shape
    tokens = rand(rows, width).to(DEVICE, PRODUCTS)
    leaves = [tokens.requires_grad_(), (rand(columns, width, seed=1) + 1).to(DEVICE).requires_grad_()]
    y, grad = gate(*leaves), rand(rows, columns, seed=2).to(DEVICE)
    exact = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    wanted = exact[0] @ exact[1].t()
    d_tokens, d_weight = torch.autograd.grad(y, leaves, grad)
    wanted_grads = torch.autograd.grad(wanted, exact, grad.double().cpu())
    assert [value.dtype for value in (y, d_tokens, d_weight)] == [torch.float32, PRODUCTS, torch.float32]
    assert_near([y, d_weight], [wanted, wanted_grads[1]], 1e-5)
    assert_near([d_tokens], wanted_grads[:1], TOLERANCES[PRODUCTS])  # rounded to the tokens' precision


@on_device
@pytest.mark.parametrize("shape", [(70, 48, 16), (200, 130, 4), (5000, 64, 5), (40, 520, 3), (1100, 520, 3)], ids=str)
def test_the_predictor_in_one_is_its_layers_in_float32(shape):
    from diffmoe.moe.router_kernels import predict, predict_only

    rows, width, columns = shape
    tokens = rand(rows, width).to(DEVICE, PRODUCTS)
    leaves = [rand(*size, seed=seed).to(DEVICE).requires_grad_() for seed, size in enumerate(
        [(width, width), (width,), (columns, width), (columns,)], 1)]
    y, grad = predict(tokens, *leaves)[0], rand(rows, columns, seed=5).to(DEVICE)
    exact = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    wanted = F.linear(F.silu(F.linear(tokens.double().cpu(), *exact[:2])), *exact[2:])
    wanted_grads = torch.autograd.grad(wanted, exact, grad.double().cpu())
    assert_near([y, *torch.autograd.grad(y, leaves, grad)], [wanted, *wanted_grads], 1e-5)
    assert_near([predict_only(tokens, *leaves)], [wanted], 1e-5)


@on_device
@pytest.mark.parametrize("rows", [1, 100])
def test_a_predictor_of_many_tokens_leaves_out_what_only_gradients_need(rows, monkeypatch):
    from diffmoe.moe import router_kernels

    called = []
    for name in ("predict", "predict_only"):
        kernel = getattr(router_kernels, name)
        monkeypatch.setattr(float32, name, lambda *given, n=name, kernel=kernel: called.append(n) or kernel(*given))
    monkeypatch.setattr(float32, "kernels_apply", lambda x: True)
    monkeypatch.setattr(float32, "MANY_ROWS", 100)
    predictor, tokens = float32.CapacityPredictor(48, 4).to(DEVICE), rand(rows, 48).to(DEVICE, PRODUCTS)
    with torch.no_grad():
        alone = predictor(tokens)
    trained = predictor(tokens)
    assert called == ["predict_only" if rows >= 100 else "predict", "predict"]
    assert trained.requires_grad and not alone.requires_grad
    assert_near([alone], [trained], 1e-5)


@on_device
@pytest.mark.parametrize(("few", "chunk"), [(256, 2048), (8, 32), (8, 2048)])
@pytest.mark.parametrize(("experts", "pools", "tokens"), [(3, 1, 200), (4, 5, 16), (2, 2, 100), (16, 1, 64)], ids=str)
def test_the_largest_are_the_first_of_a_stable_sort(experts, pools, tokens, few, chunk, monkeypatch):
    from diffmoe.moe import selection_kernels

    monkeypatch.setattr(selection_kernels, "FEW", few)
    monkeypatch.setattr(selection_kernels, "CHUNK", chunk)
    scores = rand(experts, pools, tokens)
    scores[0] = scores[0].round()  # ties, of zeros of both signs too
    scores[..., ::3] *= 1e-30
    counts = torch.randint(0, tokens + 1, (experts, pools), generator=torch.Generator().manual_seed(1)).int()
    counts[0, 0], counts[-1, -1] = tokens, 0
    order = scores.sort(dim=-1, descending=True, stable=True)
    first = torch.arange(tokens) < counts[..., None]
    wanted = torch.zeros_like(first).scatter_(2, order.indices, first).flatten(1)
    least = order.values.gather(2, (counts.long() - 1).clamp(min=0)[..., None])[..., 0]
    taken, found = selection_kernels.take_largest(scores.flatten(1).to(DEVICE), counts.to(DEVICE))
    assert torch.equal(taken.cpu(), wanted)
    assert torch.equal(found.cpu()[counts > 0], least[counts > 0])


@on_device
@pytest.mark.parametrize("few", [256, 8])
def test_as_many_are_taken_where_scores_are_not_numbers(few, monkeypatch):
    from diffmoe.moe import selection_kernels

    monkeypatch.setattr(selection_kernels, "FEW", few)
    scores = rand(3, 2, 16)
    scores[0, 0, 5], scores[1] = float("nan"), float("nan")
    taken, _ = selection_kernels.take_largest(scores.flatten(1).to(DEVICE), torch.full((3, 2), 4).int().to(DEVICE))
    assert (taken.view(3, 2, 16).sum(-1) == 4).all()


@on_device
@pytest.mark.parametrize("spare", [7, 0, -5])
@pytest.mark.parametrize("chunk", [32, 2048])
def test_rows_are_laid_out_as_without_a_kernel(chunk, spare, monkeypatch):
    from diffmoe.models.pair_kernels import row_table
    from diffmoe.moe import selection_kernels

    monkeypatch.setattr(selection_kernels, "CHUNK", chunk)
    tokens, experts = 130, 5
    mask = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(1)) < torch.linspace(0, 1, experts)
    scores = rand(tokens, experts).requires_grad_()
    num_rows = int(mask.sum()) + spare
    plain = Routing.from_mask(mask, scores, num_rows=num_rows)
    laid_out = mask & (mask.t().flatten().cumsum(0).view(experts, tokens).t() <= num_rows)
    table = row_table(plain.token_N, plain.expert_of_pair(experts), tokens, experts)
    leaf = scores.detach().to(DEVICE).requires_grad_()
    token, gate, row = selection_kernels.lay_out(mask.t().to(DEVICE), leaf, num_rows)
    grad = rand(num_rows, seed=2)
    of_pads = torch.where(torch.arange(num_rows) < int(mask.sum()), grad, float("nan"))  # as pads' rows hold anything
    found = [token, gate, row, torch.autograd.grad(gate, leaf, of_pads.to(DEVICE))[0]]
    wanted = [plain.token_N, plain.gate_N, table, torch.autograd.grad(plain.gate_N, scores, grad)[0]]
    assert all(torch.equal(mine.cpu(), value) for mine, value in zip(found, wanted, strict=True))
    assert torch.equal(table >= 0, laid_out)


# ---------------------------------------------------------------- the whole model


def measure_model(router, kernels, monkeypatch):
    """Return prediction and gradients in bf16, with or without the kernels."""
    # the interpreter's bf16 products are wrong
    for module in (layers, experts, *([] if INTERPRETED else [attention, float32])):
        monkeypatch.setattr(module, "kernels_apply", lambda x: kernels)
    for module in (routing, expert_choice):
        monkeypatch.setattr(module, "selection_kernels_apply", lambda scores: kernels)
    # As much capacity as experts: rounding cannot change what is selected.
    model = random_model(router, depth=2, num_heads=2, capacity=4.0, shared_experts=1).to(DEVICE)
    x, t, labels = (value.to(DEVICE) for value in network_inputs(2))
    with torch.autocast(DEVICE, torch.bfloat16):
        output = model(x, t, labels)
    (output.prediction.float().square().mean() + sum(output.losses().values())).backward()
    return [output.prediction, *(p.grad for p in model.parameters() if p.grad is not None)]


@on_device
def test_experts_take_the_same_tokens_in_turn_with_kernels_as_without(monkeypatch):
    router = random_router(ROUTERS["diffmoe"] | {"warmup_steps": 1}).train().to(DEVICE)
    x, found = rand(4, 16, 32).to(DEVICE), []
    for kernels in (False, True):
        for module in (routing, expert_choice):
            monkeypatch.setattr(module, "selection_kernels_apply", lambda scores, kernels=kernels: kernels)
        pairs = router(x)
        assert (pairs.row_SE is not None) == kernels
        found.append((pairs.mask(64, 4), torch.zeros(64, 4, device=DEVICE).index_put(
            (pairs.token_N, pairs.expert_of_pair(4)), pairs.gate_N), pairs.observed))
    assert all(torch.equal(plain, fused) for plain, fused in zip(*found, strict=True))
    assert (found[0][0].sum(1) == 1).all()


@pytest.mark.slow
@on_device
@pytest.mark.parametrize("router", [None, "diffmoe", "tc"])
def test_a_model_with_every_kernel_equals_one_with_none(router, monkeypatch):
    plain, fused = (measure_model(router, kernels, monkeypatch) for kernels in (False, True))
    assert not torch.equal(plain[0], fused[0]), "no kernel ran"
    assert_near(fused, plain, 3e-2)
