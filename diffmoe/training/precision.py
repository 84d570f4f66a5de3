"""The precision of products: autocast to bf16, and what float32 products take on a GPU."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

from diffmoe.config import Precision, TrainingConfig

warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)  # torch.compile's advice: training.tf32


def dtype_of_products(training: TrainingConfig) -> torch.dtype:
    """Return the dtype that products read."""
    return {Precision.FP64: torch.float64, Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}[
        training.precision]


def autocast(training: TrainingConfig, device: torch.device) -> torch.autocast:
    """Return the context of a forward pass; gradients take their dtypes from it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=training.precision is Precision.BF16)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow float32 products (and convolutions) in TF32, or not."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
