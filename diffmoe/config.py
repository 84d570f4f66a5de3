"""Typed configurations: frozen dataclasses <-> YAML, with a digest.

A run is a function of (config digest, seed, data digest, images seen). The digest covers every field
that changes a result and differs from `frozen_defaults.yaml`; adding an option whose default keeps
the old behaviour therefore changes no digest. Each field has one of three scopes:

    training    (default) changes what is learned
    inference   changes only what is sampled: rows that differ here share one checkpoint
    runtime     changes neither (device, backend, compile); never in a digest
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import functools
import hashlib
import importlib
import json
import math
import reprlib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MAX_MESSAGE = 1000
"""Longest error line; what it quotes may be of any size."""


class ConfigError(ValueError):
    """Input that cannot be used; the message is one line that names the key, the value and the remedy."""

    def __init__(self, message: str) -> None:
        line = " ".join(str(message).split()).encode(errors="backslashreplace").decode()  # can be printed anywhere
        half = MAX_MESSAGE // 2
        super().__init__(line if len(line) <= MAX_MESSAGE else f"{line[:half]} ... {line[-half:]}")


INFERENCE = {"scope": "inference"}
RUNTIME = {"scope": "runtime"}
PLACE = RUNTIME | {"place": True}
"""Where something lies on this machine; see `shareable`."""


class ProcessKind(enum.StrEnum):
    """The diffusion process."""

    FLOW = "flow"
    DDPM = "ddpm"


class Sampler(enum.StrEnum):
    """The integrator: Euler, Heun and dopri5 (adaptive) for rectified flow, DDIM and ancestral for DDPM."""

    EULER = "euler"
    HEUN = "heun"
    DOPRI5 = "dopri5"
    DDIM = "ddim"
    ANCESTRAL = "ancestral"


class GuidedForward(enum.StrEnum):
    """How the conditional and the unconditional half of a guided call meet the network."""

    SEPARATE = "separate"
    JOINT = "joint"


class EmaBuffers(enum.StrEnum):
    """What the weight average does with buffers (thresholds)."""

    COPY = "copy"
    AVERAGE = "average"


class Precision(enum.StrEnum):
    """Arithmetic of the backbone and the experts; routing is float32 in fp32 and bf16."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP64 = "fp64"


class Backend(enum.StrEnum):
    """How the expert bank computes; every choice gives the result of `loop`."""

    AUTO = "auto"
    LOOP = "loop"
    BATCHED = "batched"
    GROUPED = "grouped"


class PoolScope(enum.StrEnum):
    """Whose tokens a training batch's selections and statistics span when several processes train."""

    PROCESS = "process"
    GLOBAL = "global"


