"""Check this machine, backend and precision against recorded numbers of the authors' implementation.

    python -m diffmoe.verify tests/golden/*.npz [--backend grouped] [--device cuda] [--dtype bf16]

A fixture holds weights, inputs and outputs (format: tests/golden/README.md). Every recorded quantity is either
an input or checked. In float32 masks and counts must be exact. In bf16 a router may flip near-ties, so
each mixture-of-experts layer is fed its recorded input: the share of flipped pairs is reported, and the
output with the recorded mask forced must be within 3e-2, absolute and of the largest recorded entry.
Exit code: 0 all within tolerance, 1 a mismatch, 2 unusable input.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffmoe.cli import choose_device, run_command
from diffmoe.config import (
    Backend,
    ConfigError,
    DiffusionConfig,
    EmaBuffers,
    ModelConfig,
    Precision,
    ProcessKind,
    Sampler,
    SamplingConfig,
    from_dict,
)
from diffmoe.convert import from_reference, to_reference
from diffmoe.diffusion import build_process, guided
from diffmoe.diffusion.guidance import guided_halves
from diffmoe.diffusion.schedule import Schedule
from diffmoe.models.dit import DiT, ModelOutput, build_model
from diffmoe.moe.routing import Routing
from diffmoe.training.ema import Ema

GUIDANCE_SCALE = 1.5  # of every guided pass in the format
GUIDED_CHANNELS = 3  # of DiT's forward_with_cfg
NUM_THRESHOLD_UPDATES = 50  # training forwards before the recorded DiffMoE inference
BF16_TOLERANCE = 3e-2

SAMPLER_NAMES = {"euler": Sampler.EULER, "torchdiff_euler": Sampler.EULER, "heun": Sampler.HEUN,
                 "ddim": Sampler.DDIM, "p_sample": Sampler.ANCESTRAL}

Fixture = dict[str, Tensor]
Quantities = dict[str, Tensor]


@dataclass(frozen=True)
class Tolerance:
    """Each entry may be off by `absolute` + `relative` * the largest recorded entry + `entrywise` * itself."""

    absolute: float = 0.0
    relative: float = 0.0
    entrywise: float = 0.0

    def allowed(self, expected: Tensor) -> Tensor:
        """Return the largest error that passes, for each entry of `expected` (float64, flat)."""
        size = expected.double().abs().flatten()
        return self.absolute + self.relative * size.max() + self.entrywise * size


@dataclass(frozen=True)
class Check:
    """One compared quantity."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Say whether the error is within its tolerance; NaN never is."""
        return self.error <= self.allowed


# First match wins. Numbers: golden/README.md, "Suggested tolerances".
EXACT = Tolerance()
TOLERANCES: list[tuple[str, Tolerance]] = [
    (r"(train|eval)/(mask|ones|tokens_per_expert\w*)/.*", EXACT),
    (r"ddpm/timesteps_\d+", EXACT),
    (r"ddpm/(betas|alphas_cumprod)(_\d+)?|ddpm/posterior_\w+", Tolerance(entrywise=1e-12)),
    (r"(ddpm/)?train/grad(norm|_noaux)?/.*", Tolerance(absolute=1e-6, relative=1e-4)),
    (r"ddpm/train/vb", Tolerance(entrywise=1e-5)),
    # Beyond the suggested 3e-5: before the clip, DDIM multiplies the rounding of the network's output (4e-7 from one
    # machine to another) by 1 / sqrt(alphas_cumprod[999]) = 157. Seen: 5e-6 on one CPU, above 3e-5 on another, 8e-5 on
    # an H100.
    (r"ddpm/ddim_\d+_clip", Tolerance(absolute=2e-4)),
    (r"ddpm/\w+_clip", Tolerance(absolute=3e-5)),
    (r"ddpm/(ddim|p_sample)_.*", Tolerance(relative=1e-5)),
    (r"decay_.*", Tolerance(absolute=1e-6)),
    (r"rf/.*|(train|eval)/(out\w*|block_out/.*|moe_(in|out)/.*)", Tolerance(absolute=1e-5)),
    (r".*", Tolerance(absolute=1e-5)),
]
INPUTS = re.compile(
    r"(config|state|meta|ema_init|model_step\d+)/.*|x|z0|z|t|y|y_null|zt|target|moe_layers"
    r"|ddpm/train/(x|noise|t|y)|ddpm/.*_noise")
