"""Layers of both networks, against their definitions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from models import layers

TAPS = st.lists(st.floats(0.1, 4.0), min_size=2, max_size=6)


def filtered(image, kernel, up, down, pad):
    """Definition of StyleGAN2's resampling: zeros between the pixels, padding, convolution, every down-th pixel."""
    spread = np.zeros([side * up for side in image.shape])
    spread[::up, ::up] = image
    padded = np.pad(spread, pad)
    flipped = kernel[::-1, ::-1]
    size = len(kernel)
    rows = [[(padded[i : i + size, j : j + size] * flipped).sum() for j in range(padded.shape[1] - size + 1)]
            for i in range(padded.shape[0] - size + 1)]
    return np.array(rows)[::down, ::down]


@settings(max_examples=15, deadline=None)
@given(taps=TAPS, seed=st.integers(0, 100))
def test_fir_resampling_follows_its_definition(taps, seed):
    """Any filter, odd and lopsided ones too: an error in flip or padding shifts the image."""
    image = np.random.default_rng(seed).standard_normal((4, 4))
    kernel = np.outer(taps, taps) / np.sum(taps) ** 2
    excess = len(taps) - 2
    x = torch.from_numpy(image).float()[None, None].expand(2, 3, 4, 4)
    up = filtered(image, 4 * kernel, 2, 1, ((excess + 1) // 2 + 1, excess // 2))
    down = filtered(image, kernel, 1, 2, ((excess + 1) // 2, excess // 2))
    for module, expected in ((layers.Resampling(True, taps), up), (layers.Resampling(False, taps), down)):
        found = module(x)
        assert found.shape == (2, 3, *expected.shape)
        np.testing.assert_allclose(found[1, 2].numpy(), expected, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(taps=TAPS)
def test_fir_convolutions_are_filter_and_convolution(taps):
    """Up: zeros, 3×3 convolution, filter. Down: filter, 3×3 convolution of stride 2."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, 4, 4)
    kernel = np.outer(taps, taps) / np.sum(taps) ** 2
    up, down = (layers.Resampling(up, taps, (1, 1)) for up in (True, False))
    for module in (up, down):
        torch.nn.init.normal_(module.conv.bias)
    spread = torch.zeros(1, 1, 8, 8)
    spread[..., ::2, ::2] = x
    excess = len(taps) - 4
    before, after = (excess + 1) // 2 + 1, excess // 2 + 1
    convolved = F.conv2d(F.pad(spread, (2, 1, 2, 1)), up.conv.weight)[0, 0].detach().numpy()
    padded = np.pad(convolved, ((max(before, 0), max(after, 0)),) * 2)
    expected = filtered(padded, 4 * kernel, 1, 1, 0) + up.conv.bias.item()
    np.testing.assert_allclose(up(x)[0, 0].detach().numpy(), expected, atol=1e-4)
    blurred = filtered(x[0, 0].numpy(), kernel, 1, 1, ((len(taps) + 1) // 2, len(taps) // 2))
    expected = F.conv2d(torch.from_numpy(blurred).float()[None, None], down.conv.weight, down.conv.bias, stride=2)
    torch.testing.assert_close(down(x), expected, rtol=1e-4, atol=1e-4)


def test_box_resampling_keeps_a_constant_image():
    x = torch.randn(2, 3, 1, 1).expand(2, 3, 4, 4)
    doubled = layers.Resampling(up=True)(x)
    assert torch.equal(doubled, x[..., :1, :1].expand(2, 3, 8, 8))
    torch.testing.assert_close(layers.Resampling(up=False)(doubled), x)


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_follows_its_formula(heads):
    """softmax(q·k / √d)·v for every head, projected."""
    torch.manual_seed(0)
    attention = layers.SelfAttention(16, heads, 1e-6)
    x = torch.randn(2, 16, 3, 5)
    tokens = attention.norm(x).flatten(2).transpose(1, 2)
    q, k, v = attention.qkv(tokens).chunk(3, dim=-1)
    out = []
    for q_h, k_h, v_h in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        weight = torch.einsum("nqc,nkc->nqk", q_h, k_h) / (16 // heads) ** 0.5
        out.append(torch.einsum("nqk,nkc->nqc", weight.softmax(dim=-1), v_h))
    expected = attention.proj(torch.cat(out, dim=-1)).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


def test_attention_under_autocast_has_a_float32_softmax():
    """4,096 equal weights: a sum of exponentials in bfloat16 would stop growing at 256 and give 16 instead of 1."""
    attention = layers.SelfAttention(4, 1, 1e-6)
    with torch.no_grad():
        attention.qkv.weight.zero_()
        attention.qkv.bias.copy_(torch.tensor([0.0] * 8 + [1.0] * 4))
        attention.proj.weight.copy_(torch.eye(4))
        attention.proj.bias.zero_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = attention(torch.randn(1, 4, 64, 64))
    torch.testing.assert_close(out.float(), torch.ones(1, 4, 64, 64), rtol=0.01, atol=0.0)


def test_attention_keeps_no_matrix_of_weights():
    """The largest tensor that attention makes is its projection, not pixels × pixels."""
    sizes = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(o.numel() for o in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(o))
            return out

    attention = layers.SelfAttention(4, 1, 1e-6)
    with Recorder():
        attention(torch.randn(1, 4, 32, 32)).sum().backward()
    assert max(sizes) == 3 * 4 * 32 * 32


def test_normalisation_under_autocast_is_float32():
    """Features of large mean: variance computed in bfloat16 would be zero or wild."""
    x = (1000 + torch.randn(2, 32, 8, 8)).to(torch.float32)
    norm = layers.GroupNorm(32, 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, norm(x))


def test_parallel_linears_are_the_layers_one_by_one():
    torch.manual_seed(0)
    linears = [torch.nn.Linear(5, width) for width in (3, 1, 4)]
    x = torch.randn(2, 5)
    for found, linear in zip(layers.parallel_linears(linears, x), linears, strict=True):
        torch.testing.assert_close(found, linear(x))
