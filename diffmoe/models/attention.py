"""Self-attention over an image's tokens; in bf16 on a GPU by kernels that read q, k, v where the projection left them.

A library kernel wants q, k and v apart and returns their gradients apart, which are then copied together, and its
bias's gradient is a pass of its own; for few tokens it also makes three passes backward where one is enough.
Shapes: B samples, T tokens, H heads, K their width, D = H K.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffmoe.models.kernels import HAS_TRITON, kernels_apply

if HAS_TRITON:
    from diffmoe.models.attention_kernels import WHOLE, packed_attention

FUSED_TOKENS = (16, 32, 64, 128, 256, 512, 1024)
FUSED_HEAD_WIDTHS = (16, 32, 64, 128)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map tokens (B, T, D) to (B, T, D)."""
        if self._is_fused(x_BTD):
            bias = self.qkv.bias.to(torch.bfloat16)  # as autocast would
            out_BTD, _ = packed_attention(F.linear(x_BTD, self.qkv.weight), bias, self.num_heads)
            return self.proj(out_BTD)
        q, k, v = rearrange(self.qkv(x_BTD), "b t (n h k) -> n b h t k", n=3, h=self.num_heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t k -> b t (h k)"))

    def _is_fused(self, x_BTD: Tensor) -> bool:
        if not (kernels_apply(x_BTD) and x_BTD.shape[1] in FUSED_TOKENS and self.head_dim in FUSED_HEAD_WIDTHS):
            return False
        return torch.is_grad_enabled() or x_BTD.shape[1] <= WHOLE  # forward alone the library's is faster beyond
