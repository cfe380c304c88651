"""NCSN++: the U-Net of score-based models (Song et al. 2021, arXiv 2011.13456, appendix H), with all its options."""

import functools
import itertools
import math
import types

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models import layers
from models.layers import init_uniform

ACTIVATIONS = {"swish": F.silu, "elu": F.elu, "relu": F.relu,
               "lrelu": functools.partial(F.leaky_relu, negative_slope=0.2)}
EPS = 1e-6  # of every group normalisation


class NCSNpp(nn.Module):
    """Velocity network `net(x, t999, label)`; the arguments are the config fields of the same name.

    Built in the order of the data flow: time embedding, input convolution, encoder (one level per resolution, from fine
    to coarse), middle, decoder, output head. Use `models.create_model`, which checks the combination of arguments.
    """

    def __init__(
        self, image_size=32, num_channels=3, num_classes=0,
        nf=128, ch_mult=(1, 2, 2, 2), num_res_blocks=4, attn_resolutions=(16,), dropout=0.0, label_dropout=0.0,
        conditional=True, embedding_type="positional", fourier_scale=16.0,
        resblock_type="biggan", nonlinearity="swish", skip_rescale=True, init_scale=0.0,
        resamp_with_conv=True, fir=False, fir_kernel=(1, 3, 3, 1),
        progressive="none", progressive_input="none", progressive_combine="sum",
        scale_by_sigma=False, sigma_min=0.01, sigma_max=50.0, num_scales=1000,
    ):
        super().__init__()
        self.num_classes, self.label_dropout, self.scale_by_sigma = num_classes, label_dropout, scale_by_sigma
        self.fourier, self.activation = embedding_type == "fourier", ACTIVATIONS[nonlinearity]
        # Noise level of step i; only scale_by_sigma uses it, but it is part of every released state dict.
        self.register_buffer("sigmas", noise_levels(sigma_max, sigma_min, num_scales))
        options = types.SimpleNamespace(  # what all blocks share
            time_channels=4 * nf, activation=self.activation, dropout=dropout,
            rescale=math.sqrt(0.5) if skip_rescale else 1.0,  # factor of every sum of a branch and its skip
            init_scale=init_scale,  # of each branch's last layer
            resblock_type=resblock_type, taps=fir_kernel if fir else (), resamp_with_conv=resamp_with_conv)
        levels = [(nf * m, image_size >> i in attn_resolutions) for i, m in enumerate(ch_mult)]
        features = 2 * nf if self.fourier else nf

        self.time_features = FourierFeatures(nf, fourier_scale) if self.fourier else PositionalFeatures(nf)
        self.time_embedding = self.class_features = None
        if conditional:
            self.time_embedding = layers.Level(linear0=init_uniform(nn.Linear(features, 4 * nf)),
                                               linear1=init_uniform(nn.Linear(4 * nf, 4 * nf)))
        if num_classes:  # as in EDM's networks (Karras et al. 2022)
            self.class_features = layers.Level(linear=init_uniform(nn.Linear(num_classes, features)))
        self.input_conv = init_uniform(nn.Conv2d(num_channels, nf, 3, padding=1))

        self.encoder, skips = nn.ModuleList(), [nf]  # the channels of every feature that the decoder concatenates
        channels, pyramid_channels = nf, num_channels
        for i, (width, attends) in enumerate(levels):
            blocks, attentions = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_res_blocks):
                blocks.append(ResidualBlock(channels, width, options))
                attentions.append(AttentionBlock(width, options) if attends else nn.Identity())
                channels = width
                skips.append(channels)
            down = pyramid = None
            if i < len(levels) - 1:
                down = between_levels(False, channels, options)
                if progressive_input == "input_skip":
                    resample = layers.Resampling(False, options.taps)
                    pyramid = InputSkip(resample, pyramid_channels, channels, progressive_combine)
                    channels = 2 * channels if progressive_combine == "cat" else channels
                elif progressive_input == "residual":
                    resample = layers.Resampling(False, options.taps, (pyramid_channels, channels))
                    pyramid, pyramid_channels = PyramidResidual("down", resample, options.rescale), channels
                skips.append(channels)
            self.encoder.append(layers.Level(blocks=blocks, attentions=attentions, down=down, pyramid=pyramid))

        self.middle = layers.Level(block0=ResidualBlock(channels, channels, options),
                                   attention=AttentionBlock(channels, options),
                                   block1=ResidualBlock(channels, channels, options))

        self.decoder = nn.ModuleList()
        for i, (width, attends) in reversed(list(enumerate(levels))):
            blocks, coarser, pyramid = nn.ModuleList(), channels, None
            for _ in range(num_res_blocks + 1):  # one more, for the output of the downsampling
                blocks.append(ResidualBlock(channels + skips.pop(), width, options))
                channels = width
            coarsest = i == len(levels) - 1
            if progressive == "output_skip":
                head = OutputHead(width, num_channels, options, init_scale)
                pyramid = OutputSkip(head, None if coarsest else layers.Resampling(True, options.taps))
            elif progressive == "residual" and coarsest:
                pyramid = OutputSkip(OutputHead(width, width, options, 1.0), None)
            elif progressive == "residual":
                resample = layers.Resampling(True, options.taps, (coarser, width))
                pyramid = PyramidResidual("up", resample, options.rescale)
            up = between_levels(True, width, options) if i else None
            attention = AttentionBlock(width, options) if attends else nn.Identity()
            self.decoder.append(layers.Level(blocks=blocks, attention=attention, pyramid=pyramid, up=up))

        self.output_head = OutputHead(levels[0][0], num_channels, options, init_scale) if (
            progressive != "output_skip") else None
        # In the order in which the blocks run. A plain list, since the blocks own these layers.
        self.time_linears = [module.time for module in self.modules() if isinstance(module, ResidualBlock)]

    def time_shifts(self, t999, label):
        """Return an iterator over the blocks' shifts of their features, each (N, channels), in their order."""
        if self.time_embedding is None:
            return itertools.repeat(None)
        features = self.time_features(t999)
        if self.class_features is not None:
            features = features + self.class_features.linear(label * math.sqrt(label.shape[1]))
        embedding = self.time_embedding.linear1(self.activation(self.time_embedding.linear0(features)))
        return layers.parallel_linears(self.time_linears, self.activation(embedding))

    def idle_parameters(self):
        """Return the parameters that no output depends on: the blocks' time projections if `conditional` is false."""
        idle = self.time_linears if self.time_embedding is None else []
        return [parameter for linear in idle for parameter in linear.parameters()]

    def forward(self, x, t999, label=None):
        """Return the velocity at x (N, C, H, W) and 999·t (N,); label: one-hot (N, K), zeros if unknown, or None."""
        shifts = self.time_shifts(t999, layers.seen_label(self, label))

        h = self.input_conv(x)
        skips, pyramid = [h], x
        for level in self.encoder:
            for block, attention in zip(level.blocks, level.attentions, strict=True):
                h = attention(block(h, shifts))
                skips.append(h)
            if level.down is not None:
                h = level.down(h, shifts)
                if level.pyramid is not None:
                    pyramid, h = level.pyramid(pyramid, h)
                skips.append(h)

        middle = self.middle
        h = middle.block1(middle.attention(middle.block0(h, shifts)), shifts)

        pyramid = None
        for level in self.decoder:
            for block in level.blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), shifts)
            h = level.attention(h)
            if level.pyramid is not None:
                pyramid, h = level.pyramid(pyramid, h)
            if level.up is not None:
                h = level.up(h, shifts)

        out = (pyramid if self.output_head is None else self.output_head(h)).to(x.dtype)
        if self.scale_by_sigma:
            sigma = t999 if self.fourier else self.sigmas[t999.long()]
            out = out / sigma.to(x.dtype)[:, None, None, None]
        return out


