"""Where the Triton kernels of this package run: products in bf16 on a GPU. Elsewhere the plain expressions do."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None


def kernels_apply(x: Tensor) -> bool:
    """Say whether `x` is, or autocast makes it in a product, bf16 on a GPU for which there is Triton."""
    if not (HAS_TRITON and x.is_cuda):
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return dtype is torch.bfloat16
