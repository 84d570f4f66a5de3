"""The attention kernels against torch's attention in float64: in Triton's interpreter, and on a GPU."""

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
for shape in ((2, 16, 3, 32), (3, 16, 1, 16), (1, 32, 2, 64), (1, 64, 2, 16), (1, 128, 1, 32), (2, 256, 1, 16)):
    errors, _ = kernel_errors(shape, torch.float32, "cpu")
    assert max(errors) < 1e-6, (shape, errors)
for shape in ((1, 64, 2, 64), (1, 256, 2, 32)):  # the interpreter has no products in bf16
    errors, of_library = kernel_errors(shape, torch.float16, "cpu")
    assert all(error < 1.2 * other for error, other in zip(errors, of_library)), (shape, errors, of_library)
"""


def kernel_errors(shape, dtype, device):
    """Return for (B, T, H, K) the relative errors of the kernels, and those of the library.

    Each is of the output and of the gradients of q, k, v, and of the biases of q and v; the gradient of a bias of keys
    is 0, for it moves every score of a row alike, and the kernels' must be exactly that.
    """
    from diffmoe.models.attention_kernels import packed_attention

    batch, tokens, heads, width = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, tokens, 3 * heads * width, generator=generator).to(device, dtype)
    bias = torch.randn(3 * heads * width, generator=generator).to(device)
    grad = torch.randn(batch, tokens, heads * width, generator=generator).to(device, dtype)

    def library(qkv, bias, heads):
        q, k, v = (qkv + bias.to(qkv.dtype)).view(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(grad.shape), None

    def results(attention, to):
        leaves = [value.to(to).requires_grad_() for value in (qkv, bias)]
        out, _ = attention(*leaves, heads)
        of_qkv, of_bias = torch.autograd.grad(out, leaves, grad.to(out.dtype))
        of_q_bias, of_k_bias, of_v_bias = of_bias.chunk(3)
        if attention is packed_attention:
            assert of_k_bias.count_nonzero() == 0
        return [out, *of_qkv.chunk(3, -1), of_q_bias, of_v_bias]

    exact = results(library, torch.float64)
    return [[((actual - wanted).norm() / wanted.norm()).item() for actual, wanted in zip(found, exact, strict=True)]
            for found in (results(packed_attention, dtype), results(library, dtype))]


@needs_interpreter
def test_the_kernels_equal_attention_in_tritons_interpreter():
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    run = subprocess.run([sys.executable, "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1",
                         "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(3, 64, 6, 64), (2, 16, 4, 32), (1, 128, 2, 16), (3, 256, 2, 64), (1, 512, 1, 128)])
def test_the_kernels_are_as_near_to_exact_attention_as_the_librarys_in_bf16(shape):
    errors, of_library = kernel_errors(shape, torch.bfloat16, "cuda")
    assert all(error < 1.2 * other for error, other in zip(errors, of_library, strict=True)), (errors, of_library)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_give_the_same_bits_again():
    from diffmoe.models.attention_kernels import packed_attention, packed_attention_backward

    generator = torch.Generator("cuda").manual_seed(0)
    qkv, bias, grad = (torch.randn(*shape, device="cuda", generator=generator) for shape in (
        (5, 256, 3 * 128), (3 * 128,), (5, 256, 128)))

    def results():
        out, lse = packed_attention(qkv.bfloat16(), bias, 2)
        return out, lse, *packed_attention_backward(qkv.bfloat16(), bias, out, lse, grad.bfloat16(), 2)

    assert all(torch.equal(first, second) for first, second in zip(results(), results(), strict=True))
