"""Diffusion processes, samplers and guidance against golden fixtures and closed forms.

Golden samples need the network and are checked by `diffmoe/verify.py`; here predictions are analytic.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffmoe.config import ConfigError, DiffusionConfig, GuidedForward, ProcessKind, Sampler, SamplingConfig
from diffmoe.diffusion import build_process, guided
from diffmoe.diffusion.guidance import guided_halves

FLOW = build_process(DiffusionConfig(process=ProcessKind.FLOW))
DDPM = build_process(DiffusionConfig(process=ProcessKind.DDPM))
PROCESS_OF = {sampler: process for process in (FLOW, DDPM) for sampler in process.samplers}
SHAPE = (3, 4, 2, 2)  # B, C, H, W


@pytest.fixture(scope="module")
def golden():
    return {name: np.load(Path(__file__).parent / "golden" / f"{name}.npz") for name in ("samplers", "dense")}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sampling(sampler, num_steps=10, **options):
    return SamplingConfig(sampler=sampler, num_steps=num_steps, **options)


class Recorder:
    """A prediction that remembers what it was given."""

    def __init__(self, predict):
        self.predict, self.inputs, self.times = predict, [], []

    def __call__(self, x, t):
        self.inputs.append(x)
        self.times.append(t)
        return self.predict(x, t)


def zeros_2c(x, t):
    return torch.cat([x, x], 1) * 0


def eps_of_gaussian(std, mean=0.0, variance_output=-1.0):
    """Return the exact noise prediction for data N(mean, std^2), in 2C channels."""
    def predict(x, t):
        alpha = torch.from_numpy(DDPM.schedule.alphas_cumprod)[t][:, None, None, None].to(x.dtype)
        eps = (1 - alpha).sqrt() * (x - alpha.sqrt() * mean) / (alpha * std**2 + 1 - alpha)
        return torch.cat([eps, torch.full_like(x, variance_output)], 1)
    return predict


# Schedule


@pytest.mark.parametrize("name", ["betas", "alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped"])
def test_schedule_equals_golden(golden, name):
    ours = getattr(DDPM.schedule, name)
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, golden["samplers"][f"ddpm/{name}"], rtol=1e-12)


@pytest.mark.parametrize("num_steps", [10, 250])
def test_respaced_chain_equals_golden(golden, num_steps):
    chain, fixture = DDPM.schedule.respace(num_steps), golden["samplers"]
    np.testing.assert_array_equal(chain.timesteps, fixture[f"ddpm/timesteps_{num_steps}"], strict=True)
    np.testing.assert_allclose(chain.betas, fixture[f"ddpm/betas_{num_steps}"], rtol=1e-12)
    np.testing.assert_allclose(chain.alphas_cumprod, fixture[f"ddpm/alphas_cumprod_{num_steps}"], rtol=1e-12)


def test_respacing_rounds_half_to_even():
    assert DDPM.schedule.respace(7).timesteps.tolist() == [0, 166, 333, 500, 666, 832, 999]  # 166.5, 499.5, 832.5


@pytest.mark.parametrize("num_steps", [1, 1001])
def test_a_chain_of_too_few_or_too_many_steps_is_refused(num_steps):
    with pytest.raises(ConfigError, match=f"sampling.num_steps={num_steps}: .*2 to 1000"):
        DDPM.sample(zeros_2c, normal(*SHAPE), config=sampling(Sampler.DDIM, num_steps))


# Training


def test_times_are_uniform_over_their_range_and_follow_the_generator():
    def draw(process, seed=0):
        return process.sample_times(100_000, generator=torch.Generator().manual_seed(seed), device="cpu")

    flow, ddpm = draw(FLOW), draw(DDPM)
    assert flow.dtype == torch.float32 and flow.min() >= 0 and flow.max() < 1
    assert ddpm.dtype == torch.int64 and ddpm.unique().tolist() == list(range(1000))
    for share in (flow, (ddpm + 0.5) / 1000):  # mean and variance within 5 standard errors of a uniform's
        assert abs(share.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / 1e5)
        assert abs(share.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / 1e5)
    for process, drawn in ((FLOW, flow), (DDPM, ddpm)):
        assert torch.equal(draw(process), drawn) and not torch.equal(draw(process, seed=1), drawn)


def test_ddpm_noising_equals_golden(golden):
    x, noise, t, expected = (torch.from_numpy(golden["samplers"][f"ddpm/train/{name}"])
                             for name in ("x", "noise", "t", "x_t"))
    torch.testing.assert_close(DDPM.add_noise(x, noise, t), expected, rtol=0, atol=1e-6)


def test_flow_loss_of_golden_outputs_equals_golden(golden):
    x, z, t, zt, out, mse = (torch.from_numpy(golden["dense"][name])
                             for name in ("x", "z0", "t", "zt", "train/out", "train/loss_mse"))
    predict = Recorder(lambda x_t, t: out)
    losses = FLOW.loss(predict, x, z, t)
    assert losses.keys() == {"mse"} and len(predict.times) == 1
    torch.testing.assert_close(losses["mse"], mse, rtol=0, atol=1e-6)
    torch.testing.assert_close(predict.inputs[0], zt, rtol=0, atol=1e-6)
    assert torch.equal(predict.times[0], t)


BETA = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
ALPHA_BAR = (1 - BETA).cumprod(0)


def posterior_by_bayes(x0, x_t, t):
    """Return mean and variance in x' of N(x_t; sqrt(1 - beta) x', beta) N(x'; sqrt(alpha_bar') x0, 1 - alpha_bar')."""
    likelihood, prior = (1 - BETA[t]) / BETA[t], 1 / (1 - ALPHA_BAR[t - 1])
    pull = (1 - BETA[t]).sqrt() / BETA[t] * x_t + ALPHA_BAR[t - 1].sqrt() * prior * x0
    return pull / (likelihood + prior), 1 / (likelihood + prior)


