"""The attention kernel against torch's attention in float64: in Triton's interpreter, and on a GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

INTERPRETED = """
from test_attention import kernel_errors
import torch
for shape in ((2, 16, 3, 32), (1, 64, 2, 16)):
    errors = kernel_errors(shape, torch.float32, "cpu")
    assert max(errors) < 1e-6, (shape, errors)
"""


def kernel_errors(shape, dtype, device):
    """Return the relative errors of output and gradients for (B, T, H, K)."""
    from diffmoe.models.attention_kernels import packed_attention

    batch, tokens, heads, width = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, tokens, 3 * heads * width, generator=generator).to(device, dtype).requires_grad_()
    bias = torch.randn(3 * heads * width, generator=generator).to(device).requires_grad_()
    grad = torch.randn(batch, tokens, heads * width, generator=generator).to(device, dtype)
    out = packed_attention(qkv, bias, heads)
    gradients = torch.autograd.grad(out, (qkv, bias), grad)
    exact = [value.detach().double().requires_grad_() for value in (qkv, bias)]
    q, k, v = (exact[0] + exact[1]).view(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(out.shape)
    expected_gradients = torch.autograd.grad(expected, exact, grad.double())
    # A bias of keys moves every score of a row alike: its gradient is 0, so that of all three is compared.
    return [((actual - wanted).norm() / wanted.norm()).item()
            for actual, wanted in zip((out, *gradients), (expected, *expected_gradients), strict=True)]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernel_equals_attention_in_tritons_interpreter():
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    run = subprocess.run([sys.executable, "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1",
                         "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(3, 64, 6, 64), (2, 16, 4, 32), (1, 128, 2, 16)])
def test_the_kernel_is_as_near_to_exact_attention_as_bf16_allows(shape):
    assert max(kernel_errors(shape, torch.bfloat16, "cuda")) < 5e-3
