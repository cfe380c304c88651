"""Images from npy, npz, folders and zips, and one sentence for each that cannot be read."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from configs.default import get_default_config
from datasets import load_images
from metrics.statistics import LOSSY, open_images
from runtime.terminal import UserError
from tests.datasets.image_files import encode, make_config, write_folder, write_zip
from tests.processes import run_ranks


def read_images(path, channels=3, size=6, extractor="inception"):
    config = get_default_config()
    config.data.num_channels, config.data.image_size, config.eval.feature_extractor = channels, size, extractor
    return open_images(path, config)


def uint8_images(count=5, channels=3, size=6):
    return np.random.default_rng(0).integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def write_pngs(folder, images):
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(folder / f"{i:03d}.png")


def test_an_npy_of_floats_is_quantised_and_one_of_bytes_is_not(tmp_path):
    images = uint8_images()
    np.save(tmp_path / "bytes.npy", images)
    np.save(tmp_path / "floats.npy", ((images + 0.5) / 127.5 - 1).astype(np.float32))
    for name in ("bytes.npy", "floats.npy"):
        source = read_images(tmp_path / name)
        assert len(source) == 5
        assert torch.equal(source.read([1, 2, 3]), torch.from_numpy(images[1:4]))


def test_an_npz_in_either_order_of_axes_is_read(tmp_path):
    images = uint8_images()
    np.savez(tmp_path / "channels_last.npz", arr_0=images.transpose(0, 2, 3, 1))
    np.savez(tmp_path / "channels_first.npz", images=images)
    for name in ("channels_last.npz", "channels_first.npz"):
        assert torch.equal(read_images(tmp_path / name).read(range(5)), torch.from_numpy(images))


def test_a_folder_and_a_zip_of_images_are_read_in_the_order_of_names(tmp_path):
    images = uint8_images()
    write_pngs(tmp_path / "folder", images)
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as opened:
        for path in sorted((tmp_path / "folder").iterdir(), reverse=True):
            opened.write(path, f"inner/{path.name}")
    for name in ("folder", "images.zip"):
        source = read_images(tmp_path / name)
        assert len(source) == 5
        assert torch.equal(source.read(range(5)), torch.from_numpy(images))


def test_a_zip_is_opened_once_and_not_for_every_image(tmp_path, monkeypatch):
    write_pngs(tmp_path / "folder", uint8_images())
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as opened:
        for path in (tmp_path / "folder").iterdir():
            opened.write(path, path.name)
    archives = []

    class Counted(zipfile.ZipFile):
        def __init__(self, *arguments, **options):
            archives.append(self)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(zipfile, "ZipFile", Counted)
    source = read_images(tmp_path / "images.zip")
    assert source.read(range(5)).shape == (5, 3, 6, 6) and len(archives) == 1


def test_a_damaged_picture_in_a_zip_is_named(tmp_path):
    write_pngs(tmp_path / "folder", uint8_images(2))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as opened:
        for path in (tmp_path / "folder").iterdir():
            opened.write(path, path.name)
    content = bytearray((tmp_path / "images.zip").read_bytes())
    content[content.index(b"IDAT", content.index(b"001.png")) + 6] ^= 0xFF
    (tmp_path / "images.zip").write_bytes(content)
    source = read_images(tmp_path / "images.zip")
    with pytest.raises(UserError, match="corrupt image 001.png in .*images.zip"):
        source.read(range(2))


def test_grey_files_stay_grey_when_the_model_has_one_channel(tmp_path):
    images = uint8_images(channels=1)
    write_pngs(tmp_path / "folder", images)
    assert torch.equal(read_images(tmp_path / "folder", 1).read(range(5)), torch.from_numpy(images))
    assert read_images(tmp_path / "folder", 3).shape == (3, 6, 6)


def test_the_sample_with_nan_is_named(tmp_path):
    images = np.zeros((9, 1, 4, 4), np.float32)
    images[7, 0, 1, 2] = np.nan
    np.save(tmp_path / "x.npy", images)
    with pytest.raises(UserError, match="sample 7 is not finite"):
        read_images(tmp_path / "x.npy").read(range(5, 9))


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        read_images(tmp_path)


def test_images_of_different_sizes_are_named(tmp_path):
    write_pngs(tmp_path, uint8_images())
    Image.new("RGB", (7, 6)).save(tmp_path / "003.png")
    with pytest.raises(UserError, match=r"000\.png of \(3, 6, 6\), 003\.png of \(3, 6, 7\)"):
        read_images(tmp_path).read(range(5))


def test_a_damaged_image_is_named(tmp_path):
    write_pngs(tmp_path, uint8_images())
    content = (tmp_path / "002.png").read_bytes()
    (tmp_path / "002.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"corrupt image 002\.png"):
        read_images(tmp_path).read(range(5))


@pytest.mark.parametrize(("array", "complaint"), [
    (np.zeros((4, 6, 6), np.float32), "shape"),
    (np.zeros((4, 2, 6, 6), np.float32), "shape"),
    (np.zeros((0, 3, 6, 6), np.float32), "shape"),
    (np.zeros((4, 3, 6, 6), np.int64), "int64"),
])
def test_arrays_that_are_no_images_are_refused(tmp_path, array, complaint):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(UserError, match=complaint):
        read_images(tmp_path / "x.npy")


def test_floats_from_0_to_255_are_refused_instead_of_clipped(tmp_path):
    np.save(tmp_path / "x.npy", uint8_images().astype(np.float32))
    with pytest.raises(UserError, match=r"in \[-1, 1\]"):
        read_images(tmp_path / "x.npy").read(range(5))


def test_files_that_hold_no_arrays_and_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "x.npy").write_bytes(b"not numpy")
    (tmp_path / "x.gif").write_bytes(b"GIF")
    (tmp_path / "x.zip").write_bytes(b"not a zip")
    np.savez(tmp_path / "x.npz", other=np.zeros(3))
    for name in ("x.npy", "x.gif", "x.zip", "x.npz", "absent.npy"):
        with pytest.raises(UserError, match=name):
            read_images(tmp_path / name)


def test_pickled_objects_in_an_npy_are_not_executed(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        read_images(tmp_path / "x.npy")


def kinds_of_images():
    """Return image files of 6×6 by name, each of a kind that is easily read in two ways."""
    colour, grey = uint8_images(1)[0], Image.fromarray(np.arange(36, dtype=np.uint16).reshape(6, 6) * 1800)
    picture = Image.fromarray(colour.transpose(1, 2, 0))
    turned, holes = Image.Exif(), picture.convert("RGBA")
    turned[0x0112] = 6
    holes.putpixel((1, 2), (0, 0, 0, 0))
    return {"16-bit.png": encode(grey, "PNG"), "turned.png": encode(picture, "PNG", exif=turned),
            "holes.png": encode(holes, "PNG"), "palette.gif": encode(picture, "GIF"),
            ".hidden/a.png": encode(picture, "PNG"), "__MACOSX/a.png": b"-", "sub/plain.bmp": encode(picture, "BMP")}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_images_are_measured_as_they_are_trained_on_and_conversions_are_counted(tmp_path, packed, channels):
    root = tmp_path / ("x.zip" if packed else "x")
    (write_zip if packed else write_folder)(root, kinds_of_images())
    trained = load_images(make_config(tmp_path, "custom", root, 6, channels))
    measured = read_images(root, channels)
    np.testing.assert_array_equal(measured.read(range(5)).numpy(), trained.images)
    assert len(measured) == 5 and measured.notes == trained.notes and measured.notes["16-bit grey, divided by 257"] == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_becomes_grey_or_colour_as_a_folder_does(tmp_path, channels):
    images = uint8_images()
    write_pngs(tmp_path / "folder", images)
    np.savez(tmp_path / "x.npz", images=images)
    folder, array = (read_images(tmp_path / name, channels) for name in ("folder", "x.npz"))
    assert torch.equal(folder.read(range(5)), array.read(range(5))) and folder.notes == array.notes
    assert folder.shape == array.shape == (channels, 6, 6)


def test_for_pixels_images_of_another_size_are_brought_to_the_one_that_is_trained_at(tmp_path):
    write_pngs(tmp_path / "folder", uint8_images())
    source = read_images(tmp_path / "folder", 3, 3, "pixels")
    assert source.shape == (3, 3, 3) and source.read(range(5)).shape == (5, 3, 3, 3)
    assert source.notes == {"resampled to 3×3 with the lanczos filter": 5}


def test_lossy_compression_is_told(tmp_path):
    write_folder(tmp_path, {"a.jpg": encode(Image.new("RGB", (6, 6)), "JPEG")})
    source = read_images(tmp_path)
    source.read(range(1))
    assert source.notes == {LOSSY: 1}


@pytest.mark.parametrize(("low", "warned"), [(0.0, True), (-1.0, False)])
def test_floats_from_0_to_1_bring_a_warning(tmp_path, capsys, low, warned):
    np.save(tmp_path / "x.npy", np.linspace(low, 1, 2 * 36, dtype=np.float32).reshape(2, 1, 6, 6))
    read_images(tmp_path / "x.npy", 1)
    assert ("floats are read as pixels in [-1, 1]" in capsys.readouterr().err) == warned


def test_conversions_are_counted_over_all_processes(tmp_path):
    write_pngs(tmp_path / "images", uint8_images(7, channels=1))
    (status, said), (other, quiet) = run_ranks(
        tmp_path, "tools.reference_statistics", "--config", "configs/rectified_flow/cifar10_rf_gaussian.py",
        "--config.eval.feature_extractor", "pixels", "--config.data.image_size", 4, "--data_dir", tmp_path / "images",
        "--output", tmp_path / "statistics.npz")
    assert status == 0 and "images: 7 images: grey, repeated into three channels" in said, said
    assert other == 0 and "images: grey" not in quiet
