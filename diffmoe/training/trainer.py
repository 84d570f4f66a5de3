"""The one trainer: diffusion loss plus the routers' losses, AdamW, a weight average.

What step n computes depends on (config, seed, n) alone: images, noise, times and dropped labels are those of the
whole batch, of which a process takes its share, in one or several micro-batches.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diffmoe.config import ConfigError, PoolScope, Precision, RunConfig, require, resolve_router
from diffmoe.data import ImageOrder, TrainingData
from diffmoe.data.images import seeded_generator, send
from diffmoe.diffusion import build_process
from diffmoe.models.dit import DiT, ModelOutput, build_model
from diffmoe.models.kernels import HAS_TRITON
from diffmoe.training.distributed import ALONE, World
from diffmoe.training.ema import Ema
from diffmoe.training.graph import Graphed
from diffmoe.training.parallel import (
    GradientParts,
    accumulating,
    distribute,
    gathered,
    own_part,
    shared_out,
    whole,
)
from diffmoe.training.precision import autocast, dtype_of_products, tf32

if HAS_TRITON:
    from diffmoe.training.update_kernels import OnePass, one_pass_applies

GRADIENT_NORM = "gradient_norm"
FIRST_ROW_BOUND = 1.25
"""Rows that a GPU lays out, of its even share, where other processes' tokens decide how many pairs are its own."""


@dataclass(frozen=True)
class Batch:
    """Inputs of a step or a part of it, B rows each."""

    images: Tensor
    """(B, C, H, W) in [-1, 1]."""
    labels: Tensor
    """int64 (B,), the null label where dropped."""
    noise: Tensor
    """Like `images`."""
    times: Tensor
    """As the process draws them."""

    def rows(self, part: slice | Tensor) -> Batch:
        """Return some of the rows."""
        return Batch(self.images[part], self.labels[part], self.noise[part], self.times[part])