class Parallel(enum.StrEnum):
    """How several processes hold one model: each a whole one to compute with, or each a share of every tensor."""

    DDP = "ddp"
    FSDP = "fsdp"


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Options of one router; each router class extends this as its `Config`."""

    kind: str
    """A name built into diffmoe (`expert_choice`) or an import string `module:Class`."""


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The mixture-of-experts feed-forward layers."""

    router: RouterConfig
    """The rule that says which expert works on which token."""
    num_experts: int
    """Experts a layer, E."""
    capacity: float = 1.0
    """Training capacity C: experts that work on a token, on average (token choice: exactly)."""
    interleave: bool = True
    """MoE in odd blocks only (the paper); false puts it in every block."""
    expert_ratio: float | None = None
    """Hidden width of an expert over D; null: `mlp_ratio`, as a dense network's (the paper)."""
    shared_experts: int = 0
    """Experts that work on every token beside the routed ones."""
    pool_scope: PoolScope = PoolScope.PROCESS
    """process: a router sees the images of its own GPU (the paper). global: those of all GPUs, so that their number
    changes nothing; equal scores go to the earlier token of the batch."""

    def __post_init__(self) -> None:
        require_positive(self, "num_experts", "capacity")
        require_not_negative(self, "shared_experts")
        require(self.expert_ratio is None or self.expert_ratio > 0, "moe.expert_ratio", self.expert_ratio,
                "use a number above 0, or null")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One DiT backbone. In YAML `size: S` stands for hidden_size, depth and num_heads."""

    hidden_size: int
    """Width D."""
    depth: int
    """Number of blocks."""
    num_heads: int
    """Attention heads a block."""
    input_size: int
    """Height and width of the image or latent, in pixels of that array."""
    patch_size: int
    """Side of a patch in the same pixels; T = (input_size / patch_size)^2 tokens a sample."""
    in_channels: int
    """Channels of the image or latent."""
    num_classes: int
    """Classes; label `num_classes` is the null label of guidance."""
    mlp_ratio: float = 4.0
    """Hidden width of a feed-forward network over D; an expert's too, unless `moe.expert_ratio` says otherwise."""
    class_dropout_prob: float = 0.1
    """Share of training labels replaced by the null label; at 0 there is no null label."""
    learn_sigma: bool = True
    """Predict 2C channels; DDPM reads the second half as its variance, flow ignores it."""
    moe: MoEConfig | None = None
    """None: the dense baseline."""

    def __post_init__(self) -> None:
        require_positive(self, "hidden_size", "depth", "num_heads", "input_size", "patch_size", "in_channels",
                         "num_classes", "mlp_ratio")
        require(self.hidden_size % self.num_heads == 0, "model.hidden_size", self.hidden_size,
                f"make it a multiple of num_heads={self.num_heads}")
        require(self.hidden_size % 4 == 0, "model.hidden_size", self.hidden_size,
                "make it a multiple of 4 (sine-cosine positions)")
        require(self.input_size % self.patch_size == 0, "model.input_size", self.input_size,
                f"make it a multiple of patch_size={self.patch_size}")
        require(0 <= self.class_dropout_prob < 1, "model.class_dropout_prob", self.class_dropout_prob,
                "use a probability in [0, 1)")
        require(float(self.ffn_size) == self.hidden_size * self.mlp_ratio, "model.mlp_ratio", self.mlp_ratio,
                f"make hidden_size={self.hidden_size} times it a whole number")
        ratio = self.moe and self.moe.expert_ratio
        require(ratio is None or (self.hidden_size * ratio) % 1 == 0, "model.moe.expert_ratio", ratio,
                f"make hidden_size={self.hidden_size} times it a whole number")
        if self.moe is not None:
            resolve_router(self.moe.router.kind).check(self, self.moe)

    @property
    def num_tokens(self) -> int:
        """T, tokens a sample."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def ffn_size(self) -> int:
        """Hidden width of a dense feed-forward network."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def expert_size(self) -> int:
        """F, hidden width of an expert; where there is none, of a dense feed-forward network."""
        ratio = self.mlp_ratio if self.moe is None or self.moe.expert_ratio is None else self.moe.expert_ratio
        return int(self.hidden_size * ratio)

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def null_label(self) -> int | None:
        """The label that stands for no class, or None when the model was built without one."""
        return self.num_classes if self.class_dropout_prob > 0 else None

    def is_moe_block(self, index: int) -> bool:
        """Say whether block `index` (from 0) holds experts."""
        return self.moe is not None and (index % 2 == 1 or not self.moe.interleave)


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The diffusion process that is trained."""

    process: ProcessKind = ProcessKind.FLOW
    """Rectified flow, or DDPM with learned sigma (1000 linear steps)."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training images or latents. Where they lie is no part of a digest: the data's own digest names them."""

    name: str
    """`digits`: scikit-learn's handwritten digits. `cifar10`: from `path`, or downloaded. `folder`: an image folder.
    `idx`: MNIST's or Fashion-MNIST's files. `latents`: what `python -m diffmoe.data.latents` wrote."""
    path: str | None = field(default=None, metadata=PLACE)
    """Folder of the data. cifar10 and folder: one folder of images a class. idx: train-images-idx3-ubyte(.gz) and
    train-labels-idx1-ubyte(.gz). latents: their folder. null: cifar10 is downloaded."""
    cache: str | None = field(default=None, metadata=PLACE)
    """Folder of downloads; null: $XDG_CACHE_HOME/diffmoe or ~/.cache/diffmoe."""
    horizontal_flip: bool = False
    """Mirror half of the training images at random, anew each epoch; the reference set stays as it is."""
    vae: str | None = field(default=None, metadata=PLACE)
    """The autoencoder that decodes samples of latents, a folder or a name on the hub; it must be the one that encoded
    them. null: the one that the latents' manifest names."""
    resize: bool = False
    """Scale and crop images of another size than model.input_size (ADM's centre crop) instead of refusing them."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The shared trainer."""

    batch_size: int
    """Images an optimiser step, over all processes."""
    num_images: int
    """Length of the run in images seen; a whole number of batches."""
    learning_rate: float = 1e-4
    """AdamW's constant learning rate."""
    expert_rate: float = 1.0
    """Learning rate of the experts' weights relative to all others'; an expert sees a share of the tokens."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    adam_beta2: float = 0.999
    """AdamW's decay of the mean squared gradient a step; 0.95 follows a change sooner."""
    warmup_images: int = 0
    """Images over which the learning rate rises linearly from 0."""
    clip_norm: float | None = None
    """Largest norm of the backbone's gradient; predictors are neither counted nor scaled."""
    ema_half_life_images: float = 1_774_357.0
    """Half-life of the weight average in images. Default: 0.9999 a step of 256 images, 256 ln 2 / -ln 0.9999."""
    ema_width: float | None = None
    """Width of the average relative to the images seen, its standard deviation over the whole: EDM2's power function
    (arXiv 2312.02696, section 3.1), which suits every budget of a run alike. null: ema_half_life_images holds."""
    budgets: tuple[int, ...] = ()
    """Images seen after which the averages are kept as they are then: smaller budgets, measured along one run."""
    extra_ema_half_lives: tuple[float, ...] = ()
    """Half-lives, in images, of further averages that are kept, so that one can be chosen after the run."""
    ema_buffers: EmaBuffers = EmaBuffers.COPY
    """`average` is the authors' rule: it pulls thresholds towards the zero that they start from."""
    precision: Precision = Precision.FP32
    """bf16: autocast of everything but routing, norms and the residual stream. fp64: to compare runs exactly."""
    tf32: bool = False
    """On a GPU, let products that are left in float32 (of bf16 runs: the routers') take TF32, as the release does."""

    def __post_init__(self) -> None:
        require_positive(self, "batch_size", "num_images", "learning_rate", "expert_rate", "ema_half_life_images")
        lives = (self.ema_half_life_images, *self.extra_ema_half_lives)
        require(len(set(lives)) == len(lives) and all(math.isfinite(life) and life > 0 for life in lives),
                "training.extra_ema_half_lives", list(self.extra_ema_half_lives),
                f"use positive numbers, each once and other than ema_half_life_images={self.ema_half_life_images:g}")
        require(self.num_images % self.batch_size == 0, "training.num_images", self.num_images,
                f"make it a multiple of batch_size={self.batch_size}")
        require(all(0 < budget < self.num_images and budget % self.batch_size == 0 for budget in self.budgets),
                "training.budgets", list(self.budgets),
                f"use multiples of batch_size={self.batch_size} below num_images={self.num_images}, or [] for none")
        require(self.ema_width is None or 0.01 <= self.ema_width <= 0.28, "training.ema_width", self.ema_width,
                "use 0.01 to 0.28 (0.29 weighs all steps alike), or null")
        require_not_negative(self, "warmup_images", "weight_decay")
        require(0 <= self.adam_beta2 < 1, "training.adam_beta2", self.adam_beta2, "use 0 or more, below 1")
        require(self.clip_norm is None or self.clip_norm > 0, "training.clip_norm", self.clip_norm,
                "use a positive number, or null to switch clipping off")

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the run."""
        return self.num_images // self.batch_size

    def ema_decay(self, step: int) -> float:
        """Decay of the run's average in optimiser step `step` (from 1)."""
        if self.ema_width is None:
            return self.decay_of(self.ema_half_life_images)
        return (1 - 1 / step) ** (_power(self.ema_width) + 1)

    def decay_of(self, half_life_images: float) -> float:
        """Decay a step that halves a weight's share every `half_life_images`."""
        return 0.5 ** (self.batch_size / half_life_images)


