"""What must hold on a GPU; skipped where there is none."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from conftest import GOLDEN_FILES, MODEL_FILES, ROUTERS, rand, random_model, randomise, set_threshold
from test_kernels import assert_near
from test_robustness_numbers import with_too_few_rows
from test_training import SYSTEMS, digits_config

from diffmoe.config import Backend, Precision, RunConfig
from diffmoe.data import load_data
from diffmoe.evaluation.diagnosis import diagnose
from diffmoe.evaluation.sampling import sample_images
from diffmoe.models.dit import build_model
from diffmoe.moe import experts, float32
from diffmoe.moe.routing import Routing, largest
from diffmoe.training.graph import EAGER_CALLS
from diffmoe.training.trainer import Trainer
from diffmoe.verify import verify

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")
MARGIN_BYTES = 200_000_000
"""Of libraries' workspaces and the like."""


@pytest.fixture(autouse=True)
def no_tf32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("backend", [Backend.AUTO, Backend.LOOP])
@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_recorded_numbers_hold_in_float32(path, backend):
    *report, verdict = verify(path, CUDA, backend, Precision.FP32)
    assert verdict.startswith("PASS"), "\n".join(report)


@pytest.mark.parametrize("backend", [Backend.AUTO, Backend.LOOP, Backend.GROUPED])
@pytest.mark.parametrize("path", [path for path in MODEL_FILES if "dense" not in path.stem], ids=lambda path: path.stem)
def test_recorded_layers_hold_in_bf16(path, backend):
    *report, verdict = verify(path, CUDA, backend, Precision.BF16)
    assert verdict.startswith("PASS"), "\n".join(report)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_auto_equals_the_loop_in_bf16_with_gradients(router, train):
    layer = random_model(router).to(CUDA).train(train).moe_layers()[1]
    x = rand(5, 16, 32).to(CUDA)

    def measure(backend: Backend, row_bound: float | None) -> list[torch.Tensor]:
        layer.experts.backend = backend
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            y, routing = layer(leaf, row_bound)
        assert isinstance(routing, Routing)
        y.backward(rand(*y.shape, seed=1).to(CUDA))
        gradients = [leaf.grad, *(parameter.grad for parameter in layer.experts.parameters())]
        layer.zero_grad()
        return [y.detach(), *gradients]

    for actual, expected in zip(measure(Backend.AUTO, 4.0), measure(Backend.LOOP, None), strict=True):
        assert (actual - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_trains_in_bf16_and_samples_as_on_the_cpu(system):
    config = digits_config(system, "training.precision=bf16", "sampling.num_steps=4",
                           *(["model.moe.router.selection=predictor"] if system == "diffmoe" else []))
    trainer = Trainer(config, 0, load_data(config.data, config.model), CUDA)
    first = trainer.train_step()["mse"].item()
    for _ in range(39):
        last = trainer.train_step()["mse"].item()
    assert last < 0.75 * first
    fp32 = digits_config(system, "sampling.num_steps=4", *(
        ["model.moe.router.selection=predictor"] if system == "diffmoe" else []))
    on_gpu = sample_images(trainer.ema.model, fp32, range(8)).images
    on_cpu = sample_images(trainer.ema.model.cpu(), fp32, range(8)).images
    assert (on_gpu.int() - on_cpu.int()).abs().max() <= 2  # of 255


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_same_steps_again_give_the_same_bits_in_bf16(system):
    routed = [] if system == "dense" else ["model.moe.capacity=4"]  # a sum of four pairs has an order
    config = digits_config(system, "training.precision=bf16", *routed)
    data = load_data(config.data, config.model)

    def weights():
        trainer = Trainer(config, 0, data, CUDA)
        for _ in range(20):
            trainer.train_step()
        return trainer.model.state_dict()

    first, second = weights(), weights()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_never_waits_for_the_gpu(system):
    config = digits_config(system, "training.precision=bf16", "runtime.compile=true")
    trainer = Trainer(config, 0, load_data(config.data, config.model), CUDA)
    for _ in range(EAGER_CALLS + 1):
        trainer.train_step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_with_too_few_rows_is_made_again_on_a_gpu():
    config = digits_config("diffmoe", "training.precision=bf16", "runtime.compile=true")
    plain, bounded = (Trainer(config, 0, load_data(config.data, config.model), CUDA) for _ in range(2))
    with_too_few_rows(plain, [])
    with_too_few_rows(bounded, [0] * EAGER_CALLS + [1, 2])
    for trainer in (plain, bounded):
        for _ in range(2 * EAGER_CALLS + 3):  # what is captured anew, too
            trainer.train_step()
    after = bounded.state()
    assert bounded.row_bound == 4.0
    assert [name for name, value in plain.state().items() if not torch.equal(after[name], value)] == []


@pytest.mark.parametrize("system", SYSTEMS)
def test_copies_that_train_in_bf16_change_no_bit(system, monkeypatch):
    """But for what the compiler leaves out (it need not round what it reads again) and the order of a norm's sum."""
    config = digits_config(system, "training.precision=bf16", "training.clip_norm=null", "runtime.compile=true",
                           "model.num_heads=3")  # of a width that attention's kernels take
    data = load_data(config.data, config.model)

    def state(rounds):
        monkeypatch.setattr(RunConfig, "trains_copies", lambda *_: rounds)
        trainer = Trainer(config, 0, data, CUDA)
        assert (trainer.network is trainer.model) != rounds
        with torch.compiler.set_stance("force_eager"):
            losses = {f"{name} {step}": loss for step in range(EAGER_CALLS + 3)
                      for name, loss in trainer.train_step().items()}
        return trainer.state() | losses

    rounded, plain = state(True), state(False)
    assert [name for name, value in rounded.items() if not torch.equal(value, plain[name])] == []


@pytest.mark.parametrize("system", SYSTEMS)
def test_copies_train_as_well_compiled_and_clipped(system, monkeypatch):
    config = digits_config(system, "training.precision=bf16", "training.clip_norm=0.1", "runtime.compile=true")
    data = load_data(config.data, config.model)

    def losses(rounds):
        monkeypatch.setattr(RunConfig, "trains_copies", lambda *_: rounds)
        trainer = Trainer(config, 0, data, CUDA)
        return torch.stack([trainer.train_step()["mse"] for _ in range(EAGER_CALLS + 20)])

    torch.testing.assert_close(losses(True), losses(False), rtol=2e-2, atol=0)


@pytest.mark.parametrize("system", SYSTEMS)
def test_compiled_runs_go_on_without_graphs_where_there_are_no_grouped_products(system, monkeypatch):
    """As on GPUs before Hopper, and in float32."""
    monkeypatch.setattr(experts, "grouped_mm", None)
    config, plain = (digits_config(system, "training.precision=bf16", "sampling.num_steps=4", "sampling.batch_size=8",
                                   f"runtime.compile={flag}") for flag in ("true", "false"))
    data = load_data(config.data, config.model)

    def losses(config):
        trainer = Trainer(config, 0, data, CUDA)
        return torch.stack([trainer.train_step()["mse"] for _ in range(EAGER_CALLS + 5)])

    torch.testing.assert_close(losses(config), losses(plain), rtol=2e-2, atol=0)
    model = randomise(build_model(config.model)).to(CUDA).eval()
    for layer in model.moe_layers().values():
        set_threshold(layer.router)
    wanted, got = (sample_images(model, each, range(20)).images.int() for each in (plain, config))
    assert (got - wanted).abs().double().mean() < 2  # of 255; rounding moves a rare token


@pytest.mark.parametrize("shape", [(3, 2, 5000), (200_000,)])
def test_the_largest_on_a_gpu_are_those_of_the_host_with_ties(shape):
    scores = rand(*shape).mul(10).round()
    for mine, wanted in zip(largest(scores.to(CUDA), 1000), largest(scores, 1000), strict=True):
        assert torch.equal(mine.cpu(), wanted)


@pytest.mark.parametrize("rows", [70, 20_000])  # few, and many enough for the kernel without gradients
def test_compiled_routers_multiply_in_float32(rows):
    layers = float32.Float32Linear(384, 16).to(CUDA), float32.CapacityPredictor(384, 16).to(CUDA)
    weights = [weight for layer in layers for weight in layer.parameters()]
    tokens, grad = rand(rows, 384).to(CUDA, torch.bfloat16), rand(rows, 16, seed=1).to(CUDA)
    compiled = torch.compile(lambda x: [layer(x) for layer in layers])
    with torch.no_grad():
        alone = compiled(tokens)
    trained = compiled(tokens)
    found = [*alone, *trained, *torch.autograd.grad(trained, weights, [grad, grad])]
    exact = [copy.deepcopy(layer).double().cpu() for layer in layers]
    wanted = [layer(tokens.double().cpu()) for layer in exact]
    grads = torch.autograd.grad(wanted, [weight for layer in exact for weight in layer.parameters()],
                                [grad.double().cpu()] * 2)
    assert_near(found, [*wanted, *wanted, *grads], 1e-5)


BEGIN = """
import sys
from hashlib import sha256

import torch

from diffmoe.config import load_config
from diffmoe.data.images import ImageData
from diffmoe.train import CONFIGS
from diffmoe.training.graph import EAGER_CALLS, release_memory
from diffmoe.training.trainer import Trainer

config = load_config([CONFIGS / "cifar10.yaml", CONFIGS / "diffmoe.yaml"], ["model.depth=2", *sys.argv[1:]])
generator = torch.Generator().manual_seed(0)
images = torch.randint(256, (1024, 3, 32, 32), generator=generator).to(torch.uint8)
trainer = Trainer(config, 0, ImageData("random", images, torch.arange(1024) % 10, 10), torch.device("cuda"))
"""
STEPS = BEGIN + """
for _ in range(20):
    trainer.train_step()
print(sha256(b"".join(value.cpu().numpy().tobytes() for value in trainer.model.state_dict().values())).hexdigest())
"""


def test_what_the_compiler_finds_fastest_changes_no_bit_of_a_run(tmp_path):
    def bits(folder, **environment):
        caches = {name: str(tmp_path / folder / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        process = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True,
                                 env=os.environ | caches | environment)
        return process.stdout.split()[-1]

    first = bits("first")
    assert bits("again") == first, "by chance"
    assert bits("slowest first", TORCHINDUCTOR_DISTORT_BENCHMARKING_RESULT="inverse") == first, "by the compiler"


WAIT = BEGIN + """
for _ in range(EAGER_CALLS):
    trainer.train_step()
weights = sum(value.nbytes for value in trainer.model.state_dict().values())
release_memory(trainer.device)
waiting = torch.cuda.memory_reserved()
for _ in range(2):
    trainer.train_step()
trained = torch.cuda.memory_reserved()
device = trainer.device
del trainer
release_memory(device)
print(weights, waiting, trained, torch.cuda.memory_allocated())
"""


def test_who_waits_for_a_gpu_holds_weights_alone_and_who_has_trained_nothing():
    process = subprocess.run([sys.executable, "-c", WAIT], capture_output=True, text=True, check=True)
    weights, waiting, trained, left = map(int, process.stdout.split())
    assert waiting < 7 * weights + MARGIN_BYTES < trained  # gradients, two moments, the average, and room for another
    assert left < MARGIN_BYTES


@pytest.mark.parametrize("system", SYSTEMS)
def test_sampling_by_cuda_graphs_gives_the_images_and_capacity_of_plain_calls(system, monkeypatch):
    monkeypatch.setattr(float32, "MANY_ROWS", 1)  # the predictor's kernel of many tokens
    plain, compiled = (digits_config(system, "sampling.num_steps=4", "sampling.batch_size=8", "training.precision=bf16",
                                     f"runtime.compile={flag}") for flag in ("false", "true"))
    model = randomise(build_model(plain.model)).to(CUDA).eval()
    for layer in model.moe_layers().values():
        set_threshold(layer.router)
    wanted, got = (sample_images(model, config, range(20)) for config in (plain, compiled))
    assert (got.images.int() - wanted.images.int()).abs().double().mean() < 2  # of 255; rounding moves a rare token
    assert wanted.capacity is None or (got.capacity - wanted.capacity).abs().mean() < 2e-2


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_network_compiled_to_sample_is_diagnosed_as_before_and_samples_on(system):
    config = digits_config(system, "sampling.num_steps=4", "sampling.batch_size=8", "training.precision=bf16",
                           "runtime.compile=true")
    data = load_data(config.data, config.model)
    model = randomise(build_model(config.model)).to(CUDA).eval()
    for layer in model.moe_layers().values():
        set_threshold(layer.router)
    before = diagnose(model, config, 0, data)
    images = sample_images(model, config, range(20)).images
    random_state = torch.cuda.get_rng_state()
    assert diagnose(model, config, 0, data) == before
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
    assert torch.equal(sample_images(model, config, range(20)).images, images)