class Fetched:
    """A number on its way from a GPU to the host, which waits for it alone and not for what is enqueued behind it."""

    def __init__(self, number: Tensor) -> None:
        self.number, self.arrived = number, None
        if number.device.type == "cuda":
            self.number = torch.empty_like(number, device="cpu", pin_memory=True).copy_(number, non_blocking=True)
            self.arrived = torch.cuda.current_stream(number.device).record_event()

    def value(self) -> float:
        """Wait for the number and return it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.number.item()


class Trainer:
    """Trains one configuration with one seed.

    Args:
        config: the run.
        seed: of the initial weights, the order of images and every draw.
        data: what is trained on.
        device: where to train.
        world: this process among all that train together.

    Raises:
        ConfigError: when the batch does not divide over processes and micro-batches, or a pool would be cut.
    """

    def __init__(self, config: RunConfig, seed: int, data: TrainingData, device: torch.device,
                 world: World = ALONE) -> None:
        self.config = config
        self.seed = seed
        self.device = device
        self.world = world
        self.micro_batch = micro_batch_size(config, world)
        self.data = data.to(device)
        self.order = ImageOrder(len(data), seed)
        self.process = build_process(config.diffusion)
        self.dtype = torch.float64 if config.training.precision is Precision.FP64 else torch.float32
        self.model = build_model(config.model, seed).to(device, self.dtype).train()
        self.model.set_backend(config.runtime.backend)
        compiled = config.runtime.compiles(device.type)
        self.ema, *self.extra_emas = (Ema(self.model, config.training.ema_buffers, compiled)
                                      for _ in (None, *config.training.extra_ema_half_lives))
        averages = [ema.model for ema in (self.ema, *self.extra_emas)]
        trained = self.model
        if HAS_TRITON and config.trains_copies(world.size, device.type):
            trained = self.model.rounded(torch.bfloat16)
        self.shapes = {name: parameter.shape for name, parameter in trained.named_parameters()}
        self.network = distribute(self.model, trained, averages, config, world, device)
        apart = config.training.expert_rate != 1
        groups = _groups(self.model, apart)
        self.parameters = list(itertools.chain(*groups))
        self.averaged = [list(itertools.chain(*_groups(average, apart))) for average in averages]
        self.trained = list(itertools.chain(*_groups(trained, apart)))
        """What gradients are taken of: the model's parameters, or bf16 copies, which `OnePass` writes with them."""
        self.optimizer = torch.optim.AdamW(
            [{"params": group} for group in groups], lr=config.training.learning_rate,
            weight_decay=config.training.weight_decay, betas=(0.9, config.training.adam_beta2),
            fused=device.type == "cuda")
        self.parts: GradientParts | None = None
        if trained is not self.model and world.size > 1:
            self.parts = GradientParts(self.trained, self.parameters, world)
        self.gradients = self._captured()
        predictors = {id(parameter) for parameter in self.model.predictor_parameters()}
        self.clipped = [parameter for parameter in self.parameters if id(parameter) not in predictors]
        self.one_pass: OnePass | None = None
        """Clips and moves weights and averages, where it applies; elsewhere each has operators of its own."""
        if HAS_TRITON and one_pass_applies([*self.parameters, *itertools.chain(*self.averaged)]):
            self.one_pass = OnePass(self.optimizer, self.clipped, config.training.clip_norm, self.averaged,
                                    self.trained)
        assert trained is self.model or self.one_pass is not None, "nobody would move the weights of the copies"
        self.step = 0
        self.ended: torch.cuda.Event | None = None
        """Passed by a GPU at the end of the last step."""
        self.row_bound: float | None = None  # rows are as many as pairs
        if world.size > 1 and device.type == "cuda" and _is_global(config):
            self.row_bound = FIRST_ROW_BOUND * config.model.moe.capacity
        self.before_compiling: Callable[[], object] = lambda: None
        """Called when a step will take long, for its rows are doubled."""
        self.objective = torch.zeros((), device=device)
        """Sum of the last step's losses, mean over processes; not finite when the step changed nothing."""
        layers = self.model.moe_layers()
        self.idle_LE = torch.zeros(len(layers), config.model.moe.num_experts if layers else 0, dtype=torch.int32,
                                   device=device)
        """Steps since each expert last had a token of this process."""

    def _captured(self) -> Callable[..., Any]:
        """Return `_gradients`, as a CUDA graph where nothing in it waits for the host or is a wrapper's."""
        on_gpu = self.device.type == "cuda" and self.config.runtime.compiles("cuda")
        wrapped = self.world.size > 1 and self.parts is None
        waits = self.model.waits_for_device(dtype_of_products(self.config.training))
        return Graphed(self._gradients) if on_gpu and not wrapped and not waits else self._gradients

    @torch.no_grad()
    def round_weights(self) -> None:
        """Make the copies that train anew, after somebody else has changed the model's weights; on every process."""
        for copied, parameter in zip(self.trained, self.parameters, strict=True):
            if copied is not parameter:
                copied.copy_(whole(parameter).view_as(copied))

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Draw the inputs of optimiser step `step` (from 0), of all processes together or only some rows of them."""
        size, model = self.config.training.batch_size, self.config.model
        index = self.order.indices(step * size, size)
        generator = seeded_generator("step", self.seed, step, device=self.device)
        noise = torch.randn(size, *self.data.shape, generator=generator, device=self.device)
        times = self.process.sample_times(size, generator=generator, device=self.device)
        labels = self.data.labels[send(index, self.device)]
        if model.null_label is not None:
            dropped = torch.rand(labels.shape, generator=generator, device=self.device) < model.class_dropout_prob
            labels = torch.where(dropped, model.null_label, labels)
        images = self.data.draw(index, rows, flip=self.config.data.horizontal_flip, generator=generator)
        self.data.prefetch(self.order.indices((step + 1) * size, size)[rows])
        return Batch(images.to(self.dtype), labels[rows], noise[rows].to(self.dtype), times[rows])

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], ModelOutput]:
        """Return the named scalar losses whose sum is minimised, and the network's output."""
        seen: list[ModelOutput] = []

        def predict(x: Tensor, t: Tensor) -> Tensor:
            seen.append(self.network(x, t, batch.labels, self.row_bound))
            return seen[0].prediction.to(self.dtype)

        with autocast(self.config.training, self.device):
            terms = self.process.loss(predict, batch.images, batch.noise, batch.times)
        return {name: term.mean() for name, term in terms.items()} | seen[0].losses(), seen[0]

    def train_step(self) -> dict[str, Tensor]:
        """Make one optimiser step; return its losses, this process's mean, detached and still on the device.

        Where it is clipped, `GRADIENT_NORM` stands beside them, as it was before.

        A loss or gradient that is not finite changes nothing: no weight, average, threshold or optimiser state.
        """
        training = self.config.training
        batch = self.batch(self.step, self.world.share(training.batch_size))
        for group, relative in zip(self.optimizer.param_groups, (1.0, training.expert_rate), strict=False):
            group["lr"] = training.learning_rate * relative * self._warmup_factor()
        while (losses := self._try_step(batch)) is None:
            self.before_compiling()
            self.row_bound *= 2
            self.gradients = self._captured()
        self.step += 1
        self._wait_for_step_before()
        return {name: loss.clone() for name, loss in losses.items()}

    def _try_step(self, batch: Batch) -> dict[str, Tensor] | None:
        """Make an optimiser step and return its losses; where pairs had too few rows, change nothing, return None."""
        training = self.config.training
        with tf32(training.tf32):
            losses, observed, counts_LE = self.gradients(batch.images, batch.labels, batch.noise, batch.times)
        objective, *observed = self.world.mean(observed)
        overflow = None
        if self.row_bound is not None:
            *observed, overflows = observed
            objective = objective.masked_fill(overflows > 0, math.nan)
            overflow = Fetched(overflows)
        self.objective = objective.clone()  # what a graph returned is overwritten by the next step
        if training.clip_norm is not None and self.one_pass is None:
            losses = losses | {GRADIENT_NORM: whole(torch.nn.utils.clip_grad_norm_(self.clipped, training.clip_norm))}
        self._update(observed, losses.get(GRADIENT_NORM))
        if overflow is not None and overflow.value() > 0:  # a GPU moves weights while the host waits and goes on
            return None
        self.idle_LE.add_(1).mul_(counts_LE == 0)
        return losses

    def _wait_for_step_before(self) -> None:
        """Let the host run one step ahead of a GPU, so that it never waits for work; no further, for host memory."""
        if self.device.type == "cuda":
            before, self.ended = self.ended, torch.cuda.current_stream(self.device).record_event()
            if before is not None:
                before.synchronize()

    @torch.no_grad()
    def _update(self, observed: list[Tensor], norm: Tensor | None) -> None:
        """Move weights, routers and average, unless the objective is not finite; a GPU is not waited for to know.

        Args:
            observed: of the routers.
            norm: of the gradients that are clipped, for those that one pass has yet to clip.
        """
        broken = ~self.objective.isfinite()
        on_device = self.optimizer.defaults["fused"]
        if not on_device and broken:
            return
        buffers = [buffer for layer in self.model.moe_layers().values() for buffer in layer.router.buffers()]
        before = [buffer.clone() for buffer in buffers]
        training = self.config.training
        decays = (training.ema_decay(self.step + 1), *map(training.decay_of, training.extra_ema_half_lives))
        if self.one_pass is not None:
            self.one_pass.step(norm, broken, [1 - decay for decay in decays])
        else:
            if on_device:
                self.optimizer.found_inf = broken.float()  # read by the fused kernels
            self.optimizer.step()
        if observed:
            self.model.update_routers(observed, self.step)
        if on_device:
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(torch.where(broken, old, buffer))
        for ema, decay in zip((self.ema, *self.extra_emas), decays, strict=True):
            ema.update(self.model, decay, unless=broken if on_device else None, weights=self.one_pass is None)

    def _gradients(self, *inputs: Tensor) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
        """Set the gradients of a batch (its four tensors).

        Returns:
            its losses; their sum, NaN if a gradient is not finite, before what the routers observed and, where rows are
            bounded, in how many layers they were too few; and the tokens of each layer's experts.
        """
        batch = Batch(*inputs)
        num_parts = len(batch.images) // self.micro_batch
        self.network.zero_grad(set_to_none=True)
        total: dict[str, Tensor] = {}
        observed: list[Tensor] = []
        counts_LE = torch.zeros_like(self.idle_LE, dtype=torch.int64)
        for part in range(num_parts):
            rows = batch.rows(slice(part * self.micro_batch, (part + 1) * self.micro_batch))
            with accumulating(self.network) if part < num_parts - 1 else contextlib.nullcontext():
                losses, output = self.losses(rows)
                (sum(losses.values()) / num_parts).backward()
            _add(total, {name: loss.detach() / num_parts for name, loss in losses.items()})
            seen = [routing.observed / num_parts for routing in output.routings if routing.observed is not None]
            if self.row_bound is not None:
                overflows = [routing.overflow for routing in output.routings if routing.overflow is not None]
                seen.append(sum(overflows, torch.zeros((), device=self.device)))
            observed = [old + new for old, new in zip(observed, seen, strict=True)] if observed else seen
            if output.routings:
                counts_LE += torch.stack([routing.counts(counts_LE.shape[1]) for routing in output.routings])
        if self.parts is not None:
            self.parts.finish()
        objective = sum(total.values())
        if self.one_pass is not None and self.config.training.clip_norm is not None:
            finite, total[GRADIENT_NORM] = self._finite_and_norm()
        else:
            pairs = zip(self.trained, self.parameters, strict=True)
            held = [own_part(trained.grad, parameter) for trained, parameter in pairs if trained.grad is not None]
            held = [gradient for gradient in held if gradient.numel()]  # a share may be empty
            finite = _norms(held, math.inf).isfinite().all()
        return total, [objective.masked_fill(~finite, math.nan), *observed], counts_LE

    def _finite_and_norm(self) -> tuple[Tensor, Tensor]:
        """Say whether all gradients are finite, and return the norm of those to be clipped, reading them once.

        Squares leave float32 beyond 1e19: gradients as large as that count as not finite.
        """
        clipped = {id(parameter) for parameter in self.clipped}
        full, shared, others = [], [], []
        for parameter, trained in zip(self.parameters, self.trained, strict=True):
            if trained.grad is not None:
                to_clip = shared if isinstance(parameter, DTensor) else full
                (to_clip if id(parameter) in clipped else others).append(own_part(trained.grad, parameter))
        norm = torch.linalg.vector_norm(_norms(full, 2))
        if shared:
            norm = (norm.square() + self.world.sum(_norms(shared, 2).square().sum())).sqrt()
        return torch.stack([norm, *_norms(others, 2)]).isfinite().all(), norm

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Give everything that resuming needs besides (config, seed, step): weights, average, optimiser.

        Every process must ask for all of it; the main one gets it, tensor by tensor on the device. Names and shapes are
        the same at any number of processes.
        """
        moments = self.optimizer.state_dict()["state"]
        state = {f"optimizer.{index}.{name}": torch.as_tensor(value)
                 for index, values in moments.items() for name, value in values.items()}
        shapes = {name: self.trained[int(name.split(".")[1])].shape for name, value in state.items() if value.dim()}
        for key, model in self._models().items():
            state |= {f"{key}.{name}": value for name, value in model.state_dict().items()}
            shapes |= {f"{key}.{name}": shape for name, shape in self.shapes.items()}
        return gathered({"idle.experts": self.idle_LE} | state, shapes, self.world)

    def state(self) -> dict[str, Tensor]:
        """Return what `tensors` gives; of several processes, the main one in host memory."""
        return self._collected(self.tensors())

    def averages(self) -> dict[float | None, dict[str, Tensor]]:
        """Return each averaged network's weights, as `state` does, by its half-life (None: the run's own)."""
        half_lives = (None, *self.config.training.extra_ema_half_lives)
        return {half_life: self._collected(gathered(ema.model.state_dict(), self.shapes, self.world))
                for half_life, ema in zip(half_lives, (self.ema, *self.extra_emas), strict=True)}

    def _collected(self, tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return tensors together: what is shared out in host memory, for a GPU may have no room for all of it."""
        return {name: tensor if self.world.size == 1 else tensor.cpu() for name, tensor in tensors}

    def _models(self) -> dict[str, DiT]:
        """Return the networks of the state by their name in it."""
        extra = {f"ema{index}": ema.model for index, ema in enumerate(self.extra_emas, 1)}
        return {"model": self.model, "ema": self.ema.model} | extra

    def load_state(self, state: Mapping[str, Tensor], step: int) -> None:
        """Go on from what `state` returned after `step` steps.

        Raises:
            ConfigError: when it is not the state of this trainer.
        """
        models = self._models()
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in (*models, "optimizer", "idle")}
        try:
            for name, value in state.items():
                part, _, rest = name.partition(".")
                parts[part][rest] = value
            for key, model in models.items():
                now = model.state_dict()
                model.load_state_dict({name: shared_out(value, now[name]) for name, value in parts[key].items()})
            self.idle_LE.copy_(parts["idle"]["experts"])
            moments: dict[int, dict[str, Tensor]] = {}
            for name, value in parts["optimizer"].items():
                index, _, moment = name.partition(".")
                shared = value if moment == "step" else shared_out(value, self.parameters[int(index)])
                moments.setdefault(int(index), {})[moment] = shared
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
            self.round_weights()
        except (KeyError, ValueError, RuntimeError) as error:
            raise ConfigError(f"the state of step {step} is of another version of this program ({error})") from None
        self.step = step

    def _warmup_factor(self) -> float:
        warmup = self.config.training.warmup_images
        seen = (self.step + 1) * self.config.training.batch_size
        return 1.0 if warmup == 0 else min(1.0, seen / warmup)