@functools.cache
def _power(width: float) -> float:
    """Return gamma of the average whose weight at time t of T is (t / T)^gamma, from its relative width.

    That density's variance is (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), which falls with gamma.
    """
    low, high = 0.0, width**-2
    for _ in range(100):  # bisect
        gamma = (low + high) / 2
        narrow = (gamma + 1) < width**2 * (gamma + 2) ** 2 * (gamma + 3)
        low, high = (low, gamma) if narrow else (gamma, high)
    return low


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How images are drawn. All of it is stated beside every number."""

    sampler: Sampler = field(default=Sampler.EULER, metadata=INFERENCE)
    """The integrator; it must belong to the process."""
    num_steps: int = field(default=50, metadata=INFERENCE)
    """Integrator steps (Heun calls the network twice a step; dopri5 chooses its own)."""
    batch_size: int = field(default=100, metadata=INFERENCE)
    """Images a sampling batch: part of the method for `selection: gate`, whose pool it is."""
    guidance_scale: float = field(default=1.0, metadata=INFERENCE)
    """Classifier-free guidance; 1 is off and costs one call."""
    guided_channels: int | None = field(default=None, metadata=INFERENCE)
    """Leading channels that are guided; null for all of them, 3 in DiT's forward_with_cfg."""
    guided_forward: GuidedForward = field(default=GuidedForward.SEPARATE, metadata=INFERENCE)
    """separate: two calls; joint: one call, where both halves share the experts' pool."""
    ddim_eta: float = field(default=0.0, metadata=INFERENCE)
    """Share of ancestral noise in DDIM: 0 is deterministic."""
    clip_denoised: bool = field(default=False, metadata=INFERENCE)
    """Clip DDPM's estimate of the clean image to [-1, 1]."""

    def __post_init__(self) -> None:
        require_positive(self, "num_steps", "batch_size")
        require_not_negative(self, "guidance_scale")
        require(0 <= self.ddim_eta <= 1, "sampling.ddim_eta", self.ddim_eta, "use a number in [0, 1]")
        require(self.guided_channels is None or self.guided_channels > 0, "sampling.guided_channels",
                self.guided_channels, "use a positive number, or null for all channels")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the samples are measured."""

    extractor: str = field(default="inception-v3-compat", metadata=INFERENCE)
    """Feature extractor; its name goes into the distance's. Only Inception's is called FID."""
    second_extractor: str | None = field(default=None, metadata=INFERENCE)
    """Another extractor, whose Frechet distance alone is measured too, under its own name; null: none."""
    memorisation: bool = field(default=False, metadata=INFERENCE)
    """Measure too how near samples lie to training images: `nn_ratio` and `copied`."""
    num_samples: int = field(default=50_000, metadata=INFERENCE)
    """Images drawn, seeds 0 to num_samples - 1."""
    kid_subset_size: int = field(default=1000, metadata=INFERENCE)
    """Images of one kernel-distance subset; at most num_samples."""
    ema_half_life_images: float | None = field(default=None, metadata=INFERENCE)
    """Which average is sampled: one of training.extra_ema_half_lives; null: that of training.ema_half_life_images."""
    budget_images: int | None = field(default=None, metadata=INFERENCE)
    """Which budget is measured: one of training.budgets; null: the whole run."""
    reference: str | None = field(default=None, metadata=PLACE)
    """ADM's reference batch to compare with: .npz of images and perhaps statistics. null: the training images."""
    extractor_weights: str | None = field(default=None, metadata=PLACE)
    """File of the extractor's weights where they cannot be downloaded."""

    def __post_init__(self) -> None:
        require_positive(self, "num_samples", "kid_subset_size")
        require(self.kid_subset_size <= self.num_samples, "evaluation.kid_subset_size", self.kid_subset_size,
                f"use at most num_samples={self.num_samples}")
        require(self.second_extractor != self.extractor, "evaluation.second_extractor", self.second_extractor,
                "the first is the same; name another, or null")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Where and how fast; nothing here changes a result beyond rounding."""

    device: str = field(default="auto", metadata=RUNTIME)
    """`cpu`, `cuda`, or `auto`."""
    backend: Backend = field(default=Backend.AUTO, metadata=RUNTIME)
    """Expert backend."""
    compile: bool | None = field(default=False, metadata=RUNTIME)
    """torch.compile of the network, and on a GPU CUDA graphs of it, unless its experts need `loop`; null: on a GPU."""
    micro_batch_size: int | None = field(default=None, metadata=RUNTIME)
    """Images of one forward in training; null: a process's whole share. It may not cut a router's pool."""
    parallel: Parallel = field(default=Parallel.DDP, metadata=RUNTIME)
    """Several processes: each computes with a whole model (ddp; in bf16 on GPUs, float32 weights, moments and averages
    are shared out), or has a share of every tensor (fsdp; where that is too large)."""
    max_skipped_steps: int = field(default=100, metadata=RUNTIME)
    """Steps of a run that may change nothing because a loss or gradient was not finite; one more stops it. No part of a
    digest: a run that ends is the same at any number."""

    def __post_init__(self) -> None:
        require_not_negative(self, "max_skipped_steps")
        require(self.micro_batch_size is None or self.micro_batch_size >= 1, "runtime.micro_batch_size",
                self.micro_batch_size, "use 1 or more, or null")

    def compiles(self, device_type: str) -> bool:
        """Say whether to compile on a device."""
        return device_type == "cuda" if self.compile is None else self.compile


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything about one run but its seed."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        samplers = {ProcessKind.FLOW: (Sampler.EULER, Sampler.HEUN, Sampler.DOPRI5),
                    ProcessKind.DDPM: (Sampler.DDIM, Sampler.ANCESTRAL)}[self.diffusion.process]
        require(self.sampling.sampler in samplers, "sampling.sampler", self.sampling.sampler.value,
                f"with process {self.diffusion.process} use one of {', '.join(samplers)}")
        require(self.diffusion.process is ProcessKind.FLOW or self.model.learn_sigma, "model.learn_sigma",
                self.model.learn_sigma, "ddpm needs learn_sigma: true")
        require(self.sampling.guidance_scale == 1 or self.model.null_label is not None, "sampling.guidance_scale",
                self.sampling.guidance_scale, "guidance needs a null label: set model.class_dropout_prob above 0")
        require((self.sampling.guided_channels or 1) <= self.model.in_channels, "sampling.guided_channels",
                self.sampling.guided_channels, f"the image has {self.model.in_channels} channels; null guides all")
        half_life, kept = self.evaluation.ema_half_life_images, self.training.extra_ema_half_lives
        require(half_life is None or half_life in kept, "evaluation.ema_half_life_images", half_life,
                f"training.extra_ema_half_lives={list(kept)} are kept; null takes training.ema_half_life_images")
        budget, budgets = self.evaluation.budget_images, self.training.budgets
        require(budget is None or budget in budgets, "evaluation.budget_images", budget,
                f"training.budgets={list(budgets)} are kept; null takes the whole run")
        if self.model.moe is not None:
            resolve_router(self.model.moe.router.kind).check_batch(self.model, self.model.moe, self.training.batch_size)

    @property
    def images_seen(self) -> int:
        """Training images behind the average that is measured: a budget's, or the whole run's."""
        return self.evaluation.budget_images or self.training.num_images

    def trains_copies(self, processes: int, device_type: str) -> bool:
        """Say whether bf16 copies of weights train, of which gradients are bf16, as products make them.

        No gradient may then be added to another micro-batch's. Over processes they are averaged as they are, at half
        the bytes of float32; FSDP averages in float32.
        """
        micro_batch = self.runtime.micro_batch_size
        return (self.training.precision is Precision.BF16 and device_type == "cuda"
                and self.runtime.compiles(device_type)
                and (processes == 1 or self.runtime.parallel is not Parallel.FSDP)
                and micro_batch in (None, self.training.batch_size // processes))


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise ConfigError with one line that names the key, the value and the remedy, unless `condition`."""
    if not condition:
        raise ConfigError(f"{key}={value}: {remedy}")


