"""Images to be measured: what is read and what refused; their statistics against numpy's over everything at once."""

import types
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from datasets import load_images
from metrics.features import PixelExtractor
from metrics.statistics import LOSSY, evenly_spread, measure, open_images, quantise
from runtime.devices import Processes
from runtime.terminal import UserError
from tests.datasets.image_files import encode, make_config, png, write_folder, write_zip
from tests.helpers import ALONE, CIFAR10, config_of, overrides
from tests.processes import run_ranks

CPU = torch.device("cpu")


def read_images(path, channels=3, size=6, extractor="inception"):
    return open_images(path, config_of(data__num_channels=channels, data__image_size=size,
                                       eval__feature_extractor=extractor))


def uint8_images(count=5, channels=3, size=6):
    return np.random.default_rng(0).integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def pngs(images):
    return {f"{number:03}.png": png(image) for number, image in enumerate(images)}


def test_an_npy_of_floats_is_quantised_and_bytes_are_not_in_an_npz_in_either_order_of_axes(tmp_path):
    images = uint8_images()
    np.save(tmp_path / "bytes.npy", images)
    np.save(tmp_path / "floats.npy", ((images + 0.5) / 127.5 - 1).astype(np.float32))
    np.savez(tmp_path / "channels_last.npz", arr_0=images.transpose(0, 2, 3, 1))
    np.savez(tmp_path / "channels_first.npz", images=images)
    for name in ("bytes.npy", "floats.npy", "channels_last.npz", "channels_first.npz"):
        source = read_images(tmp_path / name)
        assert len(source) == 5 and torch.equal(source.read([1, 2, 3]), torch.from_numpy(images[1:4]))


def test_a_zip_is_opened_once_and_not_for_every_image(tmp_path, monkeypatch):
    write_zip(tmp_path / "images.zip", pngs(uint8_images()))
    archives, original = [], zipfile.ZipFile.__init__
    monkeypatch.setattr(zipfile.ZipFile, "__init__", lambda self, *arguments, **options: (
        archives.append(self), original(self, *arguments, **options))[1])
    source = read_images(tmp_path / "images.zip")
    assert source.read(range(5)).shape == (5, 3, 6, 6) and len(archives) == 1


def test_damaged_images_and_images_of_different_sizes_are_named(tmp_path):
    content = pngs(uint8_images())
    write_folder(tmp_path, content | {"003.png": png(uint8_images(1, size=7)[0, :, 1:])})
    with pytest.raises(UserError, match=r"000\.png of \(3, 6, 6\), 003\.png of \(3, 6, 7\)"):
        read_images(tmp_path).read(range(5))
    write_folder(tmp_path, {"002.png": content["002.png"][:90]})
    with pytest.raises(UserError, match=r"corrupt image 002\.png"):
        read_images(tmp_path).read(range(5))


def with_nan(sample):
    images = np.zeros((9, 3, 6, 6), np.float32)
    images[sample, 0, 1, 2] = np.nan
    return images


@pytest.mark.parametrize(("array", "complaint"), [
    (np.zeros((4, 6, 6), np.float32), "shape"),
    (np.zeros((4, 2, 6, 6), np.float32), "shape"),
    (np.zeros((0, 3, 6, 6), np.float32), "shape"),
    (np.zeros((4, 3, 6, 6), np.int64), "int64"),
    (uint8_images(9).astype(np.float32), r"in \[-1, 1\]"),  # 0 to 255 is not clipped
    (with_nan(7), "sample 7 is not finite"),
    (np.array([{"a": 1}], dtype=object), "cannot be read"),  # pickled objects are not executed
])
def test_arrays_that_are_no_images_are_refused(tmp_path, array, complaint):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=complaint):
        read_images(tmp_path / "x.npy").read(range(5, 9))


def test_files_that_hold_no_arrays_and_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "x.npy").write_bytes(b"not numpy")
    (tmp_path / "x.gif").write_bytes(b"GIF")
    (tmp_path / "x.zip").write_bytes(b"not a zip")
    np.savez(tmp_path / "x.npz", other=np.zeros(3))
    for name in ("x.npy", "x.gif", "x.zip", "x.npz", "absent.npy"):
        with pytest.raises(UserError, match=name):
            read_images(tmp_path / name)


def kinds_of_images():
    """Return image files of 6×6 by name, each of a kind that is easily read in two ways."""
    colour, grey = uint8_images(1)[0], Image.fromarray(np.arange(36, dtype=np.uint16).reshape(6, 6) * 1800)
    image = Image.fromarray(colour.transpose(1, 2, 0))
    turned, holes = Image.Exif(), image.convert("RGBA")
    turned[0x0112] = 6
    holes.putpixel((1, 2), (0, 0, 0, 0))
    return {"16-bit.png": encode(grey, "PNG"), "turned.png": encode(image, "PNG", exif=turned),
            "holes.png": encode(holes, "PNG"), "palette.gif": encode(image, "GIF"),
            ".hidden/a.png": encode(image, "PNG"), "__MACOSX/a.png": b"-", "sub/plain.bmp": encode(image, "BMP")}


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
    write_folder(tmp_path / "folder", pngs(images))
    np.savez(tmp_path / "x.npz", images=images)
    folder, array = (read_images(tmp_path / name, channels) for name in ("folder", "x.npz"))
    assert torch.equal(folder.read(range(5)), array.read(range(5))) and folder.notes == array.notes
    assert folder.shape == array.shape == (channels, 6, 6)


