"""Routers and Routing: what is selected, against nested loops and closed forms; what must not depend on what."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    DYNAMIC_ROUTERS,
    EXPERT_RACE,
    ROUTERS,
    TOKEN_CHOICE,
    network_inputs,
    one_line,
    rand,
    random_model,
    random_router,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffmoe.config import ConfigError
from diffmoe.moe.routing import Routing, row_count, tokens_an_expert_takes

B, T, E, D = 6, 16, 4, 32
S = B * T
DIFFMOE, EC = ROUTERS["diffmoe"], ROUTERS["ec"]


def tokens(batch_size: int = B, seed: int = 1) -> Tensor:
    return rand(batch_size, T, D, seed=seed)


# ---------------------------------------------------------------- Routing


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_router_knows_before_it_sees_tokens_whether_experts_get_equally_many(router, training):
    module = random_router(router).train(training)
    assert module.equal_rows == isinstance(module(tokens(), 2.0).tokens_per_expert, int)


@st.composite
def masks(draw) -> tuple[Tensor, Tensor]:
    """Draw a mask (S, E) of any density, empty rows and columns among it, and scores."""
    num_tokens, num_experts = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    bits = draw(st.lists(st.booleans(), min_size=num_tokens * num_experts, max_size=num_tokens * num_experts))
    return torch.tensor(bits).view(num_tokens, num_experts), rand(num_tokens, num_experts, seed=len(bits)).softmax(-1)


def pairs_of(mask_SE: Tensor) -> list[tuple[int, int]]:
    """Return (expert, token) by expert and then by token."""
    return [(e, s) for e in range(mask_SE.shape[1]) for s in range(mask_SE.shape[0]) if mask_SE[s, e]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(masks(), st.sampled_from([None, 0, 1, 5]))
def test_a_mask_survives_the_way_through_pairs_with_any_number_of_rows(drawn, spare):
    mask_SE, scores_SE = drawn
    num_tokens, num_experts = mask_SE.shape
    pairs = pairs_of(mask_SE)
    num_rows = None if spare is None else len(pairs) + spare
    routing = Routing.from_mask(mask_SE, scores_SE, num_rows=num_rows)
    assert torch.equal(routing.mask(num_tokens, num_experts), mask_SE)
    assert routing.token_N.tolist() == [s for _, s in pairs] + [0] * (spare or 0)
    assert routing.gate_N.tolist() == [scores_SE[s, e].item() for e, s in pairs] + [0.0] * (spare or 0)
    assert routing.expert_of_pair(num_experts).tolist() == [e for e, _ in pairs] + [num_experts] * (spare or 0)
    assert routing.counts(num_experts).tolist() == mask_SE.sum(0).tolist()
    assert (routing.overflow is None) if spare is None else not routing.overflow
    for per_sample in (1, num_tokens):
        expected = mask_SE.view(-1, per_sample * num_experts).sum(1).tolist()
        assert routing.pairs_per_token(num_tokens, num_experts).view(-1, per_sample).sum(1).tolist() == expected


@settings(max_examples=30, deadline=None, derandomize=True)
@given(masks())
def test_overflow_is_set_exactly_when_there_are_more_pairs_than_rows(drawn):
    mask_SE, scores_SE = drawn
    num_pairs = int(mask_SE.sum())
    for num_rows in range(num_pairs + 3):
        assert bool(Routing.from_mask(mask_SE, scores_SE, num_rows=num_rows).overflow) == (num_pairs > num_rows)


def test_the_gradient_of_the_weights_reaches_the_selected_scores_alone():
    scores = rand(9, 4).softmax(-1).requires_grad_()
    mask = rand(9, 4, seed=2) > 0
    upstream = rand(int(mask.sum()), seed=3)
    for spare in (0, 7):
        routing = Routing.from_mask(mask, scores, num_rows=len(upstream) + spare)
        (gradient,) = torch.autograd.grad(routing.gate_N, scores, torch.cat([upstream, torch.ones(spare)]))
        expected = torch.zeros(9, 4)
        for (e, s), value in zip(pairs_of(mask), upstream, strict=True):
            expected[s, e] = value
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize(("bound", "rows"), [(None, None), (0.5, 48), (1.25, 120), (4.0, 384), (9.0, 384)])
def test_a_row_bound_is_in_units_of_tokens_and_at_most_all_pairs(bound, rows):
    assert row_count(bound, S, E) == rows


# ---------------------------------------------------------------- selections against nested loops


def best(scores: list[float], count: int) -> set[int]:
    """Return the positions of the `count` largest."""
    return set(sorted(range(len(scores)), key=lambda position: -scores[position])[:count])


def expected_mask(scores_SE: Tensor, pool_tokens: int, counts_PE: list[list[int]]) -> Tensor:
    """Select, pool by pool and expert by expert, that many of the highest scores."""
    mask_SE = torch.zeros_like(scores_SE, dtype=torch.bool)
    for pool, counts_E in enumerate(counts_PE):
        first = pool * pool_tokens
        for expert, count in enumerate(counts_E):
            chosen = best(scores_SE[first : first + pool_tokens, expert].tolist(), count)
            for token in chosen:
                mask_SE[first + token, expert] = True
    return mask_SE


@pytest.mark.parametrize("capacity", [0.5, 1.0, 1.3, 4.0])
@pytest.mark.parametrize(("options", "pool_images", "train"), [
    (DIFFMOE, B, True), (DIFFMOE | {"pool_images": 2}, 2, True), (DIFFMOE | {"pool_images": 1}, 1, True),
    (EC, 1, True), (EC, 1, False), (ROUTERS["diffmoe_static"], B, False), (ROUTERS["ec_dynamic"], 1, True)])
def test_expert_choice_takes_the_k_highest_scores_of_each_pool(options, pool_images, train, capacity):
    router, x = random_router(options, capacity=capacity).train(train), tokens()
    routing, scores = router(x), router.scores(x)
    pool_tokens = pool_images * T
    k = int(pool_tokens / E * capacity)
    mask = expected_mask(scores, pool_tokens, [[k] * E] * (B // pool_images))
    assert torch.equal(routing.mask(S, E), mask)
    assert routing.token_N.numel() == E * k * (B // pool_images) == int(mask.sum())
    experts = routing.expert_of_pair(E)
    assert torch.equal(routing.gate_N, scores[routing.token_N, experts])


@pytest.mark.parametrize("options", [DIFFMOE | {"pool_images": 2}, ROUTERS["ec_dynamic"], DIFFMOE])
def test_the_observed_quantile_is_the_mean_over_pools_of_the_kth_largest_probability(options):
    router, x = random_router(options), tokens()
    pool_tokens = {"sample": 1}.get(options.get("pool"), options.get("pool_images", B)) * T
    k = pool_tokens // E
    p_PnE = torch.sigmoid(router.predictor(x)).view(-1, pool_tokens, E)
    expected = [sum(sorted(pool[:, e].tolist())[-k] for pool in p_PnE) / len(p_PnE) for e in range(E)]
    torch.testing.assert_close(router.train()(x).observed, torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["diffmoe", "ec_dynamic"])
def test_gate_selection_takes_as_many_highest_scores_as_tokens_pass_the_threshold(name):
    router, x = random_router(name).eval(), tokens()
    pool_tokens = T if name == "ec_dynamic" else S
    passes = router.predictor(x).sigmoid().flatten(0, 1) > router.threshold
    counts_PE = passes.view(-1, pool_tokens, E).sum(1).tolist()
    mask = router(x).mask(S, E)
    assert torch.equal(mask, expected_mask(router.scores(x), pool_tokens, counts_PE))
    assert not torch.equal(mask, passes)  # gate and predictor disagree, or this test shows nothing


@pytest.mark.parametrize("name", ["diffmoe_predictor", "ec_predictor"])
def test_predictor_selection_takes_the_tokens_that_pass_the_threshold(name):
    router, x = random_router(name).eval(), tokens()
    passes = router.predictor(x).sigmoid().flatten(0, 1) > router.threshold
    assert 0 < passes.sum() < passes.numel()
    assert torch.equal(router(x).mask(S, E), passes)


def test_a_token_on_the_threshold_does_not_pass():
    x = tokens()
    for name, values in (("diffmoe_predictor", lambda router: router.probabilities(x)),
                         ("race", lambda router: router.scores(x)[:, :1])):
        router = random_router(name).eval()
        on = values(router)[7]
        router.threshold.copy_(on)
        mask_SE = router(x).mask(S, E)
        assert not mask_SE[7, : len(on)].any() and mask_SE.any()
        router.threshold.copy_(on - 1e-5)
        assert router(x).mask(S, E)[7, : len(on)].all()


@pytest.mark.parametrize("name", ["diffmoe", "diffmoe_predictor", "ec_dynamic"])
@pytest.mark.parametrize(("threshold", "share"), [(0.0, 1), (1.0, 0)])
def test_a_global_threshold_of_zero_takes_every_pair_and_of_one_none(name, threshold, share):
    router = random_router(ROUTERS[name] | {"global_threshold": threshold}).eval()
    assert router(tokens()).mask(S, E).sum() == share * S * E


@pytest.mark.parametrize(("gate", "normalise"), {
    "softmax": lambda z: z.exp() / z.exp().sum(-1, keepdim=True), "sigmoid": lambda z: 1 / (1 + (-z).exp()),
    "identity": lambda z: z}.items())
def test_the_gate_is_normalised_as_asked_in_what_it_chooses_and_weighs(gate, normalise):
    router, x = random_router(DIFFMOE | {"gate_normalisation": gate}), tokens()
    scores_SE = normalise(x.flatten(0, 1) @ router.gate.weight.T)
    routing = router(x)
    for expert in range(E):
        chosen = routing.token_N.view(E, -1)[expert]
        assert set(chosen.tolist()) == set(scores_SE[:, expert].topk(S // E).indices.tolist())
        torch.testing.assert_close(routing.gate_N.view(E, -1)[expert], scores_SE[chosen, expert])


@pytest.mark.parametrize(("options", "pool_images"), [(DIFFMOE, B), (DIFFMOE | {"pool_images": 2}, 2),
                                                      (ROUTERS["ec_dynamic"], 1)])
@pytest.mark.parametrize("capacity", [1, 2])
def test_experts_take_tokens_in_turn_until_they_are_warm(options, pool_images, capacity):
    router, x = random_router(options | {"warmup_steps": 3}, capacity=capacity).train(), tokens()
    in_turn = torch.zeros(S, E, dtype=torch.bool)
    for image in range(B):
        for position in range(T):
            for choice in range(capacity):
                in_turn[image * T + position, (image + position - choice) % E] = True
    pool_tokens = pool_images * T
    chosen = expected_mask(router.scores(x), pool_tokens, [[pool_tokens * capacity // E] * E] * (S // pool_tokens))
    assert not torch.equal(in_turn, chosen)
    for num_updates in range(5):
        routing = router(x)
        mask = routing.mask(S, E)
        assert torch.equal(mask, in_turn if num_updates < 3 else chosen)
        assert torch.equal(routing.gate_N, router.scores(x)[routing.token_N, routing.expert_of_pair(E)])
        expected = torch.nn.functional.binary_cross_entropy_with_logits(router.predictor(x.flatten(0, 1)), mask.float())
        torch.testing.assert_close(routing.losses["predictor"], expected)
        router.update(routing.observed, num_updates)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_token_choice_takes_the_top_k_experts_of_each_token_in_training_and_at_inference(top_k):
    router, x = random_router("tc", capacity=top_k), tokens()
    scores = router.scores(x)
    mask = torch.tensor([[e in best(row.tolist(), top_k) for e in range(E)] for row in scores])
    for train in (True, False):
        routing = router.train(train)(x)
        assert torch.equal(routing.mask(S, E), mask)
        assert routing.token_N.numel() == S * top_k and not routing.overflow


@pytest.mark.parametrize("capacity", [0.3, 1.0, 2.5])
def test_expert_race_takes_exactly_the_best_pairs_of_the_batch_in_training(capacity):
    router, x = random_router("race", capacity=capacity).train(), tokens()
    logits = x.flatten(0, 1) @ router.gate.weight.T
    winners = best(logits.flatten().tolist(), int(S * capacity))
    routing = router(x)
    mask = routing.mask(S, E)
    assert set(mask.flatten().nonzero().flatten().tolist()) == winners
    assert routing.token_N.numel() == int(S * capacity) and not routing.overflow
    torch.testing.assert_close(routing.gate_N, torch.cat([logits[mask[:, e], e] for e in range(E)]))
    torch.testing.assert_close(routing.observed, logits[mask].amin()[None])
    torch.testing.assert_close(router.eval()(x).mask(S, E), logits > router.threshold)


@pytest.mark.parametrize("num_tokens,num_experts,capacity,k", [(96, 4, 1, 24), (16, 8, 1, 2), (16, 5, 1, 3),
                                                              (64, 16, 1.5, 6), (16, 4, 4, 16), (16, 16, 1, 1)])
def test_an_expert_takes_the_whole_part_of_tokens_over_experts_times_capacity(num_tokens, num_experts, capacity, k):
    assert tokens_an_expert_takes(num_tokens, num_experts, capacity, "a pool") == k


@pytest.mark.parametrize("pool_images", [4, 7])
def test_a_batch_that_is_no_whole_number_of_pools_is_refused_in_training_only(pool_images):
    router = random_router(DIFFMOE | {"pool_images": pool_images})
    with pytest.raises(ConfigError) as caught:
        router.train()(tokens())
    assert f"pool_images={pool_images}" in one_line(caught.value) and f"{B} images" in str(caught.value)
    router.eval()(tokens())


@pytest.mark.parametrize("name", ROUTERS)
def test_routing_is_float32_and_the_same_under_bf16_autocast(name):
    model = random_model(name)
    layer, x = model.moe_layers()[1], tokens()
    for train in (True, False):
        layer.train(train)
        plain = layer.route(x)
        with torch.autocast("cpu", torch.bfloat16):
            cast = layer.route(x)
        assert cast.gate_N.dtype is torch.float32 and torch.equal(cast.gate_N, plain.gate_N)
        assert torch.equal(cast.mask(S, E), plain.mask(S, E))
        assert all(torch.equal(value, plain.losses[key]) for key, value in cast.losses.items())


# ---------------------------------------------------------------- independence


@pytest.mark.parametrize("name", DYNAMIC_ROUTERS)
def test_the_row_bound_never_changes_a_result(name):
    model = random_model(name).eval()
    inputs = network_inputs(B)
    with torch.no_grad():
        free = model(*inputs)
        rows = max(routing.token_N.numel() for routing in free.routings)
        assert 0 < rows < S * E
        for bound in ((rows + 0.5) / S, 3.3, float(E), 99.0):
            bounded = model(*inputs, row_bound=bound)
            assert not any(routing.overflow for routing in bounded.routings)
            torch.testing.assert_close(bounded.prediction, free.prediction, atol=1e-6, rtol=1e-6)
        too_few = model(*inputs, row_bound=(rows - 0.5) / S)
    assert any(routing.overflow for routing in too_few.routings)


@pytest.mark.parametrize("name", [None, *ROUTERS])
def test_an_image_is_independent_of_its_batch_unless_the_batch_is_its_pool(name):
    model = random_model(name).eval()
    x, t, labels = network_inputs(B)
    with torch.no_grad():
        whole = model(x, t, labels).prediction
        order = torch.tensor([3, 0, 5])
        some = model(x[order], t[order], labels[order]).prediction
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1], labels[i : i + 1]).prediction for i in range(B)])
    coupled = name in ("diffmoe", "diffmoe_static")
    for result, expected in ((alone, whole), (some, whole[order])):
        difference = (result - expected).abs().max().item()
        assert difference > 1e-2 if coupled else difference < 1e-5, difference
    assert whole.abs().max() > 1


def test_a_pool_of_one_image_trains_like_the_sample_pool():
    batch, sample = random_model(DIFFMOE | {"pool_images": 1}).train(), random_model("ec_dynamic").train()
    ours, theirs = batch(*network_inputs(B)), sample(*network_inputs(B))
    assert torch.equal(ours.prediction, theirs.prediction)
    for one, other in zip(ours.routings, theirs.routings, strict=True):
        assert torch.equal(one.mask(S, E), other.mask(S, E)) and torch.equal(one.observed, other.observed)
        assert torch.equal(one.losses["predictor"], other.losses["predictor"])
    whole = random_model("diffmoe").train()(*network_inputs(B))
    assert not torch.equal(whole.routings[0].mask(S, E), ours.routings[0].mask(S, E))


@pytest.mark.parametrize("pool", ["batch", "sample"])
def test_a_predictor_changes_no_bit_of_the_backbones_gradients(pool):
    def gradients(**options):
        model = random_model({"kind": "expert_choice", "pool": pool, "inference": "static"} | options).train()
        output = model(*network_inputs(B))
        (output.prediction.square().mean() + sum(output.losses().values())).backward()
        predictors = {id(parameter) for parameter in model.predictor_parameters()}
        return ({name: p.grad for name, p in model.named_parameters() if id(p) not in predictors},
                {name: p.grad for name, p in model.named_parameters() if id(p) in predictors})

    expected, none = gradients(predictor=False)
    assert none == {} and all(gradient.any() for gradient in expected.values())
    by_weight = {}
    for weight in (0.0, 1.0, 100.0):
        backbone, by_weight[weight] = gradients(predictor=True, predictor_loss_weight=weight)
        assert backbone.keys() == expected.keys()
        assert [name for name, gradient in backbone.items() if not torch.equal(gradient, expected[name])] == []
    for name, gradient in by_weight[1.0].items():
        assert gradient.any() and not by_weight[0.0][name].any()
        torch.testing.assert_close(by_weight[100.0][name], 100 * gradient)


# ---------------------------------------------------------------- losses


def test_the_predictor_loss_is_the_weighted_cross_entropy_against_the_selection():
    router, x = random_router(DIFFMOE | {"predictor_loss_weight": 0.3}).train(), tokens()
    routing = router(x)
    p_SE = torch.sigmoid(router.predictor(x)).flatten(0, 1).double()
    chosen = routing.mask(S, E)
    bce = -torch.where(chosen, p_SE, 1 - p_SE).log().mean()
    assert routing.losses["predictor"].item() == pytest.approx(0.3 * bce.item(), rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_balance_loss_of_a_uniform_router_is_its_weight(top_k):
    router = random_router({"kind": TOKEN_CHOICE, "balance_loss_weight": 0.3}, capacity=top_k).train()
    torch.nn.init.zeros_(router.gate.weight)
    assert router(tokens()).losses["balance"].item() == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_balance_loss_and_its_gradient_have_their_closed_form(top_k):
    # L = w sum_e f_e P_e with f constant: dL/dlogit_se = w / S * p_se (f_e - sum_j f_j p_sj)
    weight = 0.3
    router = random_router({"kind": TOKEN_CHOICE, "balance_loss_weight": weight}, capacity=top_k).train()
    x = tokens()
    routing = router(x)
    x_SD = x.flatten(0, 1).double()
    p_SE = (x_SD @ router.gate.weight.detach().double().T).softmax(-1)
    assigned_E = [sum(e in best(row.tolist(), top_k) for row in p_SE) for e in range(E)]
    f_E = E * torch.tensor(assigned_E).double() / (S * top_k)
    assert routing.losses["balance"].item() == pytest.approx(weight * float(f_E @ p_SE.mean(0)), rel=1e-5)
    (gradient,) = torch.autograd.grad(routing.losses["balance"], router.gate.weight)
    d_logits = weight / S * p_SE * (f_E - (p_SE * f_E).sum(1, keepdim=True))
    torch.testing.assert_close(gradient.double(), d_logits.T @ x_SD, atol=1e-7, rtol=1e-5)


def test_the_router_similarity_of_a_uniform_router_is_its_weight():
    router = random_router({"kind": EXPERT_RACE, "similarity_loss_weight": 0.3}).train()
    torch.nn.init.zeros_(router.gate.weight)
    assert router(tokens()).losses["similarity"].item() == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("capacity", [0.02, 1.0, 2.0])  # the first: one pair, so that no token has two experts
def test_the_router_similarity_and_its_gradient_are_those_of_loops_over_pairs_of_experts(capacity):
    router = random_router({"kind": EXPERT_RACE, "similarity_loss_weight": 0.3}, capacity=capacity).train()
    x = tokens()
    routing = router(x)
    taken = routing.mask(S, E).tolist()
    weight = router.gate.weight.detach().double().requires_grad_()
    p_SE = (x.flatten(0, 1).double() @ weight.T).softmax(-1)
    both = [[sum(row[i] and row[j] for row in taken) for j in range(E)] for i in range(E)]
    alone = sum(both[i][i] for i in range(E))
    shared = sum(map(sum, both)) - alone
    wanted = sum(both[i][j] * (E / alone if i == j else (E * E - E) / max(shared, 1)) * (p_SE[:, i] * p_SE[:, j]).mean()
                 for i in range(E) for j in range(E))
    assert (shared == 0) == (capacity < 1)
    assert routing.losses["similarity"].item() == pytest.approx(0.3 * wanted.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(routing.losses["similarity"], router.gate.weight)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(0.3 * wanted, weight)[0], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("name", ROUTERS)
def test_auxiliary_losses_and_observations_are_made_in_training_only(name):
    router = random_router(name)
    trained, sampled = router.train()(tokens()), router.eval()(tokens())
    predictor, race, tc = hasattr(router, "predictor"), name == "race", name == "tc"
    assert list(trained.losses) == ["predictor"] * predictor + ["balance"] * tc
    assert (trained.observed is not None) == (predictor or race)
    assert not sampled.losses and sampled.observed is None


# ---------------------------------------------------------------- thresholds


@pytest.mark.parametrize("decay", [0.95, 0.5, 0.0])
def test_a_constant_observation_gives_one_minus_decay_to_the_n_of_it_and_all_of_it_debiased(decay):
    q = torch.tensor([0.1, 0.4, 0.7, 0.9])
    plain, debiased = (random_router(DIFFMOE | {"threshold_decay": decay, "threshold_debias": debias})
                       for debias in (False, True))
    for router in (plain, debiased):
        router.threshold.zero_()
    for n in range(60):
        plain.update(q, n)
        debiased.update(q, n)
        torch.testing.assert_close(plain.threshold, (1 - decay ** (n + 1)) * q, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(debiased.threshold, q, atol=1e-6, rtol=0)


def test_the_debiased_average_weighs_every_observation_as_adam_does():
    observations, decay = rand(12, E).sigmoid(), 0.8
    router = random_router(DIFFMOE | {"threshold_decay": decay, "threshold_debias": True})
    router.threshold.zero_()
    for n, observed in enumerate(observations):
        router.update(observed, n)
        weights = torch.tensor([decay ** (n - i) for i in range(n + 1)])
        expected = (weights[:, None] * observations[: n + 1]).sum(0) / weights.sum()
        torch.testing.assert_close(router.threshold, expected, atol=1e-6, rtol=1e-5)


def test_the_race_threshold_starts_at_its_first_observation_and_then_follows():
    router = random_router("race")
    expected = None
    for n, value in enumerate([2.0, -1.0, 0.5]):
        router.update(torch.tensor([value]), n)
        expected = value if expected is None else 0.95 * expected + 0.05 * value
        assert router.threshold.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ROUTERS)
def test_buffers_move_in_update_routers_and_never_in_a_forward_pass(name):
    model = random_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    outputs = [model.train(train)(*network_inputs(B)) for train in (True, False, True)]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    observed = [routing.observed for routing in outputs[0].routings if routing.observed is not None]
    if observed:
        model.update_routers(observed, 3)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    thresholds = {f"blocks.{index}.ffn.router.threshold" for index in (1, 3)} if observed else set()
    assert moved == thresholds


def test_each_router_of_the_model_is_moved_by_its_own_observation():
    model = random_model("diffmoe")
    layers = list(model.moe_layers().values())
    observed = [torch.full((E,), 0.2), torch.full((E,), 0.8)]
    for layer in layers:
        layer.router.threshold.zero_()
    model.update_routers(observed, 0)
    for layer, value in zip(layers, observed, strict=True):
        torch.testing.assert_close(layer.router.threshold, 0.05 * value)
    with pytest.raises(ValueError):
        model.update_routers(observed[:1], 1)
