"""Reference statistics: our file, EDM's form, clean-fid's file, images; and what does not belong is refused."""

import pathlib
import shutil
import types
import zipfile

import numpy as np
import pytest
import torch

from configs.default import get_default_config
from metrics.features import pixel_extractor
from metrics.image_files import array_source
from metrics.reference import CIFAR10_NAME, load_reference, measure_source, read_statistics, write_statistics
from runtime.devices import Processes
from runtime.errors import UserError

ALONE = Processes(0, 1, torch.device("cpu"))
EXTRACTOR = pixel_extractor(16)


def images(count=30):
    return np.random.default_rng(0).integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)


def small_config():
    config = get_default_config()
    config.data.num_channels, config.data.image_size = 1, 4
    config.eval.batch_size = 8
    return config


def features_of(array):
    return array.reshape(len(array), -1) / 127.5 - 1


def test_a_written_reference_is_read_back_with_its_features(tmp_path):
    statistics = measure_source(array_source(images(), "random"), EXTRACTOR, 7, ALONE)
    write_statistics(tmp_path / "x.npz", statistics, EXTRACTOR)
    back = read_statistics(tmp_path / "x.npz", EXTRACTOR)
    assert torch.equal(back.mu, statistics.mu)
    assert torch.equal(back.sigma, statistics.sigma)
    assert torch.equal(back.features, statistics.features)
    assert back.count == 30
    np.testing.assert_allclose(back.sigma, np.cov(features_of(images()), rowvar=False), rtol=1e-6, atol=1e-7)


def test_edms_file_with_mu_and_sigma_alone_is_a_reference_without_features(tmp_path):
    np.savez(tmp_path / "edm.npz", mu=np.zeros(16), sigma=np.eye(16))
    found = load_reference(str(tmp_path / "edm.npz"), small_config(), EXTRACTOR, ALONE)
    assert found.features is None
    assert torch.equal(found.sigma, torch.eye(16, dtype=torch.float64))


@pytest.mark.parametrize("form", ["npy", "npz", "folder", "zip"])
def test_images_as_target_are_measured(tmp_path, form):
    from PIL import Image

    if form == "npy":
        path = tmp_path / "x.npy"
        np.save(path, images())
    elif form == "npz":
        path = tmp_path / "x.npz"
        np.savez(path, images=images())
    else:
        path = tmp_path
        for i, image in enumerate(images()):
            Image.fromarray(image[0]).save(path / f"{i:02d}.png")
    if form == "zip":
        path = pathlib.Path(shutil.make_archive(tmp_path / "x", "zip", tmp_path, "."))
        assert zipfile.is_zipfile(path)
    found = load_reference(str(path), small_config(), EXTRACTOR, ALONE)
    np.testing.assert_allclose(found.mu, features_of(images()).mean(0), atol=1e-6)
    assert found.count == 30


def test_without_a_target_pixels_are_compared_with_the_training_images():
    training = types.SimpleNamespace(images=images(), source="training images")
    found = load_reference("", small_config(), EXTRACTOR, ALONE, training)
    np.testing.assert_allclose(found.mu, features_of(images()).mean(0), atol=1e-6)


def test_without_a_target_cifar10_is_compared_with_clean_fids_train_statistics(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    np.savez(cache / "cifar10_legacy_tensorflow_train_32.npz", mu=np.full(16, 0.5), sigma=np.eye(16))
    inception = types.SimpleNamespace(name="inception", dimension=16)
    found = load_reference("", get_default_config(), inception, ALONE)
    assert found.mu[0] == 0.5
    assert found.name == CIFAR10_NAME


def test_data_sets_without_published_statistics_and_other_sizes_of_cifar10_need_a_target():
    inception = types.SimpleNamespace(name="inception", dimension=16)
    config = get_default_config()
    config.data.image_size = 64
    with pytest.raises(UserError, match="--target_path"):
        load_reference("", config, inception, ALONE)


def test_statistics_of_another_dimension_or_extractor_are_refused(tmp_path):
    np.savez(tmp_path / "large.npz", mu=np.zeros(20), sigma=np.eye(20))
    np.savez(tmp_path / "other.npz", mu=np.zeros(16), sigma=np.eye(16), extractor="inception")
    for name, holds in (("large.npz", "20 numbers, but"), ("other.npz", "16 numbers by inception, but")):
        with pytest.raises(UserError, match=f"{name} holds statistics of {holds} .* pixels gives 16"):
            read_statistics(tmp_path / name, EXTRACTOR)


def test_files_that_are_no_statistics_are_refused(tmp_path):
    np.savez(tmp_path / "half.npz", mu=np.zeros(16))
    (tmp_path / "text.npz").write_text("no npz")
    for name in ("half.npz", "text.npz"):
        with pytest.raises(UserError, match=name):
            load_reference(str(tmp_path / name), small_config(), EXTRACTOR, ALONE)