@pytest.mark.parametrize("t", [1, 10, 400, 999])
def test_ddpm_losses_are_squared_error_and_divergence_from_the_posterior(t):
    x, noise, output = normal(2, 4, 2, 2), normal(2, 4, 2, 2, seed=1), normal(2, 8, 2, 2, seed=2)
    losses = DDPM.loss(lambda x_t, t: output, x, noise, torch.full((2,), t))
    torch.testing.assert_close(losses["mse"], (output[:, :4] - noise).square().flatten(1).mean(1))
    x_t = ALPHA_BAR[t].sqrt() * x + (1 - ALPHA_BAR[t]).sqrt() * noise
    mean_q, variance = posterior_by_bayes(x, x_t, t)
    x0 = (x_t - (1 - ALPHA_BAR[t]).sqrt() * output[:, :4]) / ALPHA_BAR[t].sqrt()
    share = (output[:, 4:] + 1) / 2
    p = Normal(posterior_by_bayes(x0, x_t, t)[0], (BETA[t] ** share * variance ** (1 - share)).sqrt())
    nats = kl_divergence(Normal(mean_q, variance.sqrt()), p)
    torch.testing.assert_close(losses["vb"], nats.flatten(1).mean(1) / math.log(2), rtol=1e-9, atol=0)


def test_vb_at_timestep_0_is_the_likelihood_of_the_images_level():
    level = torch.randint(256, (2, 4, 2, 2), generator=torch.Generator().manual_seed(0))
    level[0, :2, 0, 0] = torch.tensor([0, 255])  # the outermost levels reach to infinity
    x, noise = level.double() * 2 / 255 - 1, normal(2, 4, 2, 2, seed=1)
    eps = noise + 0.3 * normal(2, 4, 2, 2, seed=2)
    output = torch.cat([eps, torch.ones_like(eps)], 1)  # variance beta_0
    vb = DDPM.loss(lambda x_t, t: output, x, noise, torch.zeros(2, dtype=torch.int64))["vb"]
    p = Normal(x + math.sqrt(BETA[0] / (1 - BETA[0])) * (noise - eps), BETA[0].sqrt())
    upper = torch.where(level == 255, 1.0, p.cdf(x + 1 / 255))
    lower = torch.where(level == 0, 0.0, p.cdf(x - 1 / 255))
    nats = -(upper - lower).log()
    torch.testing.assert_close(vb, nats.flatten(1).mean(1) / math.log(2), rtol=1e-3, atol=0)  # the CDF is approximate


def test_vb_is_zero_only_for_the_posterior_itself():
    x, noise, t = normal(*SHAPE), normal(*SHAPE, seed=1), torch.tensor([1, 500, 999])

    def vb(eps_error, variance_output):
        output = torch.cat([noise + eps_error, torch.full_like(x, variance_output)], 1)
        return DDPM.loss(lambda x_t, t: output, x, noise, t)["vb"]

    assert vb(0, -1).abs().max() < 1e-12
    assert vb(0.1, -1).min() > 1e-6
    # At t = 999 the bounds all but coincide, so only the early steps can tell a wrong variance.
    assert vb(0, 0)[0] > 1e-3


