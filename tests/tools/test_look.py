"""python -m tools.look: what a data set is, and a grid of what the loader yields."""

import types

import numpy as np
import torch
from PIL import Image

from configs.rectified_flow.digits_rf_gaussian import get_config
from datasets import ImageSet, create_batches
from tests.helpers import DIGITS, overrides
from tests.processes import output_of
from tools import look
from tools.look import describe_images, main, moments


def test_one_command_describes_the_digits_and_writes_a_grid(tmp_path):
    log = output_of(tmp_path, "tools.look", "--config", DIGITS, *overrides(data__use_aug=True), "--out",
                    tmp_path / "look.png", "--images", 20)
    assert "images: 1797 of shape (1, 8, 8)" in log and "classes: 10 (0: 178, 1: 182, " in log
    assert "mean per channel: 0.3053 " in log and "standard deviation: 0.3759" in log
    with Image.open(tmp_path / "look.png") as grid:
        assert grid.width > grid.height > 2 * 8


def test_moments_are_those_of_the_pixels():
    images = np.random.default_rng(0).integers(0, 200, (7, 3, 4, 4), dtype=np.uint8)
    mean, deviation = moments(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 2, 3)))
    np.testing.assert_allclose(deviation, (images / 255).std((0, 2, 3)))


def test_classes_are_counted_and_many_shortened():
    pixels, names = np.zeros((1000, 1, 4, 4), np.uint8), ("ant", "bee", "cat")
    assert "classes: 3 (ant: 2, cat: 1)" in describe_images(ImageSet(pixels[:3], np.array([0, 0, 2]), names))
    [line] = [line for line in describe_images(ImageSet(pixels, np.arange(1000))) if line.startswith("classes")]
    assert line.startswith("classes: 1000 (0: 1, 1: 1, ") and line.endswith("19: 1, … (1000 classes))")


def test_cache_conversions_and_skipped_images_are_told():
    pixels = np.zeros((2, 1, 4, 4), np.uint8)
    images = ImageSet(pixels, None, None, "two images", {"turned": 2}, "data/cache/two", ("bad",))
    text = "\n".join(describe_images(images))
    assert "cached: data/cache/two" in text and "2 images: turned" in text
    assert "skipped: 1 images, the first: bad" in text and "classes: 0 (none)" in text


def test_the_grid_shows_what_training_sees(monkeypatch, capsys):
    config, shown = get_config(), []
    config.data.use_aug, config.training.batch_size = True, 64
    monkeypatch.setattr(look, "save_grid", lambda path, images, columns: shown.append(images))
    main(config, types.SimpleNamespace(out="look.png", images=100), frozenset())
    source = create_batches(config, "cpu")
    assert torch.equal(shown[0], torch.cat([source.batch(0, 0, 64).z1, source.batch(1, 0, 64).z1])[:100])


def test_pairs_are_counted_and_shown(tmp_path, monkeypatch, capsys):
    values = np.random.default_rng(0).standard_normal((70, 1, 8, 8)).astype(np.float32)
    (tmp_path / "0").mkdir()
    np.save(tmp_path / "0" / "z0.npy", values)
    np.save(tmp_path / "0" / "z1.npy", values / 4)
    config = get_config()
    config.data.reflow_data_root = str(tmp_path)
    main(config, types.SimpleNamespace(out=str(tmp_path / "look.png"), images=4), frozenset())
    assert "pairs: 70 of shape (1, 8, 8)" in capsys.readouterr().out and (tmp_path / "look.png").exists()
