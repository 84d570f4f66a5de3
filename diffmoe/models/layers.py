"""The parts of a DiT: embeddings, modulation, final layer (Peebles & Xie 2023, arXiv 2212.09748)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffmoe.models.kernels import HAS_TRITON, kernels_apply

if HAS_TRITON:
    from diffmoe.models import norm_kernels
    from diffmoe.models.bias_kernels import bias_gelu

NUM_FREQUENCIES = 128
MAX_PERIOD = 10_000
NORM_EPS = 1e-6


class Stream(NamedTuple):
    """The residual stream x + gate * y; the sum waits for the next norm, which makes it in the same pass."""

    x_BTD: Tensor
    gate_BD: Tensor | None = None
    y_BTD: Tensor | None = None

    def total(self) -> Tensor:
        """Return the sum (B, T, D)."""
        return self.x_BTD if self.y_BTD is None else self.x_BTD + self.gate_BD[:, None] * self.y_BTD

    def modulated_norm(self, shift_BD: Tensor, scale_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum and its norm, modulated, both (B, T, D).

        Args:
            shift_BD, scale_BD: one of each a sample.
        """
        if self.y_BTD is not None and kernels_apply(self.x_BTD):  # only products under autocast read the norm
            return norm_kernels.residual_norm(*self, shift_BD, scale_BD, NORM_EPS, torch.bfloat16)
        x_BTD = self.total()
        return x_BTD, modulate(F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=NORM_EPS), shift_BD, scale_BD)


def modulate(x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Return x * (1 + scale) + shift, one shift and scale a sample."""
    return x_BTD * (1 + scale_BD[:, None]) + shift_BD[:, None]


def split_modulation(values: Tensor, count: int) -> tuple[Tensor, ...]:
    """Split (B, count * D) into `count` tensors (B, D), each contiguous, as the kernels read them."""
    return rearrange(values, "b (n d) -> n b d", n=count).contiguous().unbind()


class PatchEmbed(nn.Module):
    """A linear map of each patch to a token; its weight has the shape of a convolution's, as published ones do."""

    def __init__(self, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map images (B, C, H, W) to tokens (B, T, D)."""
        patches = patchify(x_BCHW, self.patch_size)  # a convolution would leave tokens transposed in memory
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class FeedForward(nn.Module):
    """The feed-forward network gelu(x w1 + b1) w2 + b2 with GELU's tanh form."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map tokens (B, T, D) to (B, T, D)."""
        if not kernels_apply(x_BTD):
            return self.fc2(F.gelu(self.fc1(x_BTD), approximate="tanh"))
        bias = self.fc1.bias.to(torch.bfloat16)  # as autocast would
        if not torch.is_grad_enabled():  # with gradients, what goes into GELU is needed too
            return self.fc2(linear_gelu(x_BTD.to(torch.bfloat16), self.fc1.weight.to(torch.bfloat16), bias))
        hidden = F.linear(x_BTD, self.fc1.weight).flatten(0, 1)  # one expert of all rows
        end = torch.full((1,), len(hidden), dtype=torch.int32, device=x_BTD.device)
        hidden = bias_gelu(hidden, bias[None], end)
        return self.fc2(hidden.unflatten(0, x_BTD.shape[:2]))


@torch.library.custom_op("diffmoe::linear_gelu", mutates_args=())
def linear_gelu(x_BTD: Tensor, weight_FD: Tensor, bias_F: Tensor) -> Tensor:
    """Return gelu(x w^T + b), (B, T, F), in the epilogue of a library's product; torch.compile would take it apart."""
    return torch._addmm_activation(bias_F, x_BTD.flatten(0, 1), weight_FD.t(), use_gelu=True).unflatten(
        0, x_BTD.shape[:2])


@linear_gelu.register_fake
def _(x_BTD: Tensor, weight_FD: Tensor, bias_F: Tensor) -> Tensor:
    return x_BTD.new_empty(*x_BTD.shape[:2], len(weight_FD))


class TimestepEmbedder(nn.Module):
    """Embed scalar times: 128 cosines and 128 sines, then a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        """Map times (B,), in [0, 1] for flow and 0..999 for DDPM, to (B, D)."""
        index = torch.arange(NUM_FREQUENCIES, dtype=torch.float32, device=t_B.device)
        frequencies = torch.exp(-math.log(MAX_PERIOD) / NUM_FREQUENCIES * index)
        angles = t_B[:, None].float() * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class FinalLayer(nn.Module):
    """Modulated norm and a linear map to patches, both starting at zero."""

    def __init__(self, width: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, patch_size**2 * out_channels)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, stream: Stream, condition_BD: Tensor) -> Tensor:
        """Return patches (B, T, patch * patch * channels), channel fastest."""
        shift, scale = split_modulation(self.adaln(condition_BD), 2)
        return self.linear(stream.modulated_norm(shift, scale)[1])


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Turn (B, C, H, W) into row-major tokens (B, T, C * patch * patch), channel slowest."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, height: int, patch_size: int) -> Tensor:
    """Turn (B, T, patch * patch * channels) into (B, channels, H, W); tokens are row-major."""
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=patch_size, q=patch_size)


def sincos_positions(width: int, side: int) -> Tensor:
    """Return the fixed 2-D sine-cosine table, float32 (1, side * side, width).

    The first half of the channels encodes the column, the second the row, each as sines then cosines.
    """
    quarter = width // 4
    frequencies = MAX_PERIOD ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.cat([axis[column.flatten()], axis[row.flatten()]], dim=1).float()[None]