def test_mse_trains_the_mean_only_and_vb_the_variance_only_in_one_call():
    x, noise, t = normal(*SHAPE), normal(*SHAPE, seed=1), torch.tensor([0, 1, 500])
    output = normal(3, 8, 2, 2, seed=2).mul_(0.1).requires_grad_()
    predict = Recorder(lambda x_t, t: output)
    losses = DDPM.loss(predict, x, noise, t)
    assert len(predict.times) == 1 and losses.keys() == {"mse", "vb"}
    for name, trained, untouched in (("mse", slice(0, 4), slice(4, 8)), ("vb", slice(4, 8), slice(0, 4))):
        (gradient,) = torch.autograd.grad(losses[name].sum(), output, retain_graph=True)
        assert (gradient[:, trained].flatten(1).abs().amax(1) > 0).all() and not gradient[:, untouched].any()


# Sampling


@pytest.mark.parametrize("num_steps", [1, 3, 10])
@pytest.mark.parametrize("sampler", FLOW.samplers)
def test_flow_samplers_are_exact_on_straight_paths(sampler, num_steps):
    noise, data = normal(*SHAPE), normal(*SHAPE, seed=1)
    predict = lambda x, t: torch.cat([data - noise, torch.full_like(x, torch.nan)], 1)  # noqa: E731 (sigma is dropped)
    torch.testing.assert_close(FLOW.sample(predict, noise, config=sampling(sampler, num_steps)), data)


MEAN, STD = 0.5, 0.3


def velocity_of_gaussian(x, t):
    """Return the exact velocity for data N(m, s^2), whose flow carries z to m + s z."""
    t = t.to(x.dtype)[:, None, None, None]
    return MEAN + (t * STD**2 - (1 - t)) / (t**2 * STD**2 + (1 - t) ** 2) * (x - t * MEAN)


@pytest.mark.parametrize("sampler, order", [(Sampler.EULER, 1), (Sampler.HEUN, 2)])
def test_error_falls_with_the_samplers_order(sampler, order):
    noise = normal(*SHAPE)
    # Numbers of steps are powers of two: those times are exact in float32.
    errors = [(FLOW.sample(velocity_of_gaussian, noise, config=sampling(sampler, n)) - (MEAN + STD * noise)).abs().max()
              for n in (128, 256)]
    assert (errors[0] / errors[1]).item() == pytest.approx(2**order, rel=0.05)


def test_dopri5_keeps_its_tolerance_in_few_calls_whatever_num_steps_says():
    noise = normal(*SHAPE)
    predict = Recorder(velocity_of_gaussian)
    image = FLOW.sample(predict, noise, config=sampling(Sampler.DOPRI5, 1))
    torch.testing.assert_close(image, MEAN + STD * noise, rtol=0, atol=3e-3)  # steps of relative error 1e-3
    assert 20 < len(predict.times) < 100 and {tuple(t.shape) for t in predict.times} == {(3,)}
    assert torch.equal(FLOW.sample(velocity_of_gaussian, noise, config=sampling(Sampler.DOPRI5, 9)), image)


def test_network_sees_float32_times_of_each_flow_evaluation():
    for sampler, expected in ((Sampler.EULER, [0, 1 / 4, 2 / 4, 3 / 4]),
                              (Sampler.HEUN, [0, 1 / 4, 1 / 4, 2 / 4, 2 / 4, 3 / 4, 3 / 4, 1])):
        predict = Recorder(lambda x, t: x)
        FLOW.sample(predict, normal(*SHAPE), config=sampling(sampler, 4))
        times = torch.stack(predict.times)
        assert times.dtype == torch.float32 and times.tolist() == [[t] * 3 for t in expected]


@pytest.mark.parametrize("sampler", DDPM.samplers)
def test_network_sees_original_int64_timesteps_from_the_highest(golden, sampler):
    predict, used = Recorder(zeros_2c), []

    def step_noise(i):
        used.append(i)
        return normal(*SHAPE, seed=i)

    DDPM.sample(predict, normal(*SHAPE), config=sampling(sampler, ddim_eta=1.0), step_noise=step_noise)
    expected = torch.from_numpy(golden["samplers"]["ddpm/timesteps_10"]).flip(0)
    assert torch.equal(torch.stack(predict.times), expected[:, None].expand(-1, 3))
    assert used == list(range(9))  # no noise at the last step