ACCELERATOR_OUTPUT = 1e-4


def load_fixture(path: Path) -> Fixture:
    """Read a fixture; arrays keep their dtype.

    Raises:
        ConfigError: when the file is missing or is not an npz of plain arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    except Exception as error:  # numpy raises OSError, ValueError, BadZipFile, EOFError and more on foreign bytes
        raise ConfigError(f"{path}: not a readable fixture ({type(error).__name__}: {error})") from None


def fixture_config(fixture: Fixture) -> ModelConfig:
    """Return the model that a fixture's `config/*` entries and weights describe.

    Raises:
        ConfigError: for an entry that is not understood.
    """
    entries = {name.removeprefix("config/"): value.item() for name, value in fixture.items()
               if name.startswith("config/")}
    for ignored in ("seed", "input_draw"):
        entries.pop(ignored, None)
    moe = {name: entries.pop(name) for name in ("num_experts", "capacity", "interleave") if name in entries}
    router = {ours: entries.pop(theirs) for theirs, ours in
              (("aux_loss_alpha", "balance_loss_weight"), ("capacity_pred_loss_weight", "predictor_loss_weight"))
              if theirs in entries}
    shared = entries.pop("n_shared_experts", 0)
    if "num_experts" in moe:
        names = " ".join(name for name in fixture if name.startswith("state/"))
        if "mlp.gate.weight" in names:
            router["kind"] = "baselines.token_choice:TokenChoice"
        elif "capacity_predictor" in names:
            router["kind"] = "expert_choice"
        else:
            router |= {"kind": "expert_choice", "pool": "sample", "predictor": False, "inference": "static"}
        if "interleave" in moe:
            moe["interleave"] = bool(moe["interleave"])
        # the authors' DiffMoE has one shared network of twice an expert's width, whatever the number says
        entries["moe"] = moe | {"router": router, "shared_experts": 2 if shared else 0}
    if "learn_sigma" in entries:
        entries["learn_sigma"] = bool(entries["learn_sigma"])
    return from_dict(ModelConfig, entries, "config")


def fixture_model(fixture: Fixture, device: torch.device, backend: Backend) -> DiT:
    """Build the fixture's model with its weights."""
    config = fixture_config(fixture)
    state = {name.removeprefix("state/"): value for name, value in fixture.items() if name.startswith("state/")}
    model = build_model(config)
    model.load_state_dict(from_reference(state, config))
    return model.to(device).set_backend(backend)


class Recorder:
    """Captures the outputs of blocks and the inputs and outputs of their experts during a call."""

    def __init__(self, model: DiT) -> None:
        self.model = model

    def call(self, phase: str, *inputs: Tensor) -> tuple[ModelOutput, Quantities]:
        """Call the model and return its output and the captured quantities, named as in a fixture."""
        seen: Quantities = {}

        def capture(name: str, pick: Callable[[tuple, tuple | Tensor], Tensor]) -> Callable:
            return lambda module, args, output: seen.__setitem__(f"{phase}/{name}", pick(args, output))

        handles = [block.register_forward_hook(capture(f"block_out/{index}", lambda args, output: output[0].total()))
                   for index, block in enumerate(self.model.blocks)]
        for index, layer in self.model.moe_layers().items():
            handles.append(layer.register_forward_hook(capture(f"moe_in/{index}", lambda args, output: args[0])))
            handles.append(layer.register_forward_hook(capture(f"moe_out/{index}", lambda args, output: output[0])))
        try:
            return self.model(*inputs), seen
        finally:
            for handle in handles:
                handle.remove()


def model_quantities(fixture: Fixture, device: torch.device, backend: Backend) -> Quantities:
    """Compute every quantity of a model fixture from its weights and inputs."""
    model = fixture_model(fixture, device, backend)
    zt, t, y, target = (fixture[name].to(device) for name in ("zt", "t", "y", "target"))
    return _training_quantities(model, zt, t, y, target, fixture) | _inference_quantities(model, zt, t, y)


