"""Pictures of samples: grids with labelled rows, and lines of pixels over time."""

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from runtime.errors import UserError
from runtime.files import atomic_path

SMALLEST_CELL = 64  # pixels; smaller images are enlarged by a whole factor, each pixel to a square
GAP = 4  # pixels between images
FONT_SIZE = 16
MANY_POINTS = 50  # of a curve, whose dots would hide the line


def to_uint8(images):
    """Return images `(N, C, H, W)` in [-1, 1] as uint8 `(N, H, W, C)` numpy array; values outside are clipped."""
    scaled = (images.detach().float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_grid(path, images, columns, labels=None):
    """Write images `(N, C, H, W)` in [-1, 1], grey (C = 1) or colour (C = 3), as one picture, row by row.

    `columns` is the number of images in a row; `labels`, if given, holds one text per row, written left of it.
    Small images are enlarged to cells of at least 64 pixels. The file appears whole or not at all.
    Raises `UserError` for another number of channels, for no images, and for labels that do not match the rows.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise UserError(f"{path}: a grid needs images of shape (N, 1 or 3, H, W), got {tuple(images.shape)}")
    rows = -(-len(images) // columns)
    if labels is not None and len(labels) != rows:
        raise UserError(f"{path}: {len(labels)} labels for a grid of {rows} rows; give one label per row")
    cells = to_uint8(images)
    scale = max(1, -(-SMALLEST_CELL // max(cells.shape[1:3])))
    cells = cells.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = cells.shape[1] + GAP, cells.shape[2] + GAP
    font = ImageFont.load_default(size=FONT_SIZE)
    margin = 0 if labels is None else max(int(font.getlength(text)) for text in labels) + 12
    canvas = np.full((rows * height + GAP, margin + columns * width + GAP, cells.shape[3]), 255, np.uint8)
    for place, cell in enumerate(cells):
        top, left = GAP + place // columns * height, margin + GAP + place % columns * width
        canvas[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
    picture = Image.fromarray(canvas.squeeze(-1) if canvas.shape[2] == 1 else canvas)
    draw = ImageDraw.Draw(picture)
    for row, text in enumerate(labels or ()):
        draw.text((margin - 6, GAP + row * height + (height - GAP) // 2), text, fill=0, font=font, anchor="rm")
    with atomic_path(path) as temporary:
        picture.save(temporary)


def save_lines(path, curves, title, x_label, y_label):
    """Write a plot of `curves`, a list of `(x, y, label)` with x and y sequences of numbers and label text or None."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab10"].colors
    names = list(dict.fromkeys(label for _, _, label in curves))
    for x, y, label in curves:
        marker = "." if len(x) < MANY_POINTS else ""
        axes.plot(x, y, color=colours[names.index(label) % len(colours)], linewidth=1, marker=marker, markersize=3)
    for number, label in enumerate(name for name in names if name is not None):
        axes.plot([], [], color=colours[number % len(colours)], label=label)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    if any(name is not None for name in names):
        axes.legend(loc="best", fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