def test_for_pixels_images_of_another_size_are_resized_and_lossy_compression_is_told(tmp_path):
    write_folder(tmp_path, pngs(uint8_images()) | {"a.jpg": encode(Image.new("RGB", (3, 3)), "JPEG")})
    source = read_images(tmp_path, 3, 3, "pixels")
    assert source.shape == (3, 3, 3) and source.read(range(6)).shape == (6, 3, 3, 3)
    assert source.notes == {"resampled to 3×3 with the lanczos filter": 5, LOSSY: 1}


@pytest.mark.parametrize(("low", "warned"), [(0.0, True), (-1.0, False)])
def test_floats_from_0_to_1_bring_a_warning(tmp_path, capsys, low, warned):
    np.save(tmp_path / "x.npy", np.linspace(low, 1, 2 * 36, dtype=np.float32).reshape(2, 1, 6, 6))
    read_images(tmp_path / "x.npy", 1)
    assert ("floats are read as pixels in [-1, 1]" in capsys.readouterr().err) == warned


def test_conversions_are_counted_over_all_processes(tmp_path):
    write_folder(tmp_path / "images", pngs(uint8_images(7, channels=1)))
    (status, said), (other, quiet) = run_ranks(
        tmp_path, "tools.reference_statistics", "--config", CIFAR10, "--data_dir", tmp_path / "images", "--output",
        tmp_path / "x.npz", *overrides(eval__feature_extractor="pixels", data__image_size=4))
    assert status == 0 and "images: 7 images: grey, repeated into three channels" in said, said
    assert other == 0 and "images: grey" not in quiet


def moments(features, size, device="cpu"):
    """Mean and covariance that `measure` finds of features (N, D) that come in batches of `size`."""
    own = types.SimpleNamespace(dimension=features.shape[1], features=lambda rows: rows)
    found = measure(features.split(size), own, len(features), Processes(0, 1, torch.device(device)), "features")
    return found.mu, found.sigma


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(2, 200), size=st.integers(1, 60), offset=st.floats(-50, 50))
def test_batches_give_the_mean_and_covariance_of_all_at_once(seed, count, size, offset):
    features = np.random.default_rng(seed).standard_normal((count, 7)) + offset
    mean, covariance = moments(torch.from_numpy(features), size)
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-10)


def test_float32_features_accumulate_in_float64():
    """Sums of a million equal numbers would drift in float32."""
    features = torch.full((1_000_000, 2), 1000.1)
    features[:, 1] += torch.arange(len(features)) % 2
    mean, covariance = moments(features, 1000)
    np.testing.assert_allclose(mean, features.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance[1, 1], 0.25, rtol=1e-4)
    assert abs(covariance[0, 0]) < 1e-4  # the squares are 1e6: ten digits are left, float32 has seven


@pytest.mark.parametrize("size", [8, 50])
def test_evenly_spread_features_are_kept_of_batches_of_any_size(size):
    images = torch.from_numpy(uint8_images(50, 1, 4))
    found = measure(images.split(size), PixelExtractor(16), 50, ALONE, "batches", max_features=7)
    assert torch.equal(found.features, PixelExtractor(16).features(images)[[0, 7, 14, 21, 28, 35, 42]])


def test_images_are_kept_by_the_processes_that_see_them():
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1)
    for rank, keep, kept in ((0, range(99), range(10)), (1, range(15), range(5)), (2, range(15), []),
                             (1, [0, 9, 10, 14, 19, 20], [0, 4, 9])):
        found = measure(images.split(3), PixelExtractor(1), 30, Processes(rank, 3, CPU), "seen", keep=keep)
        assert found.images.flatten().tolist() == list(kept)
    assert len(measure([], PixelExtractor(1), 3, Processes(0, 4, CPU), "nothing", keep=range(3)).images) == 0


@given(count=st.integers(1, 1000), share=st.floats(0, 1))
def test_evenly_spread_places_are_distinct_and_inside(count, share):
    chosen = int(share * count)
    places = evenly_spread(chosen, count)
    assert len(set(places.tolist())) == chosen
    assert all(0 <= place < count for place in places)


def test_statistics_accumulate_on_the_device_of_the_features():
    """Every operation of the pass on a GPU that is only pretended: a tensor left on the CPU would be an error."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        mean, covariance = moments(torch.zeros(6, 16, device="cuda"), 3, "cuda")
        assert (mean.device.type, covariance.device.type) == ("cuda", "cuda")
        assert covariance.dtype == torch.float64
        assert quantise(torch.zeros(6, 1, 4, 4, device="cuda")).device.type == "cuda"