def _training_quantities(model: DiT, zt: Tensor, t: Tensor, y: Tensor, target: Tensor, names: Fixture) -> Quantities:
    model.train()
    output, found = Recorder(model).call("train", zt, t, y)
    mse_B = (output.prediction[:, : target.shape[1]] - target).square().mean((1, 2, 3))
    mse, losses = mse_B.mean(), output.losses()
    found |= {"train/out": output.prediction, "train/loss_mse": mse_B,
              "train/loss_total": mse + losses.get("predictor", 0)}
    for (index, layer), routing in zip(model.moe_layers().items(), output.routings, strict=True):
        found |= _mask_quantities("train", index, routing, zt.shape[0], model.config)
        if "balance" in routing.losses:
            found[f"train/aux_loss/{index}"] = routing.losses["balance"]
        if "predictor" in routing.losses:
            found[f"train/ones/{index}"] = found.pop(f"train/mask/{index}")
            found.pop(f"train/tokens_per_expert/{index}")
            inputs = found[f"train/moe_in/{index}"]
            found[f"train/pred_logits/{index}"] = layer.router.predictor(inputs)
            weight = layer.router.options.predictor_loss_weight
            found[f"train/loss_capacity/{index}"] = routing.losses["predictor"] / weight
            for update in range(NUM_THRESHOLD_UPDATES):
                layer.router.update(routing.observed, update)
                found[f"train/threshold_after_{update + 1}/{index}"] = layer.router.threshold.clone()
    if "balance" in losses:
        found["train/loss_total_with_aux"] = mse + losses["balance"]
        found |= _gradients(model, mse, "train/grad_noaux")
    if "predictor" in losses:
        found["train/loss_cp"] = losses["predictor"]
        bce = losses["predictor"] / model.config.moe.router.predictor_loss_weight
        for name in names:
            if match := re.fullmatch(r"train/loss_total_w([\d.]+)", name):
                found[name] = mse + float(match[1]) * bce
    gradients = _gradients(model, mse + sum(losses.values()), "train/grad")
    norms = {name.replace("train/grad", "train/gradnorm", 1): value.norm() for name, value in gradients.items()}
    return found | gradients | norms


def _gradients(model: DiT, loss: Tensor, prefix: str) -> Quantities:
    parameters = dict(model.named_parameters())
    values = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, materialize_grads=True)
    named = dict(zip(parameters, values, strict=True))
    return {f"{prefix}/{name}": value for name, value in to_reference(named, model.config).items()}


def _mask_quantities(phase: str, index: int, routing: Routing, batch: int, config: ModelConfig) -> Quantities:
    experts = config.moe.num_experts
    mask = routing.mask(batch * config.num_tokens, experts).view(batch, config.num_tokens, experts)
    return {f"{phase}/mask/{index}": mask.float(), f"{phase}/tokens_per_expert/{index}": routing.counts(experts)}


@torch.no_grad()
def _inference_quantities(model: DiT, zt: Tensor, t: Tensor, y: Tensor) -> Quantities:
    model.eval()
    config = model.config
    output, found = Recorder(model).call("eval", zt, t, y)
    for name in [name for name in found if "block_out" in name]:
        del found[name]
    found["eval/out"] = output.prediction
    layers = model.moe_layers()
    dynamic = [index for index, layer in layers.items() if hasattr(layer.router, "predictor")]
    for index, routing in zip(layers, output.routings, strict=True):
        if index in dynamic:
            found |= _mask_quantities("eval", index, routing, zt.shape[0], config)
            inputs = found[f"eval/moe_in/{index}"]
            found[f"eval/pred_prob/{index}"] = layers[index].router.probabilities(inputs).view(*inputs.shape[:2], -1)

    def counts(suffix: str, routings: list[Routing]) -> Quantities:
        return {f"eval/tokens_per_expert_{suffix}/{index}": routing.counts(config.moe.num_experts)
                for index, routing in zip(layers, routings, strict=True) if index in dynamic}

    for i in range(zt.shape[0]):
        single = model(zt[i : i + 1], t[i : i + 1], y[i : i + 1])
        found |= {f"eval/out_single_{i}": single.prediction} | counts(f"single_{i}", single.routings)
    if config.null_label is not None:
        routings: list[Routing] = []

        def predict(*inputs: Tensor) -> Tensor:
            doubled = model(*inputs)
            routings.extend(doubled.routings)
            return doubled.prediction

        halves = guided_halves(predict, zt, t, y, torch.full_like(y, config.null_label), GUIDANCE_SCALE,
                               GUIDED_CHANNELS)
        found |= {"eval/out_cfg": torch.cat(halves)} | counts("cfg", routings)
    return found


