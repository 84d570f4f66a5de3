"""The expert bank: every backend equals the loop, and the loop equals plain float64 arithmetic pair by pair."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import DYNAMIC_ROUTERS, ROUTERS, rand, random_model, random_router, randomise
from timm.layers import Mlp
from torch import Tensor, nn

from diffmoe.config import Backend
from diffmoe.moe import experts as experts_module
from diffmoe.moe.experts import ExpertBank, grouped_is_supported
from diffmoe.moe.routing import Routing

B, T, E = 3, 7, 5
S = B * T
D, HIDDEN = 33, 57  # odd: no row is a multiple of 16 bytes
QUANTITIES = ("y", "x", "gate", "w1", "b1", "w2", "b2")


def from_router(name: str, train: bool, row_bound: float | None = None, **changes) -> Routing:
    """Route 3 images of 16 tokens by a random router."""
    router = random_router(ROUTERS[name], **changes).train(train)
    return router(rand(B, 16, 32), row_bound)


def ragged(num_rows: int | None = None) -> Routing:
    """Route 3 x 7 tokens unevenly: expert 2 has no token, tokens 0 and 5 no expert, token 1 has all the others."""
    mask_SE = rand(S, E, seed=3) > 0.4
    mask_SE[1] = True
    mask_SE[:, 2] = False
    mask_SE[[0, 5]] = False
    return Routing.from_mask(mask_SE, rand(S, E, seed=4).softmax(-1), num_rows=num_rows)


def equal_rows() -> Routing:
    """Give each expert the same number of random tokens of 3 x 7."""
    tokens = torch.cat([rand(S, seed=expert).argsort()[:4] for expert in range(E)])
    return Routing(token_N=tokens, gate_N=rand(4 * E, seed=9).sigmoid(), tokens_per_expert=4)


ROUTINGS = {
    **{f"{name} train": (lambda name=name: from_router(name, True)) for name in ROUTERS},
    **{f"{name} eval": (lambda name=name: from_router(name, False)) for name in ROUTERS},
    **{f"{name} eval bound": (lambda name=name: from_router(name, False, 4.0)) for name in DYNAMIC_ROUTERS},
    **{f"{name} train C=2": (lambda name=name: from_router(name, True, capacity=2.0)) for name in ("tc", "race", "ec")},
    "odd equal": equal_rows, "odd ragged": ragged, "odd ragged bound": lambda: ragged(S * E),
    "nothing": lambda: Routing.from_mask(torch.zeros(S, E, dtype=torch.bool), rand(S, E), num_rows=None),
    "nothing bound": lambda: Routing.from_mask(torch.zeros(S, E, dtype=torch.bool), rand(S, E), num_rows=6),
}


def case(name: str) -> tuple[ExpertBank, Tensor, Routing]:
    """Return a random bank, tokens and the routing `name`, whose sizes fit together."""
    routing = ROUTINGS[name]()
    tokens, width, hidden, num_experts = (48, 32, 128, 4) if name.split()[0] in ROUTERS else (S, D, HIDDEN, E)
    bank = randomise(ExpertBank(num_experts, width, hidden))
    return bank, rand(tokens, width, seed=7), routing


def measure(bank: ExpertBank, x: Tensor, routing: Routing, backend: str) -> dict[str, Tensor]:
    """Return the output and the gradients of everything that it depends on."""
    bank.backend = Backend(backend)
    x = x.clone().requires_grad_()
    gate = routing.gate_N.detach().to(torch.promote_types(x.dtype, torch.float32)).clone().requires_grad_()
    y = bank(x, dataclasses.replace(routing, gate_N=gate))
    leaves = [x, gate, bank.w1, bank.b1, bank.w2, bank.b2]
    gradients = torch.autograd.grad(y, leaves, rand(*y.shape, seed=11).to(y.dtype), materialize_grads=True)
    return dict(zip(QUANTITIES, (y.detach(), *gradients), strict=True))


def pair_by_pair(bank: ExpertBank, x: Tensor, routing: Routing) -> dict[str, Tensor]:
    """Compute the same as `measure` in float64 by one linear layer after another, a pair at a time."""
    leaves = [value.detach().double().requires_grad_()
              for value in (x, routing.gate_N, bank.w1, bank.b1, bank.w2, bank.b2)]
    x, gate, w1, b1, w2, b2 = leaves
    given = routing.tokens_per_expert
    rows = [given] * len(w1) if isinstance(given, int) else given.tolist()
    total, row = [torch.zeros_like(token) for token in x], 0
    for expert, count in enumerate(rows):
        for _ in range(count):
            token = int(routing.token_N[row])
            hidden = F.gelu(F.linear(x[token], w1[expert].T, b1[expert]), approximate="tanh")
            total[token] = total[token] + gate[row] * F.linear(hidden, w2[expert].T, b2[expert])
            row += 1
    y = torch.stack(total) + 0 * x  # tie y to x where nothing is routed
    gradients = torch.autograd.grad(y, leaves, rand(*y.shape, seed=11).double(), materialize_grads=True)
    return dict(zip(QUANTITIES, (y.detach(), *gradients), strict=True))


def backends_for(routing: Routing) -> list[str]:
    return ["grouped", "auto", *(["batched"] if isinstance(routing.tokens_per_expert, int) else [])]


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float, context: str) -> None:
    """Compare each quantity by its norm, so that one wrong entry of a small gradient shows and a NaN never passes."""
    for name, value in expected.items():
        error = (actual[name].double() - value.double()).norm()
        assert error <= relative * value.double().norm(), f"{context}: {name} off by {error:.2e} of {value.norm():.2e}"


@pytest.mark.parametrize("name", ROUTINGS)
def test_the_loop_equals_plain_arithmetic_pair_by_pair(name):
    bank, x, routing = case(name)
    expected = pair_by_pair(bank, x, routing)
    assert_close(measure(bank, x, routing, "loop"), expected, 1e-5, "float32")
    assert_close(measure(bank.double(), x.double(), routing, "loop"), expected, 1e-12, "float64")


@pytest.mark.parametrize("name", ROUTINGS)
def test_every_backend_equals_the_loop_in_output_and_gradients(name):
    bank, x, routing = case(name)
    expected = measure(bank, x, routing, "loop")
    for backend in backends_for(routing):
        assert_close(measure(bank, x, routing, backend), expected, 1e-5, backend)


@pytest.mark.parametrize("name", ROUTINGS)
def test_every_backend_in_bf16_stays_near_the_loop_in_bf16_and_in_float32(name):
    bank, x, routing = case(name)
    expected = measure(bank, x, routing, "loop")
    with torch.autocast("cpu", torch.bfloat16):
        loop = measure(bank, x, routing, "loop")
        results = {backend: measure(bank, x, routing, backend) for backend in backends_for(routing)}
    assert_close(loop, expected, 1e-2, "bf16 loop against the float32 loop")
    assert not routing.counts(bank.w1.shape[0]).any() or not torch.equal(loop["y"], expected["y"]), "ran in float32"
    for backend, result in results.items():
        assert_close(result, expected, 1e-2, f"bf16 {backend} against the float32 loop")
        assert_close(result, loop, 1e-2, f"bf16 {backend} against the bf16 loop")


@pytest.mark.parametrize("backend", ["loop", "batched", "grouped"])
def test_bf16_gradients_stay_near_float32_when_an_expert_has_a_thousand_tokens(backend):
    bank = randomise(ExpertBank(2, 16, 24))
    x = rand(2048, 16) + 1  # a mean, so that bias gradients grow with the number of rows
    equal = Routing(token_N=torch.arange(2048), gate_N=torch.ones(2048), tokens_per_expert=1024)
    expected = measure(bank, x, equal, "loop")
    with torch.autocast("cpu", torch.bfloat16):
        actual = measure(bank, x, equal, backend)
    assert_close(actual, expected, 1e-2, backend)


def test_the_output_has_the_dtype_of_the_tokens_in_every_precision():
    bank, x, routing = case("odd ragged")
    with torch.autocast("cpu", torch.bfloat16):
        assert bank(x, routing).dtype is torch.float32
        assert bank(x.bfloat16(), routing).dtype is torch.bfloat16
    assert bank.double()(x.double(), routing).dtype is torch.float64


@pytest.mark.parametrize("backend", ["loop", "batched", "grouped", "auto"])
def test_one_expert_with_gate_one_equals_the_dense_network(backend):
    dense = randomise(Mlp(D, HIDDEN, act_layer=lambda: nn.GELU(approximate="tanh")))
    bank = ExpertBank(1, D, HIDDEN)
    ours = {"w1": dense.fc1.weight.T, "b1": dense.fc1.bias, "w2": dense.fc2.weight.T, "b2": dense.fc2.bias}
    bank.load_state_dict({name: value.detach()[None] for name, value in ours.items()})
    x = rand(S, D)
    routing = Routing(token_N=torch.arange(S), gate_N=torch.ones(S), tokens_per_expert=S)
    leaf = x.clone().requires_grad_()
    y = dense(leaf)
    names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    parameters = [leaf, *(dense.get_parameter(name) for name in names)]
    d_x, *gradients = torch.autograd.grad(y, parameters, rand(S, D, seed=11))
    expected = {"y": y.detach(), "x": d_x} | {key: gradient.T[None] if key[0] == "w" else gradient[None]
                                              for key, gradient in zip(ours, gradients, strict=True)}
    assert_close(measure(bank, x, routing, backend), expected, 1e-5, backend)


def test_a_token_without_an_expert_gets_zero_and_an_expert_without_a_token_no_gradient():
    bank, x, routing = case("odd ragged")
    assert routing.counts(E)[2] == 0
    for backend in ("loop", "grouped", "auto"):
        result = measure(bank, x, routing, backend)
        assert not result["y"][[0, 5]].any() and not result["x"][[0, 5]].any()
        assert not any(result[name][2].any() for name in ("w1", "b1", "w2", "b2"))
        assert result["y"][1].any()


# ---------------------------------------------------------------- pads


@pytest.mark.parametrize("backend", ["loop", "grouped", "auto"])
def test_pad_rows_change_neither_output_nor_gradients(backend):
    bank, x, routing = case("odd ragged")
    exact = measure(bank, x, routing, backend)
    padded = ragged(S * E)
    pairs = routing.token_N.numel()
    assert padded.token_N.numel() > 2 * pairs
    result = measure(bank, x, padded, backend)
    result["gate"] = result["gate"][:pairs]
    assert_close(result, exact, 1e-6, backend)


@pytest.mark.parametrize("backend", ["loop", "grouped", "auto"])
def test_memory_behind_the_last_pair_reaches_neither_output_nor_gradients(backend, unset_memory_is_nan):
    bank, x, routing = case("odd ragged bound")
    result = measure(bank, x, routing, backend)
    assert [name for name, value in result.items() if value.isnan().any()] == []
    assert_close(result, pair_by_pair(bank, x, routing), 1e-5, backend)


class UnsetBehindLast(torch.autograd.Function):
    """The grouped product as an accelerator's kernel does it: rows behind the last end are not written."""

    @staticmethod
    def forward(ctx, x_NI, weight_EIO, ends_E):
        ctx.save_for_backward(x_NI, weight_EIO)
        ctx.ends = [0, *ends_E.tolist()]
        y = x_NI.new_full((len(x_NI), weight_EIO.shape[2]), float("nan"))
        for weight, (first, end) in zip(weight_EIO, pairwise(ctx.ends), strict=True):
            y[first:end] = x_NI[first:end] @ weight
        return y

    @staticmethod
    def backward(ctx, d_y):
        x_NI, weight_EIO = ctx.saved_tensors
        d_x, d_weight = torch.full_like(x_NI, float("nan")), torch.zeros_like(weight_EIO)
        for expert, (first, end) in enumerate(pairwise(ctx.ends)):
            d_x[first:end] = d_y[first:end] @ weight_EIO[expert].T
            d_weight[expert] = x_NI[first:end].T @ d_y[first:end]
        return d_x, d_weight, None


