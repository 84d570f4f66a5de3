"""The authors' implementation (KwaiVGI/DiffMoE) from a checkout, in this process, on the same work.

Nothing of it is part of this repository: models, loss, sampler and weight average are imported from the folder that
the user names; only the order of calls of their training loop is repeated here, since it is no function of theirs.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import hashlib
import importlib
import io
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe.bench.capacity import drawn_model
from diffmoe.bench.cases import Case
from diffmoe.bench.subjects import Shared, network_inputs, training_facts
from diffmoe.config import ConfigError, ModelConfig, RunConfig
from diffmoe.convert import to_reference
from diffmoe.data.images import to_model_range
from diffmoe.models.counting import flops_per_call
from diffmoe.models.dit import DiT
from diffmoe.training.precision import tf32

MODELS = {"dense": "models_DiT", "token_choice": "models_TCDiT", "expert_choice": "models_ECDiT",
          "diffmoe": "models_DiffMoE"}
PRECISIONS = {"reference-tf32": False, "reference-bf16": True}
"""Whether autocast to bf16; TF32 is on in both, as their scripts set it."""
AGREEMENT_IMAGES = 4
MOST_RELATIVE_ERROR = 1e-3

DIFFERENCES = (
    "weights: theirs are ours, converted; before timing, both networks' outputs are compared in float32",
    "precision: theirs as shipped (float32 weights and activations, TF32 products), or the same under bf16 autocast; "
    "ours bf16 autocast with routing in float32",
    "data: theirs get a batch that lies ready on the device; ours draw indices, convert and mirror inside the step",
    "noise, times and label dropout are drawn inside the step on both sides (label dropout: theirs in the network)",
    "optimiser: AdamW on both sides; theirs with torch's default implementation (foreach), ours fused",
    "average: theirs tensor by tensor with buffers averaged, ours in one call with buffers copied",
    "logging: theirs read each loss from the device in each step, as their loop does; ours do not",
    "processes: theirs without their DistributedDataParallel wrapper (it would only cost them), with its process "
    "group of one for the all-reduce of each layer",
    "sampling: theirs start from noise drawn on the device and stop at the latent; ours draw noise per seed on the "
    "host, measure capacity and return pixels",
)


class Reference:
    """A checkout of the authors' repository.

    Args:
        folder: its root.

    Raises:
        ConfigError: when it is no checkout, or a package that it imports is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = [f"models/{name}.py" for name in MODELS.values()] + ["diffusion/rectified_flow.py", "utils.py"]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ConfigError(f"--reference {folder}: no checkout of the authors' repository, {missing[0]} is missing")
        content = b"".join((folder / name).read_bytes() for name in names)
        self.digest = hashlib.sha256(content).hexdigest()[:12]
        self.update_ema = _function(folder / "utils.py", "update_ema")
        # not as a part of its package, which imports packages that this file does not need
        self.flow_class = self._import("rectified_flow", folder / "diffusion").RectifiedFlow

    def build(self, system: str, config: ModelConfig) -> torch.nn.Module:
        """Return their network of a system with our shapes.

        Raises:
            ConfigError: for a system that they do not have.
        """
        if system not in MODELS:
            raise ConfigError(f"--reference: the authors' repository has no {system}")
        options: dict[str, Any] = {
            name: getattr(config, name) for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth",
                                                     "num_heads", "mlp_ratio", "class_dropout_prob", "num_classes",
                                                     "learn_sigma")}
        if config.moe is not None:
            capacity = config.moe.capacity
            options["MoE_config"] = _Settings(
                num_experts=config.moe.num_experts, capacity=int(capacity) if capacity == int(capacity) else capacity,
                n_shared_experts=None if system == "token_choice" else 0, interleave=config.moe.interleave,
                init_MoeMLP=False)
        if system == "diffmoe":
            options["CapacityPred_loss_weight"] = config.moe.router.predictor_loss_weight
        module = self._import(f"models.{MODELS[system]}", self.folder)
        with contextlib.redirect_stdout(io.StringIO()):  # their constructors print
            return module.DiT(**options)

    @staticmethod
    def _import(name: str, folder: Path) -> ModuleType:
        before = set(sys.modules)
        sys.path.insert(0, str(folder))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"--reference: {name} of the authors imports {error.name}, which is not installed: "
                              f"pip install {error.name}") from None
        finally:
            sys.path.remove(str(folder))
            for own in set(sys.modules) - before:  # `models` is a name that others may want
                if own.partition(".")[0] == name.partition(".")[0]:
                    del sys.modules[own]