def require_positive(config: object, *names: str) -> None:
    """Require each named number of `config` to be finite and above 0."""
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value) and value > 0, f"{_section(config)}.{name}", value, "use a number above 0")


def require_not_negative(config: object, *names: str) -> None:
    """Require each named number of `config` to be finite and 0 or more."""
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value) and value >= 0, f"{_section(config)}.{name}", value, "use 0 or more")


def _section(config: object) -> str:
    name = type(config).__name__.removesuffix("Config").lower()
    return {"moe": "model.moe"}.get(name, name)


BUILT_IN_ROUTERS = {"expert_choice": "diffmoe.moe.expert_choice:ExpertChoice"}


@functools.cache
def resolve_router(kind: str) -> type:
    """Return the router class of `kind`: a built-in name or an import string `module:Class`."""
    from diffmoe.moe.routing import Router  # the router contract imports this module

    module_name, _, class_name = BUILT_IN_ROUTERS.get(kind, kind).partition(":")
    remedy = f"use one of {', '.join(BUILT_IN_ROUTERS)} or an import string module:Class"
    try:
        router = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # of the import, or whatever the module raises in it
        raise ConfigError(f"model.moe.router.kind={kind}: {remedy} ({error})") from None
    require(isinstance(router, type) and issubclass(router, Router), "model.moe.router.kind", kind, remedy)
    return router


