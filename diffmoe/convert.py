"""The authors' checkpoint layout <-> ours, bit for bit.

    python -m diffmoe.convert 0700000.pt weights.safetensors --config 000_DiffMoE_L_E16_Flow.yaml
    python -m diffmoe.convert weights.safetensors 0700000.pt --to reference

The layout is that of the four models (`models_DiT`, `models_TCDiT`, `models_ECDiT`, `models_DiffMoE`) of
KwaiVGI/DiffMoE, and of the same models of yhlleo/EfficientMoE: each expert has its own linear layers, stored (out, in);
ours are packed (E, in, out). Files are read and written tensor by tensor, and nothing in them is executed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmoe.cli import run_command
from diffmoe.config import (
    ConfigError,
    ModelConfig,
    RunConfig,
    digest,
    load_config,
    read_yaml,
    require,
    resolve_router,
    shareable,
    to_dict,
)
from diffmoe.models.dit import DiT
from diffmoe.training.checkpoint import content_digest, write_whole
from diffmoe.training.tensor_files import (
    Lazy,
    LazyTensors,
    map_weights,
    read_torch,
    write_safetensors,
    write_torch,
)

IMAGENET = Path(__file__).parent / "configs" / "imagenet256.yaml"
SYSTEMS: dict[str, dict[str, Any]] = {
    "models_DiT": {"router": None},
    "models_TCDiT": {"router": {"kind": "baselines.token_choice:TokenChoice"}},
    "models_ECDiT": {"router": {"kind": "expert_choice", "pool": "sample", "predictor": False, "inference": "static"}},
    "models_DiffMoE": {"router": {"kind": "expert_choice"}},
}
"""The authors' modules, with the router that each of them has here."""
SHARED_SETTINGS = ("input_size", "num_classes", "patch_size", "depth", "hidden_size", "num_heads", "mlp_ratio",
                   "in_channels", "class_dropout_prob", "learn_sigma")
"""Settings of their models that have the same name here."""

# Theirs -> ours. Applied as whole-prefix renames; the experts are packed separately.
RENAMES = {
    "pos_embed": "positions",
    "x_embedder.": "patch_embed.",
    "t_embedder.": "time_embed.",
    "y_embedder.embedding_table.": "label_embed.",
    "final_layer.linear.": "final.linear.",
    "final_layer.adaLN_modulation.": "final.adaln.",
}
BLOCK_RENAMES = {
    "attn.": "attn.",
    "adaLN_modulation.": "adaln.",
    "mlp.fc": "ffn.fc",
    "mlp.gate_weight": "ffn.router.gate.weight",
    "mlp.gate.weight": "ffn.router.gate.weight",
    "mlp.capacity_predictor.": "ffn.router.predictor.",
    "mlp.expert_threshold": "ffn.router.threshold",
    "mlp.shared_experts.": "ffn.shared.",
}
EXPERT_PART = re.compile(r"mlp\.experts\.(\d+)\.fc([12])\.(weight|bias)")
PACKED_PART = re.compile(r"ffn\.experts\.([wb])([12])")
DECAY = "mlp.ema_decay"


def from_reference(state: Mapping[str, Tensor], config: ModelConfig) -> LazyTensors:
    """Turn a state dict in the authors' layout into ours for `config`; tensors are made when they are looked up.

    Raises:
        ConfigError: when a tensor is missing, unknown, of another shape, or a setting disagrees with `config`.
    """
    ours: dict[str, Lazy] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        prefix, rest = _split_block(name)
        if match := EXPERT_PART.fullmatch(rest):
            kind = "w" if match[3] == "weight" else "b"
            experts.setdefault(f"{prefix}ffn.experts.{kind}{match[2]}", {})[int(match[1])] = value
        elif rest == DECAY:
            _check_decay(name, value, config)
        else:
            new = prefix + _rename(rest, name, BLOCK_RENAMES if prefix else RENAMES)
            if new in ours:
                raise ConfigError(f"{name}: the state holds this tensor under two names")
            ours[new] = Lazy.of(value)
    for name, parts in experts.items():
        shapes = {tuple(part.shape) for part in parts.values()}
        if sorted(parts) != list(range(len(parts))) or len(shapes) > 1:
            raise ConfigError(f"{name}: experts {sorted(parts)} of shapes {sorted(shapes)} cannot be packed; "
                              f"the configuration has {config.moe.num_experts if config.moe else 'no'} experts")
        (shape,) = shapes
        transpose = name[-2] == "w"
        ours[name] = Lazy((len(parts), *(shape[::-1] if transpose else shape)), parts[0].dtype,
                          partial(_pack, [parts[index] for index in sorted(parts)], transpose))
    _check_shapes({name: lazy.shape for name, lazy in ours.items()}, config)
    return LazyTensors(ours)


