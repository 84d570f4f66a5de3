"""The authors' checkpoint layout <-> ours, bit for bit.

The layout is that of KwaiVGI/DiffMoE's four models (`models_DiT`, `models_TCDiT`, `models_ECDiT`,
`models_DiffMoE`): each expert has its own linear layers, stored (out, in); ours are packed (E, in, out).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from diffmoe.config import ConfigError, ModelConfig, resolve_router
from diffmoe.models.dit import DiT

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


def from_reference(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Turn a state dict in the authors' layout into ours for `config`.

    Raises:
        ConfigError: when a tensor is missing, unknown, of another shape, or a setting disagrees with `config`.
    """
    ours: dict[str, Tensor] = {}
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
            ours[new] = value
    for name, parts in experts.items():
        shapes = {tuple(part.shape) for part in parts.values()}
        if sorted(parts) != list(range(len(parts))) or len(shapes) > 1:
            raise ConfigError(f"{name}: experts {sorted(parts)} of shapes {sorted(shapes)} cannot be packed; "
                              f"the configuration has {config.moe.num_experts if config.moe else 'no'} experts")
        stacked = torch.stack([parts[index] for index in sorted(parts)])
        ours[name] = stacked.mT.contiguous() if name[-2] == "w" else stacked
    _check_shapes(ours, config)
    return ours


def to_reference(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Turn our state dict (or a part of it, such as gradients) into the authors' layout.

    Raises:
        ConfigError: for a tensor that the layout has no place for.
    """
    theirs: dict[str, Tensor] = {}
    for name, value in state.items():
        prefix, rest = _split_block(name)
        if match := PACKED_PART.fullmatch(rest):
            part = {"w": "weight", "b": "bias"}[match[1]]
            for index, tensor in enumerate(value):
                theirs[f"{prefix}mlp.experts.{index}.fc{match[2]}.{part}"] = (
                    tensor.mT.contiguous() if match[1] == "w" else tensor.clone())
            continue
        table = {new: old for old, new in (BLOCK_RENAMES if prefix else RENAMES).items()}
        # Token choice keeps its gate in a linear layer, expert choice and DiffMoE in a bare parameter.
        table["ffn.router.gate.weight"] = f"mlp.{_gate_name(config)}"
        theirs[prefix + _rename(rest, name, table)] = value
        if rest == "ffn.router.threshold":
            if not hasattr(config.moe.router, "threshold_decay"):
                raise ConfigError(f"{name}: the authors' layout has no router {config.moe.router.kind}")
            theirs[prefix + DECAY] = torch.tensor([config.moe.router.threshold_decay])
    return theirs


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


def _check_shapes(ours: Mapping[str, Tensor], config: ModelConfig) -> None:
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in DiT(config).state_dict().items()}
    for name in sorted(expected.keys() | ours.keys()):
        have = tuple(ours[name].shape) if name in ours else "missing"
        want = expected.get(name, "no such tensor")
        if have != want:
            raise ConfigError(f"{name}: {have} in the state, {want} in the configuration; it is of another model")
