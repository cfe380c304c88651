"""Layers of both networks: normalisation, attention, time features and resampling by a factor of two."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from runtime.terminal import UserError


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu & He 2018) of x (N, C, …), per sample, with min(32, channels // 4) groups.

    It computes in the precision of its weights: in float32 under autocast, which casts the next convolution's input.
    Raises UserError if the number of groups does not divide the channels.
    """

    def __init__(self, channels, eps):
        groups = min(32, channels // 4)
        if channels % groups:
            raise UserError(f"model.nf and model.ch_mult make a layer of {channels} channels, which cannot be divided "
                            f"into the {groups} groups of its normalisation; make model.nf a multiple of 32")
        super().__init__(groups, channels, eps)

    def forward(self, x):
        return F.group_norm(x.to(self.weight.dtype), self.num_groups, self.weight, self.bias, self.eps)


class SelfAttention(nn.Module):
    """Self-attention over the pixels of x (N, C, H, W) (Vaswani et al. 2017): the branch without its skip connection.

    `qkv` holds the three 1×1 projections as one matrix: the rows of q, then of k, then of v, each grouped by head. The
    softmax is inside `scaled_dot_product_attention`, which accumulates it in float32.
    """

    def __init__(self, channels, heads, eps):
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(channels, eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x):
        n, channels, height, width = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(-1, channels)  # a view when x is channels_last
        qkv = self.qkv(tokens).view(n, height * width, 3, self.heads, channels // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (N, heads, H·W, channels of a head)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out = self.proj(mixed.transpose(1, 2).reshape(-1, channels))
        return out.view(n, height, width, channels).permute(0, 3, 1, 2)


class Level(nn.Module):
    """Named modules, such as those of one resolution of a U-Net; None for one that is absent."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


def parallel_linears(linears, x):
    """Return an iterator over `linear(x)` of each of the layers, computed as one matrix product.

    Each of the dozens of blocks projects the same embedding: small products that take longer to launch than to compute.
    """
    weight = torch.cat([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears])
    return iter(F.linear(x, weight, bias).split([linear.out_features for linear in linears], dim=-1))


def seen_label(net, label):
    """Return one-hot labels (N, K) for a network; in training each row is zeroed with probability net.label_dropout.

    This is for classifier-free guidance (Ho & Salimans 2022). Raises ValueError if a network with classes gets no
    labels, or one without classes gets some.
    """
    if (label is not None) != (net.num_classes > 0):
        given = "no labels" if label is None else "labels"
        raise ValueError(f"this {type(net).__name__} has {net.num_classes} classes, but {given} were given")
    if label is None or not net.training or not net.label_dropout:
        return label
    return label * (torch.rand_like(label[:, :1]) >= net.label_dropout)


def sinusoid(t, frequencies):
    """Return (sin(t·f), cos(t·f)), each (N, len(frequencies)) float32, for t (N,)."""
    angle = t.float()[:, None] * frequencies
    return angle.sin(), angle.cos()


def geometric_frequencies(count, last):
    """Return `count` frequencies in geometric progression from 1 downwards; number `last` would be 1/10000."""
    frequencies = torch.exp(-math.log(10000.0) / last * torch.arange(count, dtype=torch.float32, device="cpu"))
    return torch.tensor(frequencies.tolist())  # on the default device; arithmetic on meta imports the compiler


def init_uniform(layer, scale=1.0, parts=1):
    """Initialise a layer as DDPM does: uniform weights of variance scale / mean(fan in, fan out), bias zero.

    With `parts`, that many equal blocks of rows are initialised as separate layers. Scale 0 gives zeros.
    """
    with torch.no_grad():
        for rows in layer.weight.chunk(parts):
            nn.init.xavier_uniform_(rows, gain=math.sqrt(scale))
        layer.bias.zero_()
    return layer


class Resampling(nn.Module):
    """Doubling (`up`) or halving of height and width, with 2×2 boxes or, with `taps`, a separable filter.

    The filter is normalised to sum to one (StyleGAN2, Karras et al. 2020). channels: (in, out) of an optional 3×3
    convolution. `forward` ignores the blocks' time shifts; it takes them to be interchangeable with a residual block.
    """

    def __init__(self, up, taps=(), channels=()):
        super().__init__()
        self.up, self.taps = up, len(taps)
        self.conv = None
        if channels:
            self.conv = init_uniform(nn.Conv2d(*channels, 3, stride=1 if up else 2, padding=int(up and not taps)))
        kernel = [[a * b / sum(taps) ** 2 for a in taps] for b in taps]
        self.register_buffer("kernel", torch.tensor(kernel, dtype=torch.float32), persistent=False)

    def forward(self, x, shifts=None):
        if self.taps:
            return self.filter_up(x) if self.up else self.filter_down(x)
        if self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            return x if self.conv is None else self.conv(x)
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros to the right and below, as in DDPM (Ho et al. 2020)

    def filter_up(self, x):
        """Insert zeros between the pixels, convolve if there is a convolution, and filter; times 4 to keep the mean."""
        height, width = x.shape[2:]
        if self.conv is None:
            padding = (self.taps - 2) // 2  # the transposed convolution is taps - 2 longer than 2H
            up = F.conv_transpose2d(x, 4 * self.depthwise(x), stride=2, padding=padding, groups=x.shape[1])
            return up[:, :, : 2 * height, : 2 * width]
        # A transposed convolution with the flipped weights is the convolution of the zero-filled image: 2H + 1 long.
        spread = F.conv_transpose2d(x, self.conv.weight.flip(2, 3).transpose(0, 1), stride=2)
        return 4 * self.blur(spread, self.taps - 2) + self.conv.bias[:, None, None]

    def filter_down(self, x):
        """Filter, then take every second pixel or apply the convolution with stride 2."""
        return self.blur(x, self.taps - 2, stride=2) if self.conv is None else self.conv(self.blur(x, self.taps))

    def depthwise(self, x):
        """Return the kernel as the weights of a depthwise convolution of x."""
        return self.kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)

    def blur(self, x, zeros, stride=1):
        """Convolve x with the kernel after padding height and width with `zeros` zeros, an odd one above and left."""
        padded = F.pad(x, ((zeros + 1) // 2, zeros // 2) * 2)
        return F.conv2d(padded, self.depthwise(x).flip(2, 3), stride=stride, groups=x.shape[1])