def to_reference(state: Mapping[str, Tensor], config: ModelConfig) -> LazyTensors:
    """Turn our state dict (or a part of it, such as gradients) into the authors' layout, made when looked up.

    Raises:
        ConfigError: for a tensor that the layout has no place for.
    """
    require(config.moe is None or config.moe.expert_ratio is None, "model.moe.expert_ratio",
            config.moe and config.moe.expert_ratio, "the authors' experts are as wide as a dense network; use null")
    warmup_steps = getattr(config.moe and config.moe.router, "warmup_steps", 0)
    require(warmup_steps == 0, "model.moe.router.warmup_steps", warmup_steps, "the authors' routers have none; use 0")
    theirs: dict[str, Lazy] = {}
    for name, value in state.items():
        prefix, rest = _split_block(name)
        if match := PACKED_PART.fullmatch(rest):
            part, transpose = {"w": "weight", "b": "bias"}[match[1]], match[1] == "w"
            shape = tuple(value.shape[1:])
            for index in range(len(value)):
                theirs[f"{prefix}mlp.experts.{index}.fc{match[2]}.{part}"] = Lazy(
                    shape[::-1] if transpose else shape, value.dtype, partial(_unpack, value, index, transpose))
            continue
        table = {new: old for old, new in (BLOCK_RENAMES if prefix else RENAMES).items()}
        # Token choice keeps its gate in a linear layer, expert choice and DiffMoE in a bare parameter.
        table["ffn.router.gate.weight"] = f"mlp.{_gate_name(config)}"
        theirs[prefix + _rename(rest, name, table)] = Lazy.of(value)
        if rest == "ffn.router.threshold":
            if not hasattr(config.moe.router, "threshold_decay"):
                raise ConfigError(f"{name}: the authors' layout has no router {config.moe.router.kind}")
            theirs[prefix + DECAY] = Lazy.of(torch.tensor([config.moe.router.threshold_decay]))
    return LazyTensors(theirs)


def _pack(parts: list[Tensor], transpose: bool) -> Tensor:
    return torch.stack([part.mT for part in parts] if transpose else parts)


def _unpack(packed: Tensor, index: int, transpose: bool) -> Tensor:
    return packed[index].mT.contiguous() if transpose else packed[index].clone()


def _split_block(name: str) -> tuple[str, str]:
    match = re.match(r"blocks\.\d+\.", name)
    return (match[0], name[match.end():]) if match else ("", name)