class _Settings(dict):
    """Options that their code reads as attributes and with `get`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class ReferenceSubject:
    """One of their networks with our weights, and the work of a case; for use in a `group_of_one`.

    Raises:
        RuntimeError: when its outputs are not ours.
    """

    def __init__(self, case: Case, config: RunConfig, shared: Shared, reference: Reference) -> None:
        self.config, self.device, self.work = config, shared.device, case.work
        self.sampling_batches = case.sampling_batches
        self.bf16 = PRECISIONS[case.implementation]
        inference = case.work != "train"
        ours = (shared.inference_model(case, config) if inference else
                drawn_model(config.model, shared.device).eval().set_backend(config.runtime.backend))
        with torch.device(shared.device):
            self.model = reference.build(case.system, config.model)
        self.model.to(shared.device).load_state_dict(to_reference(ours.state_dict(), config.model))
        self.relative_error = compare_outputs(ours, self.model.eval(), config)
        del ours
        self.flow = reference.flow_class(self.model)
        self.inputs = network_inputs(config.model, case.batch, shared.device)
        if not inference:
            self._prepare_training(case, shared, reference)

    def _prepare_training(self, case: Case, shared: Shared, reference: Reference) -> None:
        training = self.config.training
        self.update_ema = reference.update_ema
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.update_ema(self.ema, self.model, decay=0)
        self.ema.eval()
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=training.learning_rate,
                                           weight_decay=training.weight_decay, betas=(0.9, 0.999))
        images = shared.images(self.config)
        self.images = to_model_range(images.images[:case.batch]).to(self.device)
        self.labels = images.labels[:case.batch].to(self.device)
        self.running_loss: dict[str, float] = {}

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Switch TF32 on, as their scripts do for the whole process; their sampler prints, which nobody reads."""
        with tf32(True), contextlib.redirect_stdout(io.StringIO()):
            yield

    def call(self) -> object:
        """Do the work once."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if self.work == "train":
                terms = self.flow(self.images, self.labels)
                loss = terms["loss"].mean()
            else:
                with torch.no_grad():
                    noise, times, labels = self.inputs
                    if self.work == "forward":
                        return self.model(noise, times, labels)
                    steps = self.config.sampling.num_steps
                    for _ in range(self.sampling_batches):
                        images = self.flow.sample(torch.randn_like(noise), labels, sample_steps=steps)[-1]
                    return images
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update_ema(self.ema, self.model)
        for name, value in terms.items():
            if isinstance(value, Tensor):  # a plain 0 for systems without predictor, where their own loop would fail
                self.running_loss[name] = self.running_loss.get(name, 0.0) + value.mean().item()
        return loss

    def facts(self) -> dict[str, Any]:
        """Count operations as for our system; they measure no capacity, and it has the thresholds of ours."""
        found = training_facts(self.config.model)
        if self.work != "train":
            calls = self.config.sampling.num_steps if self.work == "sample" else 1
            found = {"capacity": None, "flops_per_image": calls * flops_per_call(self.config.model, 1.0)}
        return found | {"relative_error": self.relative_error}


@contextlib.contextmanager
def group_of_one(device: torch.device) -> Iterator[None]:
    """Be in a process group of this process alone: their training all-reduces in each layer."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def compare_outputs(ours: DiT, theirs: torch.nn.Module, config: RunConfig) -> float:
    """Return the relative error of their output against ours in float32.

    Raises:
        RuntimeError: when it is more than rounding.
    """
    inputs = network_inputs(config.model, AGREEMENT_IMAGES, ours.positions.device)
    with tf32(False):
        mine, other = ours(*inputs), theirs(*inputs)
    other = other[0] if isinstance(other, tuple) else other
    error = ((other - mine.prediction).norm() / mine.prediction.norm()).item()
    if not error <= MOST_RELATIVE_ERROR:
        raise RuntimeError(f"their output with our weights differs by {error:.1e}: not the same work")
    return error


def _function(path: Path, name: str) -> Any:
    """Return one function of a file whose imports are not all needed for it.

    Raises:
        ConfigError: when the file has no such function.
    """
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            scope: dict[str, Any] = {"torch": torch, "OrderedDict": OrderedDict}
            exec(compile(ast.Module([node], []), str(path), "exec"), scope)
            return scope[name]
    raise ConfigError(f"--reference {path.name}: has no function {name}")