def between_levels(up, channels, options):
    """Return the module between two levels: a residual block that resamples (BigGAN) or a resampling alone."""
    if options.resblock_type == "biggan":
        return ResidualBlock(channels, channels, options, layers.Resampling(up, options.taps))
    return layers.Resampling(up, options.taps, (channels, channels) if options.resamp_with_conv else ())


class PositionalFeatures(nn.Module):
    """Sines and cosines (N, channels) of the time t999 (N,) (DDPM, Ho et al. 2020)."""

    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.register_buffer("frequencies", layers.geometric_frequencies(half, half - 1), persistent=False)

    def forward(self, t999):
        return torch.cat(layers.sinusoid(t999, self.frequencies), dim=1)


class FourierFeatures(nn.Module):
    """Sines and cosines (N, 2·channels) of log(t999) (N,) at fixed random frequencies (Tancik et al. 2020)."""

    def __init__(self, channels, scale):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(channels).mul_(scale))

    def forward(self, t999):
        return torch.cat(layers.sinusoid(t999.float().log(), 2 * math.pi * self.frequencies), dim=1)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut; the block's projection of the time embedding is added between them.

    It is the next of the iterator `shifts`. `resample` (BigGAN, Brock et al. 2019) acts on both branches, before the
    first convolution. The shortcut is a 1×1 convolution if channels or resolution change. The sum is rescaled.
    """

    def __init__(self, channels_in, channels_out, options, resample=None):
        super().__init__()
        self.activation, self.rescale, self.resample = options.activation, options.rescale, resample
        self.norm0 = layers.GroupNorm(channels_in, EPS)
        self.conv0 = init_uniform(nn.Conv2d(channels_in, channels_out, 3, padding=1))
        self.time = init_uniform(nn.Linear(options.time_channels, channels_out))
        self.norm1 = layers.GroupNorm(channels_out, EPS)
        self.dropout = nn.Dropout(options.dropout)
        self.conv1 = init_uniform(nn.Conv2d(channels_out, channels_out, 3, padding=1), options.init_scale)
        self.shortcut = None
        if channels_in != channels_out or resample is not None:
            scale = 1.0 if options.resblock_type == "biggan" else 0.1
            self.shortcut = init_uniform(nn.Conv2d(channels_in, channels_out, 1), scale)

    def forward(self, x, shifts):
        h = self.activation(self.norm0(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv0(h)
        shift = next(shifts)
        if shift is not None:
            h = h + shift[:, :, None, None]
        h = self.conv1(self.dropout(self.activation(self.norm1(h))))
        return rescaled_sum(x if self.shortcut is None else self.shortcut(x), h, self.rescale)


class AttentionBlock(nn.Module):
    """Single-head self-attention with its skip connection; the sum is rescaled."""

    def __init__(self, channels, options):
        super().__init__()
        self.rescale = options.rescale
        self.attention = layers.SelfAttention(channels, 1, EPS)
        init_uniform(self.attention.qkv, 0.1, parts=3)
        init_uniform(self.attention.proj, options.init_scale)

    def forward(self, x):
        return rescaled_sum(x, self.attention(x), self.rescale)


class OutputHead(nn.Module):
    """Normalisation, activation and a 3×3 convolution."""

    def __init__(self, channels_in, channels_out, options, init_scale):
        super().__init__()
        self.activation = options.activation
        self.norm = layers.GroupNorm(channels_in, EPS)
        self.conv = init_uniform(nn.Conv2d(channels_in, channels_out, 3, padding=1), init_scale)

    def forward(self, h):
        return self.conv(self.activation(self.norm(h)))


# Pyramids of the progressive options: each takes and returns the pyramid and the features h of a level.


class InputSkip(nn.Module):
    """Progressive input `input_skip`: the downsampled image, after a 1×1 convolution, joins the features."""

    def __init__(self, down, channels_in, channels, combine):
        super().__init__()
        self.down = down
        self.conv = init_uniform(nn.Conv2d(channels_in, channels, 1))
        self.concatenate = combine == "cat"

    def forward(self, pyramid, h):
        pyramid = self.down(pyramid)
        image = self.conv(pyramid)
        return pyramid, torch.cat([image, h], dim=1) if self.concatenate else image + h


class PyramidResidual(nn.Module):
    """Progressive input or output `residual`: the features are added to a resampled pyramid, which replaces them."""

    def __init__(self, direction, resample, rescale):
        super().__init__()
        self.direction, self.rescale = direction, rescale  # "down" or "up": the name of `resample` in checkpoints
        self.add_module(direction, resample)

    def forward(self, pyramid, h):
        pyramid = rescaled_sum(getattr(self, self.direction)(pyramid), h, self.rescale)
        return pyramid, pyramid


class OutputSkip(nn.Module):
    """Progressive output `output_skip`: the image so far, upsampled, plus this level's contribution.

    Without `up` it is the coarsest level, where the image (or the pyramid of `residual`) begins.
    """

    def __init__(self, head, up):
        super().__init__()
        self.up, self.head = up, head

    def forward(self, pyramid, h):
        image = self.head(h)
        return image if self.up is None else self.up(pyramid) + image, h


def noise_levels(sigma_max, sigma_min, num_scales):
    """Return the buffer `sigmas`, float64 (num_scales,)."""
    return torch.tensor(np.geomspace(sigma_max, sigma_min, num_scales))


def rescaled_sum(x, h, rescale):
    """Return (x + h)·rescale with one temporary fewer; `rescale` is 1 or 1/√2."""
    total = x + h
    return total if rescale == 1.0 else total.mul_(rescale)