def _rename(rest: str, name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if rest.startswith(old):
            return new + rest[len(old):]
    raise ConfigError(f"{name}: no place for this tensor in the layout; SwiGLU experts are not supported")


def _gate_name(config: ModelConfig) -> str:
    from diffmoe.moe.expert_choice import ExpertChoice

    is_expert_choice = config.moe is not None and issubclass(resolve_router(config.moe.router.kind), ExpertChoice)
    return "gate_weight" if is_expert_choice else "gate.weight"


def _check_decay(name: str, value: Tensor, config: ModelConfig) -> None:
    decay = getattr(config.moe.router, "threshold_decay", None) if config.moe else None
    if decay is None or not torch.equal(value.cpu().float(), torch.tensor([decay])):
        raise ConfigError(f"{name}={value.tolist()}: the configuration has threshold_decay={decay}; make them agree")


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in DiT(config).state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        have, want = shapes.get(name, "missing"), expected.get(name, "no such tensor")
        if have != want:
            raise ConfigError(f"{name}: {have} in the state, {want} in the configuration; it is of another model")


def read_settings(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run that a configuration of the authors' repositories describes, on the scale `imagenet256`.

    Raises:
        ConfigError: for a file that is none, or a model that this project does not have.
    """
    data = read_yaml(path)
    try:
        target, given, basic = data["model"]["target"], dict(data["model"]["params"]), data.get("basic") or {}
        optim = data.get("optim") or {}
        system = SYSTEMS.get(target.split(".")[-2])
        moe = given.pop("MoE_config", None)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError):
        raise ConfigError(f"{path}: neither a configuration of this project nor one with the authors' model.target, "
                          "model.params") from None
    if system is None:
        raise ConfigError(f"{path}: model.target={target} is none of {', '.join(SYSTEMS)}")
    model: dict[str, Any] = {name: given.pop(name) for name in SHARED_SETTINGS if name in given}
    router = system["router"] and dict(system["router"])
    weight = given.pop("CapacityPred_loss_weight", None)
    if router is not None:
        moe = dict(moe or {})
        if weight is not None and router.get("predictor", True) and router["kind"] == "expert_choice":
            router["predictor_loss_weight"] = weight
        # theirs is one network of twice an expert's width, whatever the number says
        model["moe"] = {"router": router, "shared_experts": 2 if moe.pop("n_shared_experts", 0) else 0,
                        **{name: moe.pop(name) for name in ("num_experts", "capacity", "interleave") if name in moe}}
        moe.pop("init_MoeMLP", None)  # how weights start
    unknown = {name: value for name, value in (given | (moe if router is not None else {})).items()
               if value not in (None, False, "none", 0)}
    if unknown:
        raise ConfigError(f"{path}: {', '.join(f'{name}={value}' for name, value in unknown.items())}: the models of "
                          "this project do not have it")
    flow = basic.get("rf", False) or basic.get("rf_ori", False)
    batch = basic.get("global_batch_size", 256)
    scale = load_config([IMAGENET], ["model.moe=null"])
    base = to_dict(scale) | {"model": {"in_channels": 4} | model}
    changes = [] if flow else ["diffusion.process=ddpm", "sampling.sampler=ancestral"]
    changes += [f"training.batch_size={batch}", f"training.num_images={scale.training.num_images // batch * batch}",
                f"training.learning_rate={optim.get('base_learning_rate', 1e-4)}",
                f"training.weight_decay={optim.get('weight_decay', 0)}", "training.precision=fp32"]
    return load_config([], [*changes, *overrides], base=base)


def main(arguments: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmoe.convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, metavar="IN")
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--config", action="append", type=Path, default=[], metavar="FILE",
                        help="the authors' YAML file, or files of this project laid over one another")
    parser.add_argument("--to", choices=("ours", "reference"), default="ours", help="layout of OUT (default: ours)")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema",
                        help="which network of the authors' file: the average (default) or the last weights")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    if options.output.exists():
        raise ConfigError(f"{options.output}: is there already; choose another file")
    convert = convert_to_ours if options.to == "ours" else convert_to_reference
    try:
        count = convert(options.input, options.output, options)
    except OSError as error:
        raise ConfigError(f"{options.output}: cannot be written ({error.strerror or error})") from None
    print(f"{count:,} parameters and buffers: {options.output}")
    return 0


def convert_to_ours(source: Path, target: Path, options: argparse.Namespace) -> int:
    """Write a network of the authors' file as our weights; return its numbers.

    Raises:
        ConfigError: when file and configuration do not fit.
    """
    if not options.config:
        raise ConfigError("--config: give the YAML file beside the authors' checkpoint, or files of this project")
    config = _run_config(options.config, options.overrides)
    state, name = read_torch(source, options.weights), source.stem
    ours = from_reference(state, config.model)
    step = int(name) if name.isdigit() else 0
    description = {"config": shareable(config), "config_digest": digest(config, scope="training"), "seed": 0,
                   "data_digest": "", "step": step, "seconds": 0.0, "converted_from": f"{name}: {options.weights}"}
    text = json.dumps([content_digest(ours, description), description])
    write_whole(target, lambda aside: write_safetensors(aside, ours, {"description": text}))
    return ours.numel()


def convert_to_reference(source: Path, target: Path, options: argparse.Namespace) -> int:
    """Write our weights as a file of the authors' layout; return its numbers.

    Raises:
        ConfigError: when the file is not ours, or its router has no place in the layout.
    """
    state, description = map_weights(source)
    config = _run_config(options.config, options.overrides) if options.config else load_config(
        [], options.overrides, base=description["config"])
    theirs = to_reference(state, config.model)
    write_whole(target, lambda aside: write_torch(aside, theirs, options.weights))
    return theirs.numel()


def _run_config(paths: Sequence[Path], overrides: Sequence[str]) -> RunConfig:
    model = read_yaml(paths[0]).get("model") if len(paths) == 1 else None
    theirs = isinstance(model, dict) and "target" in model
    return read_settings(paths[0], overrides) if theirs else load_config(paths, overrides)


if __name__ == "__main__":
    sys.exit(run_command(main))