def sampler_quantities(fixture: Fixture, device: torch.device, backend: Backend) -> Quantities:
    """Compute every quantity of a sampler fixture: schedules, DDPM losses, flow and DDPM samples."""
    model = fixture_model(fixture, device, backend).eval()
    flow, ddpm = (build_process(DiffusionConfig(process=kind)) for kind in (ProcessKind.FLOW, ProcessKind.DDPM))
    z, y = fixture["z"].to(device), fixture["y"].to(device)
    null = fixture["y_null"].to(device)
    found = _schedule_quantities(fixture)

    def call(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return model(x, t, labels).prediction

    def joint(x: Tensor, t: Tensor) -> Tensor:  # DiT's forward_with_cfg: the second half of the state is not read
        half = len(x) // 2
        return torch.cat(guided_halves(call, x[:half], t[:half], y, null, GUIDANCE_SCALE, GUIDED_CHANNELS))

    pattern = re.compile(r"(rf|ddpm)/(euler|heun|torchdiff_euler|ddim|p_sample)_(\d+)(_cfg1\.5|_clip|_eta1)?")
    for name in fixture:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        kind, sampler, steps, variant = match[1], match[2], int(match[3]), match[4]
        guidance = GUIDANCE_SCALE if variant == "_cfg1.5" and kind == "rf" else 1.0
        # the ODE library takes the number of grid points, one more than steps
        config = SamplingConfig(
            sampler=SAMPLER_NAMES[sampler], num_steps=steps - (sampler == "torchdiff_euler"),
            guidance_scale=guidance, ddim_eta=float(variant == "_eta1"), clip_denoised=variant == "_clip")
        predict, start = guided(call, y, model.config.null_label, config), z
        if kind == "ddpm" and variant == "_cfg1.5":
            predict, start = joint, torch.cat([z, z])
        noise = fixture.get(f"{name}_noise", fixture.get(f"ddpm/p_sample_{steps}_noise"))
        step_noise = None if noise is None else noise.to(device).__getitem__
        found[name] = (flow if kind == "rf" else ddpm).sample(predict, start, config=config, step_noise=step_noise)

    x, noise, t, labels = (fixture[f"ddpm/train/{part}"].to(device) for part in ("x", "noise", "t", "y"))
    terms = ddpm.loss(lambda x_t, times: call(x_t, times, labels), x, noise, t)
    loss = sum(term.mean() for term in terms.values())
    found |= {f"ddpm/train/{name}": term for name, term in terms.items()}
    found |= {"ddpm/train/x_t": ddpm.add_noise(x, noise, t), "ddpm/train/loss": loss}
    return found | {f"ddpm/{name}": value for name, value in _gradients(model, loss, "train/grad").items()}


def _schedule_quantities(fixture: Fixture) -> Quantities:
    full = Schedule.linear(len(fixture["ddpm/betas"]))
    found = {f"ddpm/{name}": torch.as_tensor(getattr(full, name)) for name in
             ("betas", "alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped")}
    for name in fixture:
        if match := re.fullmatch(r"ddpm/(timesteps|betas|alphas_cumprod)_(\d+)", name):
            found[name] = torch.as_tensor(getattr(full.respace(int(match[2])), match[1]))
    return found


def ema_quantities(fixture: Fixture) -> Quantities:
    """Compute the averages of an EMA fixture, where buffers are averaged like parameters."""
    def module(prefix: str) -> nn.Module:
        holder = nn.Module()
        for name, value in fixture.items():
            if name.startswith(prefix):
                key = name.removeprefix(prefix).replace(".", "/")
                if key in ("running", "ema_decay"):
                    holder.register_buffer(key, value.clone())
                else:
                    holder.register_parameter(key, nn.Parameter(value.clone(), requires_grad=key != "frozen"))
        return holder

    found: Quantities = {}
    decays = sorted({match[1] for name in fixture if (match := re.match(r"decay_([\d.]+)/", name))})
    steps = sorted({int(match[1]) for name in fixture if (match := re.match(r"model_step(\d+)/", name))})
    for decay in decays:
        ema = Ema(module("ema_init/"), EmaBuffers.AVERAGE)
        for step in steps:
            ema.update(module(f"model_step{step}/"), float(decay))
            for key, value in ema.model.state_dict().items():
                found[f"decay_{decay}/ema_step{step}/{key.replace('/', '.')}"] = value.clone()
    return found


def compare(found: Quantities, fixture: Fixture, *, accelerator: bool = False) -> list[Check]:
    """Compare computed with recorded quantities; what is recorded but was not computed fails.

    Args:
        found: computed quantities.
        fixture: recorded ones; inputs are passed over.
        accelerator: allow model outputs 1e-4, the recorded numbers being a CPU's.
    """
    checks = []
    for name, expected in fixture.items():
        if INPUTS.fullmatch(name):
            continue
        tolerance = next(tolerance for pattern, tolerance in TOLERANCES if re.fullmatch(pattern, name))
        if accelerator and re.fullmatch(r"rf/.*|(train|eval)/(out\w*|block_out/.*|moe_(in|out)/.*)", name):
            tolerance = Tolerance(absolute=ACCELERATOR_OUTPUT)
        checks.append(_check(name, found.get(name), expected, tolerance))
    return checks


def _check(name: str, actual: Tensor | None, expected: Tensor, tolerance: Tolerance) -> Check:
    """Compare one quantity and report the entry that is furthest past, or nearest to, what it is allowed."""
    allowed = tolerance.allowed(expected)
    if actual is None or actual.numel() != expected.numel():
        return Check(name, float("nan"), allowed.max().item())
    error = (actual.detach().cpu().double().flatten() - expected.double().flatten()).abs()
    worst = (error - allowed).argmax()  # a NaN counts as the largest
    return Check(name, error[worst].item(), allowed[worst].item())


@torch.no_grad()
def bf16_checks(fixture: Fixture, device: torch.device, backend: Backend) -> tuple[list[Check], list[str]]:
    """Check each recorded mixture-of-experts layer in bf16, fed its recorded input.

    Returns:
        the checks of the outputs with the recorded mask forced, and a line a layer on flipped pairs.
    """
    model = fixture_model(fixture, device, backend)
    checks, notes = [], []
    for phase, mask_name in (("train", "ones"), ("train", "mask"), ("eval", "mask")):
        model.train(phase == "train")
        for index, layer in model.moe_layers().items():
            if f"{phase}/{mask_name}/{index}" not in fixture:
                continue
            if phase == "eval":
                layer.router.threshold.copy_(fixture[f"train/threshold_after_{NUM_THRESHOLD_UPDATES}/{index}"])
            recorded_SE = fixture[f"{phase}/{mask_name}/{index}"].to(device).bool().flatten(0, 1)
            x_BTD = fixture[f"{phase}/moe_in/{index}"].to(device, torch.bfloat16)
            routing = layer.route(x_BTD)
            flipped = (routing.mask(*recorded_SE.shape) != recorded_SE).sum().item()
            pairs = recorded_SE.sum().item()
            notes.append(f"{phase}/{mask_name}/{index}: {flipped} of {pairs} pairs flipped ({flipped / pairs:.1%})")
            scores_SE = layer.router.scores(x_BTD.float())
            forced = Routing.from_mask(recorded_SE, scores_SE, num_rows=None)
            with torch.autocast(device.type, torch.bfloat16):
                output = layer.experts(x_BTD.flatten(0, 1), forced)
                if layer.shared is not None:
                    output = output + layer.shared(x_BTD.flatten(0, 1))
            expected = fixture[f"{phase}/moe_out/{index}"]
            largest = max(1.0, expected.abs().max().item())  # 3e-2 absolute and of the largest entry: the smaller
            tolerance = Tolerance(relative=BF16_TOLERANCE / largest)
            checks.append(_check(f"{phase}/moe_out/{index} (mask forced)", output, expected, tolerance))
    return checks, notes


def verify(path: Path, device: torch.device, backend: Backend, precision: Precision) -> Iterator[str]:
    """Check one file; yield report lines, the last of which starts with PASS, FAIL or SKIP."""
    fixture = load_fixture(path)
    is_model, is_sampler = "zt" in fixture, any(name.startswith(("rf/", "ddpm/")) for name in fixture)
    is_ema = any(name.startswith("ema_init/") for name in fixture)
    if not (is_model or is_sampler or is_ema):
        raise ConfigError(f"{path}: holds neither a model's, a sampler's nor an EMA's quantities")
    notes: list[str] = []
    try:
        if precision is Precision.BF16:
            checks, notes = bf16_checks(fixture, device, backend) if is_model else ([], [])
        else:
            found = (model_quantities(fixture, device, backend) if is_model else
                     sampler_quantities(fixture, device, backend) if is_sampler else ema_quantities(fixture))
            checks = compare(found, fixture, accelerator=device.type != "cpu")
    except KeyError as error:
        raise ConfigError(f"{path}: the fixture lacks {error.args[0]}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (RuntimeError, IndexError, ValueError, TypeError) as error:  # what torch raises for inputs that do not fit
        raise ConfigError(f"{path}: cannot be computed ({type(error).__name__}: {error})") from None
    if not checks and precision is Precision.FP32:
        raise ConfigError(f"{path}: records no quantity to check")
    if not checks:
        yield f"SKIP {path.name}: nothing to check in {precision}"
        return
    yield f"{path.name}: {len(checks)} quantities, largest error of each kind"
    yield from _summarise(checks)
    yield from (f"  {note}" for note in notes)
    failed = [check for check in checks if not check.passed]
    for check in failed:
        yield f"  mismatch: {check.name}: error {check.error:.3g}, allowed {check.allowed:.3g}"
    yield f"{'FAIL' if failed else 'PASS'} {path.name}: {len(checks) - len(failed)} of {len(checks)} within tolerance"


def _summarise(checks: list[Check]) -> Iterator[str]:
    """Yield a line a kind of quantity (`train/grad/*`): the entry that is closest to or furthest past its tolerance."""
    kinds: dict[str, list[Check]] = {}
    for check in checks:
        kind = re.sub(r"(?<=/)(\d+|blocks\..*|\w+\.\S*weight|\w+\.\S*bias)$", "*", check.name)
        kinds.setdefault(re.sub(r"(single|step|after)_?\d+", r"\1_*", kind), []).append(check)
    for kind, members in kinds.items():
        worst = max(members, key=lambda check: (not check.passed, check.error / check.allowed if check.allowed else 0))
        yield f"  {kind:<44} {worst.error:9.2e}  allowed {worst.allowed:8.1e}  {'ok' if worst.passed else 'MISMATCH'}"


def main(arguments: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmoe.verify", description=__doc__.split("\n\n")[0])
    parser.add_argument("fixtures", nargs="+", type=Path, metavar="FIXTURE.npz")
    parser.add_argument("--backend", choices=list(Backend), default=Backend.AUTO, type=Backend)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=[Precision.FP32, Precision.BF16], default=Precision.FP32, type=Precision)
    options = parser.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = choose_device(options.device)
    torch.set_num_threads(1)  # the recorded models are tiny: threads would only wait for one another
    failed = False
    for path in options.fixtures:
        line = ""
        for line in verify(path, device, options.backend, options.dtype):
            print(line)
        failed |= line.startswith("FAIL")
    return int(failed)


if __name__ == "__main__":
    sys.exit(run_command(main))
