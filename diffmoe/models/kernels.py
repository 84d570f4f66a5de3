"""Where the Triton kernels run: on a GPU, those around products in bf16 alone. Elsewhere the plain expressions do."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a product would read `x`: autocast's, where it is on."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta, where models are counted, has no autocast
        return x.dtype
    return torch.get_autocast_dtype(device)


def kernels_apply(x: Tensor) -> bool:
    """Say whether products read `x` in bf16 on a GPU for which there is Triton."""
    return HAS_TRITON and x.is_cuda and product_dtype(x) is torch.bfloat16


def selection_kernels_apply(scores: Tensor) -> bool:
    """Say whether float32 scores lie on a GPU for which there is Triton, whatever the precision of products."""
    return HAS_TRITON and scores.is_cuda and scores.dtype is torch.float32