SIZES: dict[str, dict[str, int]] = {
    "nano": {"hidden_size": 48, "depth": 4, "num_heads": 4},
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    # The paper prints only the parameter counts of these two (951M, 1353M); the shapes are inferred from them.
    "XXL": {"hidden_size": 1280, "depth": 32, "num_heads": 16},
    "XXXL": {"hidden_size": 1440, "depth": 36, "num_heads": 16},
}


def from_dict(cls: type, data: Any, path: str = "") -> Any:
    """Build the config dataclass `cls` from plain YAML data.

    Raises:
        ConfigError: for an unknown, missing or mistyped key, naming it with its dotted path.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{path or 'config'}={_show(data)}: write a mapping of {_names(cls)}")
    if cls is ModelConfig:
        data = _expand_size(data, path)
    if cls is RouterConfig:
        if not isinstance(data.get("kind"), str):
            raise ConfigError(f"{path}.kind={_show(data.get('kind'))}: name a router, for example expert_choice")
        cls = resolve_router(data["kind"]).Config
    hints = typing.get_type_hints(cls, include_extras=False)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            close = difflib.get_close_matches(str(key)[:100], fields, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"known keys are {_names(cls)}"
            raise ConfigError(f"{_join(path, key)}: unknown key; {remedy}")
    for name, spec in fields.items():
        if name not in data and spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(path, name)}: missing; it has no default")
    return cls(**{key: _convert(hints[key], value, _join(path, key)) for key, value in data.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """Return plain data (str, int, float, bool, None, dict) that `from_dict` turns back into `config`."""
    plain = dataclasses.asdict(config)

    def simplify(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: simplify(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return list(value)
        return value.value if isinstance(value, enum.Enum) else value

    return simplify(plain)


def shareable(config: Any) -> dict[str, Any]:
    """Return `to_dict(config)` without the places of this machine: null where a file lies elsewhere anyway.

    What records and checkpoints hold; the content of such files is named by its digest.
    """
    plain = to_dict(config)

    def forget(node: Any, part: dict[str, Any]) -> None:
        for spec in dataclasses.fields(node):
            value = getattr(node, spec.name)
            if dataclasses.is_dataclass(value):
                forget(value, part[spec.name])
            elif spec.metadata.get("place"):
                part[spec.name] = None

    forget(config, plain)
    return plain


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = (),
                base: dict[str, Any] | None = None) -> RunConfig:
    """Read a run's YAML files, each laid over the ones before, then `key.path=value` overrides (values are YAML).

    A scale's file is a whole run; a system's file is laid over it, usually over `model.moe`. Another router drops the
    options of the former, and a `size` its shape. `base` is plain data that the first file is laid over.

    Raises:
        ConfigError: for anything that cannot be used, with the key and the remedy.
    """
    data = base or {}
    for path in paths:
        try:
            data = _merge(data, read_yaml(Path(path)))
        except RecursionError:
            raise ConfigError(f"{path}: a value refers to itself") from None
    return from_dict(RunConfig, apply_overrides(data, overrides))


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Lay `key.path=value` overrides (values are YAML) over plain configuration data.

    Raises:
        ConfigError: for an override that is not of that form.
    """
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"{override}: write overrides as key.path=value")
        try:
            value = yaml.safe_load(text)
        except Exception:  # yaml raises its own errors and, for dates and numbers that are none, anything
            raise ConfigError(f"{key}={text}: not a YAML value") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        try:
            data = _merge(data, value)
        except RecursionError:
            raise ConfigError(f"{key}={text}: refers to itself") from None
    return data


