"""The one backbone: a class-conditional diffusion transformer whose feed-forward layers may be experts.

    image or latent (B, C, H, W) -> patch tokens (B, T, D) + fixed positions
      -> blocks: x += gate * attention(mod(norm(x))); x += gate * ffn(mod(norm(x)))    (adaLN-Zero)
      -> final layer -> prediction (B, C or 2C, H, W)

Dense, token choice, expert choice and DiffMoE are this file with another `config.moe`.
Shapes: B samples, T tokens a sample, D width.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffmoe.config import Backend, ModelConfig
from diffmoe.models.attention import Attention
from diffmoe.models.layers import (
    FeedForward,
    FinalLayer,
    PatchEmbed,
    Stream,
    TimestepEmbedder,
    sincos_positions,
    split_modulation,
    unpatchify,
)
from diffmoe.moe.experts import ExpertBank
from diffmoe.moe.layer import MoE
from diffmoe.moe.routing import Routing


@dataclass
class ModelOutput:
    """What one call of the network gives."""

    prediction: Tensor
    """(B, C or 2C, H, W)."""
    routings: list[Routing] = field(default_factory=list)
    """One a mixture-of-experts layer, in order of depth; empty for the dense model."""

    def losses(self) -> dict[str, Tensor]:
        """Return the routers' weighted auxiliary losses by name, summed over layers."""
        total: dict[str, Tensor] = {}
        for routing in self.routings:
            for name, loss in routing.losses.items():
                total[name] = total[name] + loss if name in total else loss
        return total


class Block(nn.Module):
    """An adaLN-Zero transformer block with a dense or a mixture-of-experts feed-forward layer."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn = Attention(width, config.num_heads)
        self.is_moe = config.is_moe_block(index)
        self.ffn = MoE(config) if self.is_moe else FeedForward(width, config.ffn_size)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, stream: Stream, condition_BD: Tensor, row_bound: float | None) -> tuple[Stream, Routing | None]:
        """Return the new stream of tokens (B, T, D) and the routing of a mixture-of-experts layer."""
        shift1, scale1, gate1, shift2, scale2, gate2 = split_modulation(self.adaln(condition_BD), 6)
        x, h = stream.modulated_norm(shift1, scale1)
        x, h = Stream(x, gate1, self.attn(h)).modulated_norm(shift2, scale2)
        if self.is_moe:
            y, routing = self.ffn(h, row_bound)
        else:
            y, routing = self.ffn(h), None
        return Stream(x, gate2, y), routing


class DiT(nn.Module):
    """The backbone; build it with `build_model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_embed = PatchEmbed(config.patch_size, config.in_channels, width)
        self.register_buffer("positions", sincos_positions(width, config.input_size // config.patch_size))
        self.time_embed = TimestepEmbedder(width)
        self.label_embed = nn.Embedding(config.num_classes + (config.null_label is not None), width)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.final = FinalLayer(width, config.patch_size, config.out_channels)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, row_bound: float | None = None) -> ModelOutput:
        """Predict velocity (flow) or noise (DDPM).

        Args:
            x_BCHW: noised images.
            t_B: times as the process counts them.
            labels_B: int64 classes; `config.null_label` for none.
            row_bound: rows that a dynamic router may lay out, in units of S; None counts them on the host.
        """
        x, condition = self.embed(x_BCHW, t_B, labels_B)
        stream, routings = Stream(x), []
        for block in self.blocks:
            stream, routing = block(stream, condition, row_bound)
            if routing is not None:
                routings.append(routing)
        patches = self.final(stream, condition)
        side = self.config.input_size // self.config.patch_size
        return ModelOutput(unpatchify(patches, side, self.config.patch_size), routings)

    def embed(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens of images (B, T, D) and the condition of times and labels (B, D)."""
        x_BTD = self.patch_embed(x_BCHW) + self.positions
        return x_BTD, self.time_embed(t_B) + self.label_embed(labels_B)

    def moe_layers(self) -> dict[int, MoE]:
        """Return the mixture-of-experts layers by block index."""
        return {index: block.ffn for index, block in enumerate(self.blocks) if block.is_moe}

    def set_backend(self, backend: Backend) -> DiT:
        """Choose how expert banks compute; returns self."""
        for layer in self.moe_layers().values():
            layer.experts.backend = backend
        return self

    def waits_for_device(self, dtype: torch.dtype) -> bool:
        """Say whether expert banks count rows on the host, with products in `dtype`: no CUDA graph can hold that."""
        device = self.positions.device
        return any(layer.experts.choose(device, dtype, equal_rows=layer.router.equal_rows) is Backend.LOOP
                   for layer in self.moe_layers().values())

    def update_routers(self, observed: list[Tensor], num_updates: int) -> None:
        """Move the routers' buffers once, after an optimiser step.

        Args:
            observed: `Routing.observed` of each router that has one, in order of depth, averaged over the step.
            num_updates: steps made before.
        """
        routers = [layer.router for layer in self.moe_layers().values()]
        for router, value in zip(routers, observed, strict=True):
            router.update(value, num_updates)

    def predictor_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that only a router's own loss trains; clipping leaves them out."""
        return [parameter for layer in self.moe_layers().values()
                for name, parameter in layer.router.named_parameters()
                if not name.startswith(layer.router.backbone_parameters)]

    def rounded(self, dtype: torch.dtype) -> DiT:
        """Return this network with copies in `dtype` of what autocast would round for each product anew.

        All else is shared: routers and embeddings, which stay float32, and buffers. Uncompiled, outputs under autocast
        and gradients are the same to the last bit; a compiler need not round what it reads again.
        """
        routers = [layer.router for layer in self.moe_layers().values()]
        exact = {id(module) for router in routers for module in router.modules()}
        copies: dict[int, object] = {id(shared): shared for shared in (*routers, *self.parameters(), *self.buffers())}
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, ExpertBank)) and id(module) not in exact:
                copies |= {id(parameter): nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
                           for parameter in module.parameters()}
        return copy.deepcopy(self, copies)

    def initialise(self, seed: int) -> DiT:
        """Set DiT's initial weights (adaLN-Zero); returns self.

        Each tensor's draw depends on (seed, its name) alone: systems that share a part start it alike, and
        neither the order of construction nor the number of processes matters.
        """
        def generator(name: str) -> torch.Generator:
            key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            return torch.Generator(self.positions.device).manual_seed(int.from_bytes(key[:7], "big"))

        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator(name))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        projection = self.patch_embed.proj  # a convolution, initialised as the linear map that it is
        nn.init.xavier_uniform_(projection.weight.flatten(1), generator=generator("patch_embed"))
        nn.init.zeros_(projection.bias)
        nn.init.normal_(self.label_embed.weight, std=0.02, generator=generator("label_embed"))
        for index in (0, 2):
            nn.init.normal_(self.time_embed.mlp[index].weight, std=0.02, generator=generator(f"time_embed.{index}"))
        for module in (*(block.adaln[1] for block in self.blocks), self.final.adaln[1], self.final.linear):
            nn.init.zeros_(module.weight)
        for index, layer in self.moe_layers().items():
            for part in ("router", "experts"):
                getattr(layer, part).initialise(lambda name, prefix=f"{index}.{part}": generator(f"{prefix}.{name}"))
        return self


def build_model(config: ModelConfig, seed: int = 0) -> DiT:
    """Build the backbone with its initial weights; under a meta device they stay unset."""
    model = DiT(config)
    return model if model.positions.is_meta else model.initialise(seed)
