"""Layers that both networks are built of: normalisation, attention, time features and resampling by two."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from runtime.errors import UserError


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu & He 2018) with min(32, channels // 4) groups, in the precision of its weights.

    Under autocast that is float32, and so is the result: the convolution that follows casts it down.
    """

    def __init__(self, channels, eps):
        super().__init__(group_count(channels), channels, eps)

    def forward(self, x):
        """Return x (N, C, …) normalised per sample and group, same shape."""
        return F.group_norm(x.to(self.weight.dtype), self.num_groups, self.weight, self.bias, self.eps)


def group_count(channels):
    """Return the number of groups that `GroupNorm` makes of `channels`; raise UserError if it does not divide them."""
    groups = min(32, channels // 4)
    if channels % groups:
        raise UserError(f"model.nf and model.ch_mult make a layer of {channels} channels, which do not divide into "
                        f"the {groups} groups of its normalisation; take a multiple of 32 for model.nf")
    return groups


class SelfAttention(nn.Module):
    """Self-attention over the pixels (Vaswani et al. 2017): the branch alone, without its skip connection.

    `qkv` holds the three 1×1 projections as one matrix: first every row of q, then of k, then of v; the rows of a
    head lie together. The softmax runs inside `scaled_dot_product_attention`, which accumulates it in float32.
    """

    def __init__(self, channels, heads, eps):
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(channels, eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x):
        """Return the attention branch of x (N, C, H, W), same shape."""
        n, channels, height, width = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(-1, channels)  # a view when x is channels_last
        qkv = self.qkv(tokens).view(n, height * width, 3, self.heads, channels // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (N, heads, H·W, channels of a head)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out = self.proj(mixed.transpose(1, 2).reshape(-1, channels))
        return out.view(n, height, width, channels).permute(0, 3, 1, 2)


class Level(nn.Module):
    """The modules of one resolution of a U-Net, by name; None where it has none."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


def parallel_linears(linears, x):
    """Return an iterator over `linear(x)` of each of the layers, all computed as one matrix product.

    A network projects one embedding for each of its dozens of blocks: small products that cost more to start than
    to compute.
    """
    weight = torch.cat([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears])
    return iter(F.linear(x, weight, bias).split([linear.out_features for linear in linears], dim=-1))


def check_label(net, label):
    """Raise ValueError unless class labels are given where the network has classes, and only there."""
    if (label is not None) != (net.num_classes > 0):
        given = "none were given" if label is None else "some were given"
        raise ValueError(f"this {type(net).__name__} has {net.num_classes} classes; of class labels, {given}")


def hide_labels(label, probability):
    """Return one-hot labels (N, K), each row zero with `probability`, for classifier-free guidance."""
    return label * (torch.rand_like(label[:, :1]) >= probability) if probability > 0 else label


def sinusoid(t, frequencies):
    """Return (sin(t·f), cos(t·f)), each (N, len(frequencies)) float32, for t (N,)."""
    angle = t.float()[:, None] * frequencies
    return angle.sin(), angle.cos()


def geometric_frequencies(count, last):
    """Return `count` frequencies from 1 down, geometric, such that entry `last` would be 1/10000."""
    frequencies = torch.exp(-math.log(10000.0) / last * torch.arange(count, dtype=torch.float32, device="cpu"))
    return torch.tensor(frequencies.tolist())  # on the default device; arithmetic on meta imports the compiler


class Resample(nn.Module):
    """Base of the modules that halve or double height and width.

    They take the blocks' time shifts and leave them alone, so that one can stand where a residual block resamples.
    """

    def forward(self, x, shifts=None):
        """Return x (N, C, H, W) resampled."""
        return self.resample(x)


class BoxUpsample(Resample):
    """Nearest-neighbour doubling."""

    def resample(self, x):
        """(N, C, H, W) to (N, C, 2H, 2W)."""
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class BoxDownsample(Resample):
    """Mean of 2×2 pixels."""

    def resample(self, x):
        """(N, C, H, W) to (N, C, H/2, W/2)."""
        return F.avg_pool2d(x, 2)


class FIRFilter(Resample):
    """A separable filter of `taps`, normalised to sum one (StyleGAN2, Karras et al. 2020)."""

    def __init__(self, taps):
        super().__init__()
        weight = sum(taps) ** 2
        kernel = [[a * b / weight for a in taps] for b in taps]
        self.register_buffer("kernel", torch.tensor(kernel, dtype=torch.float32), persistent=False)

    def depthwise(self, x):
        """Return the kernel as weights of a convolution that treats each channel of x alone."""
        return self.kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)

    def blur(self, x, before, after, stride=1):
        """Convolve x with the kernel after padding it with `before` and `after` zeros in both directions."""
        padded = F.pad(x, (before, after, before, after))
        return F.conv2d(padded, self.depthwise(x).flip(2, 3), stride=stride, groups=x.shape[1])


class FIRUpsample(FIRFilter):
    """Doubling: zeros between the pixels, then the filter, times 4 to keep the mean."""

    def resample(self, x):
        """(N, C, H, W) to (N, C, 2H, 2W)."""
        height, width = x.shape[2:]
        excess = self.kernel.shape[0] - 2  # the transposed convolution is that much longer than 2H
        up = F.conv_transpose2d(x, 4 * self.depthwise(x), stride=2, padding=excess // 2, groups=x.shape[1])
        return up[:, :, : 2 * height, : 2 * width]


class FIRDownsample(FIRFilter):
    """Halving: the filter, then every second pixel."""

    def resample(self, x):
        """(N, C, H, W) to (N, C, H/2, W/2)."""
        excess = self.kernel.shape[0] - 2
        return self.blur(x, (excess + 1) // 2, excess // 2, stride=2)


class ConvUpsample(Resample):
    """Nearest-neighbour doubling followed by a 3×3 convolution."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)

    def resample(self, x):
        """(N, C, H, W) to (N, C', 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ConvDownsample(Resample):
    """A 3×3 convolution of stride 2 whose zeros stand to the right and below (DDPM, Ho et al. 2020)."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride=2)

    def resample(self, x):
        """(N, C, H, W) to (N, C', H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class FIRConvUpsample(FIRFilter):
    """Zeros between the pixels, a 3×3 convolution, then the filter, times 4."""

    def __init__(self, channels_in, channels_out, taps):
        super().__init__(taps)
        self.conv = nn.Conv2d(channels_in, channels_out, 3)

    def resample(self, x):
        """(N, C, H, W) to (N, C', 2H, 2W)."""
        # A transposed convolution with the flipped weights is the convolution of the zero-filled image: 2H + 1 long.
        spread = F.conv_transpose2d(x, self.conv.weight.flip(2, 3).transpose(0, 1), stride=2)
        excess = self.kernel.shape[0] - 4
        up = 4 * self.blur(spread, (excess + 1) // 2 + 1, excess // 2 + 1)
        return up + self.conv.bias[:, None, None]


class FIRConvDownsample(FIRFilter):
    """The filter, then a 3×3 convolution of stride 2."""

    def __init__(self, channels_in, channels_out, taps):
        super().__init__(taps)
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride=2)

    def resample(self, x):
        """(N, C, H, W) to (N, C', H/2, W/2)."""
        excess = self.kernel.shape[0]
        return self.conv(self.blur(x, (excess + 1) // 2, excess // 2))
