"""The attention kernel against torch's attention in float64: in Triton's interpreter, and on a GPU."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_interpreter

INTERPRETED = """
from test_attention import kernel_errors
import torch
for shape in ((2, 16, 3, 32), (1, 64, 2, 16)):
    error, _ = kernel_errors(shape, torch.float32, "cpu")
    assert error < 1e-6, (shape, error)
"""


def kernel_errors(shape, dtype, device):
    """Return the largest relative error of output and gradients for (B, T, H, K): the kernel's and the library's."""
    from diffmoe.models.attention_kernels import packed_attention

    batch, tokens, heads, width = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, tokens, 3 * heads * width, generator=generator).to(device, dtype)
    bias = torch.randn(3 * heads * width, generator=generator).to(device)
    grad = torch.randn(batch, tokens, heads * width, generator=generator).to(device, dtype)

    def library(qkv, bias, heads):
        q, k, v = (qkv + bias.to(qkv.dtype)).view(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(grad.shape)

    def results(attention, to):
        leaves = [value.to(to).requires_grad_() for value in (qkv, bias)]
        out = attention(*leaves, heads)
        # A bias of keys moves every score of a row alike: its gradient is 0, so that of all three is compared.
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    exact = results(library, torch.float64)
    return [max(((actual - wanted).norm() / wanted.norm()).item() for actual, wanted in zip(found, exact, strict=True))
            for found in (results(packed_attention, dtype), results(library, dtype))]


@needs_interpreter
def test_the_kernel_equals_attention_in_tritons_interpreter():
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    run = subprocess.run([sys.executable, "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1",
                         "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(3, 64, 6, 64), (2, 16, 4, 32), (1, 128, 2, 16)])
def test_the_kernel_is_as_near_to_exact_attention_as_the_librarys_in_bf16(shape):
    error, of_library = kernel_errors(shape, torch.bfloat16, "cuda")
    assert error < 1.2 * of_library
