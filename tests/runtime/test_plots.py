"""A grid of samples shows every image in its place, whole or not at all."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from runtime.plots import GAP, SMALLEST_CELL, save_grid, save_lines, to_uint8
from runtime.terminal import UserError


def ramp(count, channels, size):
    """Image i is flat, of brightness i."""
    values = torch.linspace(-1, 1, count).view(count, 1, 1, 1)
    return values.expand(count, channels, size, size)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "cell"), [(8, 64), (32, 64), (64, 64)])
def test_grid_shows_each_image_in_its_place_at_a_size_people_can_see(tmp_path, channels, size, cell):
    save_grid(tmp_path / "short.png", ramp(6, channels, size)[:5], columns=3)  # a last row may be short
    save_grid(tmp_path / "grid.png", ramp(6, channels, size), columns=3)
    grid, short = (np.asarray(Image.open(tmp_path / name)) for name in ("grid.png", "short.png"))
    step = cell + GAP
    assert short.shape == grid.shape and (short[:, : 2 * step] == grid[:, : 2 * step]).all()
    assert grid.shape[:2] == (2 * step + GAP, 3 * step + GAP) and grid.ndim == (2 if channels == 1 else 3)
    centres = [grid[GAP + row * step + cell // 2, GAP + column * step + cell // 2].ravel()[0]
               for row in range(2) for column in range(3)]
    assert centres == [0, 51, 102, 153, 204, 255]


def test_enlarged_pixels_stay_as_they_are(tmp_path):
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_grid(tmp_path / "grid.png", images, columns=1)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))[GAP : GAP + 64, GAP : GAP + 64]
    assert (grid[::8, ::8] == to_uint8(images)[0]).all() and (grid[7::8, 7::8] == to_uint8(images)[0]).all()


def test_values_outside_the_range_are_clipped():
    assert to_uint8(torch.tensor([-3.0, -1, 0, 1, 3]).view(5, 1, 1, 1)).ravel().tolist() == [0, 0, 128, 255, 255]


def test_labels_stand_left_of_their_rows(tmp_path):
    images = ramp(6, 1, 16).clamp(-1, -1)
    save_grid(tmp_path / "plain.png", images, columns=2)
    save_grid(tmp_path / "labelled.png", images, columns=2, labels=["one", "", "a longer text"])
    plain, labelled = (np.asarray(Image.open(tmp_path / name)) for name in ("plain.png", "labelled.png"))
    margin = labelled.shape[1] - plain.shape[1]
    assert (labelled[:, margin:] == plain).all()
    step = SMALLEST_CELL + GAP
    ink = (labelled[:, :margin] < 128).sum(1)
    rows = [ink[row * step + GAP : (row + 1) * step].sum() for row in range(3)]
    assert rows[1] == 0 and 0 < rows[0] < rows[2]


@pytest.mark.parametrize("images", [torch.zeros(2, 2, 8, 8), torch.zeros(0, 3, 8, 8)])
def test_what_is_no_grid_is_refused_and_nothing_written(tmp_path, images):
    with pytest.raises(UserError, match="needs images of shape"):
        save_grid(tmp_path / "grid.png", images, columns=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("values, ticks", [([0.1, 9.0], {"0.1", "0.2", "0.5", "1", "2", "5"}), ([1.82, 1.98], {"1.9"}),
                                           ([0.97, 1.31], {"1", "1.1", "1.2"})])
def test_a_log_axis_has_plain_numbers(tmp_path, monkeypatch, values, ticks):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: (drawn.append(figure), path.write_bytes(b"")))
    save_lines(tmp_path / "loss.png", [([0, 1], values, "loss")], "title", "update", "loss", "log")
    drawn[0].draw_without_rendering()
    axis = drawn[0].axes[0].yaxis
    labels = {label.get_text() for label in axis.get_ticklabels(which="both")}
    assert ticks <= labels and not any("$" in label for label in labels)


def test_plot_is_written_with_a_line_per_curve(tmp_path):
    save_lines(tmp_path / "none.png", [], "title", "x", "y")
    save_lines(tmp_path / "two.png", [([0, 1], [0, 1], "a"), ([0, 1], [1, 0], "b")], "title", "x", "y")
    none, two = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("none.png", "two.png"))
    coloured = [(np.ptp(p[..., :3], axis=2) > 60).sum() for p in (none, two)]
    assert coloured[0] == 0 and coloured[1] > 500
