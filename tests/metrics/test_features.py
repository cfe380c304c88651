"""Quantisation and features: equal to clean-fid's own path over the same images and the same TorchScript."""

import warnings

import numpy as np
import pytest
import torch
from cleanfid import fid as clean_fid
from cleanfid.inception_torchscript import InceptionV3W
from hypothesis import example, given
from hypothesis import strategies as st

from configs.default import get_default_config
from metrics.features import InceptionExtractor, PixelExtractor, create_extractor, full_float32
from metrics.scores import frechet_distance, inception_score
from metrics.statistics import measure, open_images, quantise
from runtime.terminal import UserError
from tests.datasets.image_files import png, write_folder
from tests.helpers import ALONE, tf32
from tests.metrics.inception_stand_in import CLASSES, write_stand_in


@pytest.fixture(scope="module")
def inception_path(tmp_path_factory):
    return write_stand_in(tmp_path_factory.mktemp("inception"))


@pytest.fixture(scope="module")
def extractor(inception_path):
    return InceptionExtractor(inception_path, "cpu")


def write_images(folder, seed, count=24):
    """Write random PNGs; return them as uint8 (N, 3, 20, 20)."""
    images = random_images(seed, count, size=20)
    write_folder(folder, {f"{number:03}.png": png(image) for number, image in enumerate(images.numpy())})
    return images


def random_images(seed, count, channels=3, size=16):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), dtype=np.uint8))


def clean_fid_features(folder, inception_path):
    """What clean-fid makes of a folder in its mode legacy_tensorflow, with our file for its Inception."""
    network = InceptionV3W(str(inception_path.parent), download=False, resize_inside=True)
    return clean_fid.get_folder_features(str(folder), network, num_workers=0, batch_size=10, verbose=False,
                                         device=torch.device("cpu"), mode="legacy_tensorflow")


def test_features_of_a_folder_are_those_of_clean_fids_whole_path(tmp_path, inception_path, extractor):
    images = write_images(tmp_path / "images", 0)
    source = open_images(tmp_path / "images", get_default_config())
    ours = extractor.features(source.read(range(len(source))))
    theirs = clean_fid_features(tmp_path / "images", inception_path)
    assert torch.equal(source.read(range(24)), images)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_features_of_generated_images_equal_those_of_clean_fids_generator_path(inception_path, extractor):
    images = random_images(1, 10)
    network = InceptionV3W(str(inception_path.parent), download=False, resize_inside=True)
    theirs = clean_fid.get_model_features(lambda z: images.float(), network, mode="legacy_tensorflow", num_gen=10,
                                          batch_size=10, device=torch.device("cpu"), verbose=False)
    assert np.array_equal(extractor.features(images).numpy(), theirs)


def test_the_fid_of_two_folders_is_that_of_clean_fids_features(tmp_path, inception_path, extractor):
    """Of 256 features, for speed. 24 images make them rank-deficient; then the trace of the root is the sum of
    the singular values of the product of the centred features, which needs no root of a matrix.
    """
    statistics, theirs = [], []
    for seed in (0, 1):
        images = write_images(tmp_path / str(seed), seed)
        statistics.append(measure(images.split(7), extractor, 24, ALONE, "folder"))
        theirs.append(clean_fid_features(tmp_path / str(seed), inception_path)[:, :256].astype(np.float64))
    ours = frechet_distance(*(part for s in statistics for part in (s.mu[:256], s.sigma[:256, :256])))
    centred = [features - features.mean(0) for features in theirs]
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum() / 23
    gap = np.square(theirs[0].mean(0) - theirs[1].mean(0)).sum()
    assert ours == pytest.approx(gap + sum(np.square(c).sum() / 23 for c in centred) - 2 * root, rel=1e-5)


def test_probabilities_come_from_the_features_without_the_bias_as_the_inception_score_wants(inception_path, extractor):
    images = random_images(2, 12)
    ours = extractor.probabilities(extractor.features(images))
    theirs = torch.jit.load(str(inception_path))(images, no_output_bias=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert 1 <= inception_score(ours, splits=2)[0] <= CLASSES


def test_grey_images_enter_inception_as_three_equal_channels_and_many_images_in_parts(extractor):
    grey, many = random_images(3, 2, channels=1), random_images(4, 130, size=4)
    assert torch.equal(extractor.features(grey), extractor.features(grey.repeat(1, 3, 1, 1)))
    torch.testing.assert_close(extractor.features(many)[128:], extractor.features(many[128:]))


@given(value=st.floats(-1.5, 1.5, width=32))
@example(-1.0)
@example(1.0)
@example(2 * 10.99 / 255 - 1)
def test_quantisation_truncates_as_the_literature_does(value):
    clipped = np.float32(255) * np.clip((np.float32(value) + np.float32(1)) / np.float32(2), 0, 1)
    assert quantise(torch.full((1, 1, 1, 1), value)).item() == int(clipped)


def test_pixels_are_mapped_back_to_minus_one_to_one_and_flattened_unless_they_are_many():
    images = torch.tensor([0, 51, 255, 0], dtype=torch.uint8).reshape(1, 1, 2, 2)
    torch.testing.assert_close(PixelExtractor(4).features(images), torch.tensor([[-1.0, -0.6, 1.0, -1.0]]))
    with pytest.raises(UserError, match="inception"):
        PixelExtractor(3 * 64 * 64)


def test_tf32_is_off_for_features_cudnn_stays_on_and_all_comes_back_after_an_error():
    enabled = torch.backends.cudnn.enabled
    with tf32(True) as backends:
        with pytest.raises(ZeroDivisionError), full_float32():
            assert not any(backend.allow_tf32 for backend in backends)
            assert torch.backends.cudnn.enabled is enabled
            raise ZeroDivisionError
        assert all(backend.allow_tf32 for backend in backends)


def test_reading_inception_shows_no_warnings(inception_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extractor = InceptionExtractor(inception_path, "cpu")
        extractor.features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_a_file_that_is_no_inception_is_named(tmp_path):
    path = tmp_path / "inception-2015-12-05.pt"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=r"inception-2015-12-05.pt is not a TorchScript"):
        InceptionExtractor(path, "cpu")
    with pytest.raises(UserError, match=r"absent.pt is not a TorchScript.*does not exist"):
        InceptionExtractor(tmp_path / "absent.pt", "cpu")


def test_without_a_path_inception_is_looked_for_in_the_users_own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    path = write_stand_in(tmp_path / "hub" / "checkpoints")
    assert path.name in create_extractor(get_default_config(), "cpu").protocol