def digest(config: Any, *, scope: str = "inference") -> str:
    """Return 12 hex digits that name what `config` computes.

    Args:
        config: any config dataclass.
        scope: `training` covers what is learned; `inference` also what is sampled.
    """
    content: dict[str, Any] = {}
    frozen = _frozen_defaults()

    names = {path: name for name, path in BUILT_IN_ROUTERS.items()}  # a built-in may be named or imported

    def visit(node: Any, path: str) -> None:
        section = names.get(node.kind, node.kind) if isinstance(node, RouterConfig) else type(node).__name__
        for spec in dataclasses.fields(node):
            value = getattr(node, spec.name)
            field_scope = spec.metadata.get("scope", "training")
            if field_scope == "runtime" or (field_scope == "inference" and scope == "training"):
                continue
            if dataclasses.is_dataclass(value):
                visit(value, _join(path, spec.name))
                continue
            value = value.value if isinstance(value, enum.Enum) else value
            value = section if spec.name == "kind" else value
            default = spec.default.value if isinstance(spec.default, enum.Enum) else spec.default
            value, default = (list(item) if isinstance(item, tuple) else item for item in (value, default))
            if value != frozen.get(section, {}).get(spec.name, default):
                content[_join(path, spec.name)] = float(value) if type(value) is int else value

    visit(config, "")
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def _frozen_defaults() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((Path(__file__).parent / "frozen_defaults.yaml").read_text())


