"""DhariwalUNet: the U-Net of ADM (Dhariwal & Nichol 2021, arXiv 2105.05233), class-conditional or not."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from models import layers
from runtime.terminal import UserError

HEAD_CHANNELS = 64  # channels of an attention head
EPS = 1e-5  # of every group normalisation


class DhariwalUNet(nn.Module):
    """Velocity network `net(x, t999, label)`; the arguments are the config fields of the same name.

    Built in the order of the data flow. A level with fewer channels than an attention head (64) has no attention. Use
    `models.create_model`, which checks the arguments. Raises UserError for channels that do not fit heads or groups.
    """

    def __init__(
        self, image_size=32, num_channels=3, num_classes=0, nf=128, ch_mult=(1, 2, 2, 2), num_res_blocks=4,
        attn_resolutions=(16,), dropout=0.0, label_dropout=0.0,
    ):
        super().__init__()
        self.num_classes, self.label_dropout = num_classes, label_dropout
        block = functools.partial(ResidualBlock, emb_channels=4 * nf, dropout=dropout)
        levels = [(nf * m, image_size >> i in attn_resolutions) for i, m in enumerate(ch_mult)]

        self.register_buffer("frequencies", layers.geometric_frequencies(nf // 2, nf // 2), persistent=False)
        self.embedding = layers.Level(linear0=nn.Linear(nf, 4 * nf), linear1=nn.Linear(4 * nf, 4 * nf),
                                      label=nn.Linear(num_classes, 4 * nf, bias=False) if num_classes else None)
        if num_classes:
            nn.init.normal_(self.embedding.label.weight)
        channels = levels[0][0]
        self.input_conv = nn.Conv2d(num_channels, channels, 3, padding=1)

        self.encoder, skips = nn.ModuleList(), [channels]
        for i, (width, attends) in enumerate(levels):
            down = block(channels, channels, layers.Resampling(up=False)) if i else None
            blocks = nn.ModuleList()
            for _ in range(num_res_blocks):
                blocks.append(block(channels, width, attention=attends))
                channels = width
            skips += ([skips[-1]] if i else []) + [width] * num_res_blocks
            self.encoder.append(layers.Level(resample=down, blocks=blocks))

        self.middle = nn.ModuleList([block(channels, channels, attention=True), block(channels, channels)])

        self.decoder = nn.ModuleList()
        for i, (width, attends) in reversed(list(enumerate(levels))):
            up = block(channels, channels, layers.Resampling(up=True)) if i < len(levels) - 1 else None
            blocks = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                blocks.append(block(channels + skips.pop(), width, attention=attends))
                channels = width
            self.decoder.append(layers.Level(resample=up, blocks=blocks))

        self.output_norm = layers.GroupNorm(channels, EPS)
        self.output_conv = zeroed(nn.Conv2d(channels, num_channels, 3, padding=1))

        # In the order in which the blocks run. A plain list, since the blocks own these layers.
        self.affine_linears = [module.affine for module in self.modules() if isinstance(module, ResidualBlock)]

    def embed(self, t999, label):
        """Return the embedding (N, channels) of time and class: an MLP of cosines and sines, plus a class vector."""
        sine, cosine = layers.sinusoid(t999, self.frequencies)
        embedding = self.embedding.linear1(F.silu(self.embedding.linear0(torch.cat([cosine, sine], dim=1))))
        return F.silu(embedding if label is None else embedding + self.embedding.label(label))

    def scales_and_shifts(self, t999, label):
        """Return an iterator over the blocks' scales and shifts, each (N, 2·channels), in their order."""
        return layers.parallel_linears(self.affine_linears, self.embed(t999, label))

    def forward(self, x, t999, label=None):
        """Return the velocity at x (N, C, H, W) and 999·t (N,); label: one-hot (N, K), zeros if unknown, or None."""
        affine = self.scales_and_shifts(t999, layers.seen_label(self, label))

        h = self.input_conv(x)
        skips = [h]
        for level in self.encoder:
            for block in filter(None, [level.resample, *level.blocks]):
                h = block(h, affine)
                skips.append(h)

        for block in self.middle:
            h = block(h, affine)

        for level in self.decoder:
            if level.resample is not None:
                h = level.resample(h, affine)
            for block in level.blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), affine)

        return self.output_conv(F.silu(self.output_norm(h))).to(x.dtype)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with scale and shift, the next of `affine`, between them; a shortcut; optional attention.

    `resample` acts on both branches, before the first convolution; the shortcut is a 1×1 convolution if the channels
    change. The last layer of each branch is initialised to zero.
    """

    def __init__(self, channels_in, channels_out, resample=None, attention=False, *, emb_channels, dropout):
        super().__init__()
        self.resample = resample
        self.norm0 = layers.GroupNorm(channels_in, EPS)
        self.conv0 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.affine = nn.Linear(emb_channels, 2 * channels_out)
        self.norm1 = layers.GroupNorm(channels_out, EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = zeroed(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None
        heads = head_count(channels_out) if attention else 0
        self.attention = layers.SelfAttention(channels_out, heads, EPS) if heads else None
        if heads:
            zeroed(self.attention.proj)

    def forward(self, x, affine):
        h = F.silu(self.norm0(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        scale, shift = next(affine)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm1(self.conv0(h)), scale + 1))
        h = self.conv1(self.dropout(h))
        h = h + (x if self.shortcut is None else self.shortcut(x))
        return h if self.attention is None else h + self.attention(h)


def head_count(channels):
    """Return the number of attention heads for `channels`; raise UserError if it does not divide them."""
    heads = channels // HEAD_CHANNELS
    if heads and channels % heads:
        raise UserError(f"model.nf and model.ch_mult make an attention of {channels} channels, which cannot be divided "
                        f"into {heads} heads; make model.nf a multiple of {HEAD_CHANNELS}")
    return heads


def zeroed(layer):
    """Return the layer with weights and bias set to zero, so that its branch contributes nothing at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