def test_a_grouped_kernel_that_leaves_pads_unset_is_harmless(monkeypatch):
    monkeypatch.setattr(experts_module, "grouped_mm", lambda x, weight, offs: UnsetBehindLast.apply(x, weight, offs))
    bank, x, routing = case("odd ragged bound")
    result = measure(bank, x, routing, "grouped")
    assert [name for name, value in result.items() if value.isnan().any()] == []
    assert_close(result, pair_by_pair(bank, x, routing), 1e-5, "grouped")


@pytest.mark.parametrize("backend", ["loop", "grouped", "auto"])
@pytest.mark.parametrize("rotten", [float("nan"), float("inf")])
def test_an_unrouted_token_that_pads_name_does_not_spoil_the_others(backend, rotten):
    bank, x, routing = case("odd ragged bound")
    x[0] = rotten
    result = measure(bank, x, routing, backend)
    assert [name for name, value in result.items() if not value.isfinite().all()] == []


# ---------------------------------------------------------------- what cannot be computed


def test_batched_refuses_unequal_rows_and_names_the_remedy():
    bank, x, routing = case("odd ragged")
    with pytest.raises(ValueError, match=r"backend=batched.*grouped, loop or auto"):
        measure(bank, x, routing, "batched")


def test_grouped_refuses_float64_and_auto_computes_it():
    bank, x, routing = case("odd ragged")
    expected = pair_by_pair(bank, x, routing)
    bank, x = bank.double(), x.double()
    with pytest.raises(ValueError, match=r"backend=grouped.*float64.*loop or auto"):
        measure(bank, x, routing, "grouped")
    assert_close(measure(bank, x, routing, "auto"), expected, 1e-12, "auto")


