"""Image files: grids of samples with labelled rows, and line plots."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import pad

from runtime.files import atomic_path
from runtime.terminal import UserError

SMALLEST_CELL = 64  # pixels; smaller images are enlarged by an integer factor, without interpolation
GAP = 4  # pixels between images
FONT_SIZE = 16
MANY_POINTS = 50  # of a curve that is drawn without markers


def to_uint8(images):
    """Return images `(N, C, H, W)` in [-1, 1] as a uint8 numpy array `(N, H, W, C)`; values outside are clipped."""
    scaled = (images.detach().float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_grid(path, images, columns, labels=()):
    """Write images `(N, C, H, W)` in [-1, 1], grey (C = 1) or colour (C = 3), as one image file, `columns` per row.

    labels: a text for each row, written left of it. Small images are enlarged. UserError for other shapes.
    """
    from torchvision.utils import make_grid  # here, since importing it takes seconds

    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise UserError(f"{path}: a grid needs images of shape (N, 1 or 3, H, W), got {tuple(images.shape)}")
    scale = max(1, -(-SMALLEST_CELL // max(images.shape[2:])))
    cells = images.detach().float().cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = make_grid(cells, columns, GAP, pad_value=1.0) if len(cells) > 1 else pad(cells[0], (GAP,) * 4, value=1.0)
    canvas = to_uint8(grid[None, : images.shape[1]])[0]
    font = ImageFont.load_default(size=FONT_SIZE)
    margin = max((int(font.getlength(text)) + 12 for text in labels), default=0)
    image = Image.fromarray(np.pad(canvas, ((0, 0), (margin, 0), (0, 0)), constant_values=255).squeeze())
    draw, height = ImageDraw.Draw(image), cells.shape[2]
    for row, text in enumerate(labels):
        draw.text((margin - 6, GAP + row * (height + GAP) + height // 2), text, fill=0, font=font, anchor="rm")
    with atomic_path(path) as temporary:
        image.save(temporary)


def save_lines(path, curves, title, x_label, y_label, y_scale="linear"):
    """Write a plot of `curves`, a list of `(x, y, label)`; curves of one label (or None) share a colour."""
    from matplotlib.figure import Figure  # here, since importing it takes a second

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, colours = figure.subplots(), {}
    for x, y, label in curves:
        new = label not in colours
        colour = colours.setdefault(label, f"C{len(colours)}")
        axes.plot(x, y, color=colour, linewidth=1, marker="." if len(x) < MANY_POINTS else "", markersize=3,
                  label=label if new else None)
    axes.set(title=title, xlabel=x_label, ylabel=y_label, yscale=y_scale)
    if y_scale == "log":
        label_log_axis(axes.yaxis)
    axes.grid(which="both", alpha=0.3)
    if set(colours) - {None}:
        axes.legend(loc="best", fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def label_log_axis(axis):
    """Label a logarithmic axis with 1, 2 and 5 times powers of ten; below a decade, with several round numbers."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    round_numbers = LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(6, steps=(1, 2, 5, 10))
    axis.set(major_locator=round_numbers, major_formatter="{x:g}", minor_locator=NullLocator())