def _names(cls: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _expand_size(data: dict[str, Any], path: str) -> dict[str, Any]:
    if "size" not in data:
        return data
    rest = {key: value for key, value in data.items() if key != "size"}
    if data["size"] not in list(SIZES):
        raise ConfigError(f"{_join(path, 'size')}={_show(data['size'])}: use one of {', '.join(SIZES)}")
    return SIZES[data["size"]] | rest


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Check `value` against the annotation `hint`; ints become floats, nothing else is coerced."""
    if isinstance(hint, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}={value!r}: write a list, [1, 2]")
        return tuple(_convert(typing.get_args(hint)[0], item, path) for item in value)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, path)
    if issubclass(hint, enum.Enum):
        if value not in list(hint):
            raise ConfigError(f"{path}={_show(value)}: use one of {', '.join(hint)}")
        return hint(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    if type(value) is not hint:
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[hint]
        raise ConfigError(f"{path}={_show(value)}: write {kind}")
    if hint is int and abs(value) >= 2**63:
        raise ConfigError(f"{path}={_show(value)}: write a number below 2^63")
    return value


def _show(value: Any) -> str:
    """Return a value for an error; YAML's references can make a short file a value without end."""
    return reprlib.repr(value)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: when it cannot be read or holds something else.
    """
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)
    except Exception as error:  # its own errors and, for dates, numbers and depths that cannot be, anything
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: write a mapping with the keys {_names(RunConfig)}")
    return data


class _UniqueKeyLoader(yaml.SafeLoader):
    """Plain YAML, where a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key} is written twice")
        return super().construct_mapping(node, deep)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    if "kind" in top and top["kind"] != base.get("kind"):  # another router: the options of the former mean nothing
        return top
    if "size" in top:
        base = {key: value for key, value in base.items() if key not in SIZES["S"]}
    both = {key: _merge(base[key], top[key]) for key in base.keys() & top.keys()
            if isinstance(base[key], dict) and isinstance(top[key], dict)}
    return base | top | both