@pytest.mark.parametrize("num_steps", [2, 10, 100])
def test_ddim_stays_on_the_path_of_a_point_mass(num_steps):
    """With data at one point, the noise is the same at every step and the last image is the point."""
    predict = Recorder(eps_of_gaussian(std=0.0, mean=0.7))
    noise = normal(*SHAPE)
    image = DDPM.sample(predict, noise, config=sampling(Sampler.DDIM, num_steps))
    torch.testing.assert_close(image, torch.full_like(image, 0.7))
    eps = [predict.predict(x, t)[:, :4] for x, t in zip(predict.inputs, predict.times, strict=True)]
    torch.testing.assert_close(torch.stack(eps), eps[0].expand(num_steps, *SHAPE))


def test_ddim_follows_the_probability_flow_of_a_gaussian():
    """The flow keeps x over its standard deviation: from variance 1 - a (1 - s^2) at a = alpha_bar to s^2."""
    std, noise, alpha = 0.5, normal(*SHAPE), DDPM.schedule.alphas_cumprod[-1]
    exact = noise * std / math.sqrt(1 - alpha * (1 - std**2))
    errors = [(DDPM.sample(eps_of_gaussian(std), noise, config=sampling(Sampler.DDIM, n)) / exact - 1).abs().max()
              for n in (500, 1000)]
    assert errors[1] < 4e-3 and (errors[0] / errors[1]).item() == pytest.approx(2, rel=0.1)  # a first-order method


@pytest.mark.parametrize("variance_output", [-1.0, 1.0])
def test_ancestral_samples_have_the_variance_of_the_data(variance_output):
    """Both bounds of the variance are consistent with Gaussian data as the steps grow (Ho et al., section 3.2)."""
    std, generator, noise = 0.5, torch.Generator().manual_seed(0), normal(5000, 1, 1, 1)
    images = DDPM.sample(eps_of_gaussian(std, variance_output=variance_output), noise,
                         config=sampling(Sampler.ANCESTRAL, 200),
                         step_noise=lambda i: torch.randn(noise.shape, generator=generator, dtype=noise.dtype))
    # The standard error is 1 % (5000 values), the bias of 200 steps about 2 %.
    assert images.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("clip", [False, True])
def test_ddim_with_eta_1_is_ancestral_sampling_with_the_lowest_variance(clip):
    ddim, ancestral = (DDPM.sample(eps_of_gaussian(std=0.9, mean=0.5, variance_output=-1.0), normal(*SHAPE),
                                   config=sampling(sampler, ddim_eta=1.0, clip_denoised=clip),
                                   step_noise=lambda i: normal(*SHAPE, seed=i + 1))
                       for sampler in DDPM.samplers)
    # alike but for the first variance of the chain, which is 0 and not drawn
    torch.testing.assert_close(ddim, ancestral)


@pytest.mark.parametrize("variance_output", [-1.0, 0.0, 1.0])
def test_ancestral_noise_has_the_predicted_variance(variance_output):
    chain = DDPM.schedule.respace(4)
    share = (1 + variance_output) / 2
    variance = chain.betas[3] ** share * chain.posterior_variance[3] ** (1 - share)
    second_inputs = []
    for step_noise in (torch.zeros(SHAPE), torch.ones(SHAPE)):
        predict = Recorder(eps_of_gaussian(std=0.5, variance_output=variance_output))
        DDPM.sample(predict, normal(*SHAPE), config=sampling(Sampler.ANCESTRAL, 4),
                    step_noise=lambda i, noise=step_noise: noise)
        second_inputs.append(predict.inputs[1])
    noiseless, noisy = second_inputs
    torch.testing.assert_close(noisy - noiseless, torch.full_like(noisy, math.sqrt(variance)))


def test_clipped_ddim_takes_the_noise_that_agrees_with_the_clipped_image():
    predict, noise = Recorder(eps_of_gaussian(std=0.0, mean=3.0)), normal(*SHAPE)
    image = DDPM.sample(predict, noise, config=sampling(Sampler.DDIM, 2, clip_denoised=True))
    low, high = DDPM.schedule.alphas_cumprod[[0, 999]]
    eps = (noise - math.sqrt(high) * 1.0) / math.sqrt(1 - high)  # of an image of ones
    torch.testing.assert_close(predict.inputs[1], math.sqrt(low) + math.sqrt(1 - low) * eps)
    torch.testing.assert_close(image, torch.ones_like(image))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sampler", Sampler)