def _groups(model: DiT, experts_apart: bool) -> list[list[nn.Parameter]]:
    """Return the parameters in the optimiser's order, in one group or with those of experts in another behind it."""
    experts = {id(parameter) for layer in model.moe_layers().values() for parameter in layer.experts.parameters()}
    if not (experts_apart and experts):
        return [list(model.parameters())]
    return [[parameter for parameter in model.parameters() if (id(parameter) in experts) == apart]
            for apart in (False, True)]


def micro_batch_size(config: RunConfig, world: World) -> int:
    """Return the images of one forward: this process's share, or `runtime.micro_batch_size` of it at a time.

    Raises:
        ConfigError: when it does not divide, or would cut the pool that the router's rule spans.
    """
    batch = config.training.batch_size
    require(batch % world.size == 0, "training.batch_size", batch, f"make it a multiple of {world.size} processes")
    local = batch // world.size
    micro = config.runtime.micro_batch_size or local
    require(local % micro == 0, "runtime.micro_batch_size", micro,
            f"make it a divisor of the {local} images that a process has of a batch")
    if config.model.moe is not None:
        pool = resolve_router(config.model.moe.router.kind).pool_images(config.model.moe, batch)
        together = batch if _is_global(config) and micro == local else micro
        require(together % pool == 0, "runtime.micro_batch_size", micro,
                f"the router's pool spans {pool} images, which smaller micro-batches would cut: use a multiple of "
                f"{pool}, or make a smaller pool (model.moe.router.pool_images) part of the method; on several GPUs "
                "model.moe.pool_scope=global spans them")
    return micro


def _is_global(config: RunConfig) -> bool:
    return config.model.moe is not None and config.model.moe.pool_scope is PoolScope.GLOBAL


def _norms(tensors: list[Tensor], order: float) -> Tensor:
    """Return the norm of each tensor, (N,), float32 of what is less precise; those of a dtype together."""
    norms: list[Tensor] = []
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype is dtype]
        norms += torch._foreach_norm(alike, order, dtype=torch.promote_types(dtype, torch.float32))
    return torch.stack(norms) if norms else torch.zeros(0)


def _add(total: dict[str, Tensor], part: dict[str, Tensor]) -> None:
    for name, value in part.items():
        total[name] = total[name] + value if name in total else value