@pytest.mark.parametrize(("name", "chosen"), [("odd equal", Backend.BATCHED), ("odd ragged", Backend.GROUPED)])
def test_auto_takes_batched_for_equal_rows_and_grouped_for_ragged_ones(monkeypatch, name, chosen):
    assert grouped_is_supported(torch.device("cpu"), torch.float32)
    calls, original = [], experts_module._product
    monkeypatch.setattr(experts_module, "_product", lambda *args: calls.append(args[-1]) or original(*args))
    bank, x, routing = case(name)
    bank(x, routing)
    assert calls == [chosen, chosen]


def test_auto_falls_back_to_the_loop_where_grouped_products_are_missing(monkeypatch):
    bank, x, routing = case("odd ragged")
    expected = measure(bank, x, routing, "loop")
    monkeypatch.setattr(experts_module, "grouped_mm", None)
    assert all(torch.equal(value, expected[key]) for key, value in measure(bank, x, routing, "auto").items())


def test_a_network_waits_for_the_device_where_the_loop_counts_unequal_rows(monkeypatch):
    def waiting(training, dtype=torch.bfloat16):
        return [name for name, model in models.items() if model.train(training).waits_for_device(dtype)]

    models = {name: random_model(name) for name in (*ROUTERS, None)}
    assert waiting(True) == waiting(False) == []
    assert waiting(True, torch.float64) == ["tc", "race"]
    monkeypatch.setattr(experts_module, "grouped_mm", None)  # as on a GPU before Hopper
    assert waiting(True) == ["tc", "race"]
    assert waiting(False) == [*DYNAMIC_ROUTERS[:4], "tc", "race"]
    assert models["diffmoe_static"].set_backend(Backend.LOOP).waits_for_device(torch.bfloat16)