def test_sampling_calls_as_often_as_stated_keeps_the_dtype_and_builds_no_graph(sampler, dtype):
    weight = torch.ones((), dtype=dtype, requires_grad=True)
    predict = Recorder(lambda x, t: 0.1 * weight * torch.cat([x, x], 1))
    process, config = PROCESS_OF[sampler], sampling(sampler, ddim_eta=0.5)
    image = process.sample(predict, normal(*SHAPE, dtype=dtype), config=config,
                           step_noise=lambda i: normal(*SHAPE, seed=i, dtype=dtype))
    expected = {Sampler.HEUN: 20, Sampler.DOPRI5: None}.get(sampler, 10)
    assert process.num_calls(config) == expected and len(predict.times) == (expected or len(predict.times))
    assert image.dtype == dtype and not image.requires_grad


@pytest.mark.parametrize("process", [FLOW, DDPM])
def test_a_sampler_of_the_other_process_is_refused(process):
    for sampler in set(Sampler) - set(process.samplers):
        message = f"^sampling.sampler={sampler}: .* use one of {', '.join(process.samplers)}$"
        for call in (lambda c: process.sample(zeros_2c, normal(*SHAPE), config=c), process.num_calls):
            with pytest.raises(ConfigError, match=message):
                call(sampling(sampler))


def test_samplers_that_add_noise_refuse_to_run_without_it():
    for config in (sampling(Sampler.ANCESTRAL), sampling(Sampler.DDIM, ddim_eta=0.5)):
        with pytest.raises(ValueError, match=f"step_noise.*{config.sampler}"):
            DDPM.sample(zeros_2c, normal(*SHAPE), config=config)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_an_eta_outside_0_to_1_is_refused(eta):
    with pytest.raises(ConfigError, match=f"sampling.ddim_eta={eta}"):
        DDPM.sample(zeros_2c, normal(*SHAPE), config=sampling(Sampler.DDIM, ddim_eta=eta), step_noise=lambda i: 0.0)


# Guidance

LABELS, NULL = torch.tensor([0, 3, 7]), 10


class LabelledRecorder:
    """A network of 2C channels whose rows do not depend on each other; it remembers the labels of its calls."""

    def __init__(self):
        self.labels = []

    def __call__(self, x, t, labels):
        self.labels.append(labels.tolist())
        shift = (labels + 1.0)[:, None, None, None] * torch.arange(1.0, 9)[:, None, None]
        return torch.cat([x, x.square()], 1) * (1 + t)[:, None, None, None] + shift


def guided_call(x, t, null=NULL, **options):
    network = LabelledRecorder()
    return guided(network, LABELS, null, SamplingConfig(**options))(x, t), network.labels


X, T = normal(*SHAPE, dtype=torch.float32), torch.tensor([0.1, 0.5, 0.9])
COND, UNCOND = (LabelledRecorder()(X, T, labels) for labels in (LABELS, torch.full_like(LABELS, NULL)))


@pytest.mark.parametrize("scale, null", [(1.0, NULL), (1.5, None)])
def test_guidance_that_is_off_costs_one_conditional_call(scale, null):
    for forward in GuidedForward:
        output, calls = guided_call(X, T, null, guidance_scale=scale, guided_forward=forward)
        assert torch.equal(output, COND) and calls == [LABELS.tolist()]


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("forward, calls", [(GuidedForward.SEPARATE, [[0, 3, 7], [NULL] * 3]),
                                            (GuidedForward.JOINT, [[0, 3, 7] + [NULL] * 3])])
def test_guidance_extrapolates_leading_channels_and_keeps_the_rest_conditional(forward, calls, channels):
    output, seen = guided_call(X, T, guidance_scale=1.5, guided_channels=channels, guided_forward=forward)
    assert seen == calls
    last = channels or 4  # all channels of the image, but never sigma
    torch.testing.assert_close(output[:, :last], 1.5 * COND[:, :last] - 0.5 * UNCOND[:, :last])
    assert torch.equal(output[:, last:], COND[:, last:])


def test_guided_halves_share_the_guided_channels_and_keep_their_own_others():
    halves = guided_halves(LabelledRecorder(), X, T, LABELS, torch.full_like(LABELS, NULL), 1.5, 3)
    for half, own in zip(halves, (COND, UNCOND), strict=True):
        torch.testing.assert_close(half[:, :3], 1.5 * COND[:, :3] - 0.5 * UNCOND[:, :3])
        assert torch.equal(half[:, 3:], own[:, 3:])


def test_guiding_more_channels_than_the_image_has_is_refused():
    with pytest.raises(ConfigError, match="sampling.guided_channels=5: the image has 4"):
        guided_call(X, T, guidance_scale=1.5, guided_channels=5)
