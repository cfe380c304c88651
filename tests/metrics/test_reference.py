"""Reference statistics: our file, EDM's form, clean-fid's file, images; and what does not belong is refused."""

import os
import re
import types

import numpy as np
import pytest
import torch

from configs.default import set_field
from metrics import statistics
from metrics.features import PixelExtractor
from metrics.statistics import CIFAR10_NAME, ArrayImages, Reference, measure_source, read_statistics, write_statistics
from runtime.terminal import UserError
from tests.datasets.image_files import png, write_folder
from tests.helpers import ALONE, config_of

EXTRACTOR = PixelExtractor(16)


def images(count=30):
    return np.random.default_rng(0).integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)


def small_config():
    return config_of(data__num_channels=1, data__image_size=4, eval__batch_size=8, eval__nearest=0,
                     eval__feature_extractor="pixels")


def reference(target, config=None):
    return Reference(config or small_config(), str(target), ALONE)


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """An Inception of 16 numbers, and an empty cache of the user."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    extractor = types.SimpleNamespace(name="inception", dimension=16, digest="12")
    monkeypatch.setattr(statistics, "create_extractor", lambda config, device: extractor)
    return config_of(eval__nearest=0)


def features_of(array):
    return array.reshape(len(array), -1) / 127.5 - 1


def test_a_written_reference_is_read_back_with_its_features(tmp_path):
    statistics = measure_source(ArrayImages(images(), "random"), EXTRACTOR, 7, ALONE)
    write_statistics(tmp_path / "x.npz", statistics, EXTRACTOR)
    back = read_statistics(tmp_path / "x.npz", EXTRACTOR)
    assert all(torch.equal(getattr(back, part), getattr(statistics, part)) for part in ("mu", "sigma", "features"))
    np.testing.assert_allclose(back.sigma, np.cov(features_of(images()), rowvar=False), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["x.npz", "folder"])
def test_images_as_target_are_measured(tmp_path, form):
    np.savez(tmp_path / "x.npz", images=images())
    write_folder(tmp_path / "folder", {f"{number:02}.png": png(image) for number, image in enumerate(images())})
    found = reference(tmp_path / form).statistics
    np.testing.assert_allclose(found.mu, features_of(images()).mean(0), atol=1e-6)
    assert found.count == 30


def test_without_a_target_pixels_are_compared_with_the_training_images(monkeypatch):
    training = types.SimpleNamespace(images=images(), source="training images", cache=None)
    monkeypatch.setattr(statistics, "load_images", lambda config: training)
    found = reference("")
    np.testing.assert_allclose(found.statistics.mu, features_of(images()).mean(0), atol=1e-6)
    assert found.identity["target"] == "training images"


def test_without_a_target_cifar10_is_compared_with_clean_fids_train_statistics(tmp_path, inception):
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    np.savez(cache / "cifar10_legacy_tensorflow_train_32.npz", mu=np.full(16, 0.5), sigma=np.eye(16))
    found = reference("", inception).statistics
    assert found.mu[0] == 0.5
    assert found.name == CIFAR10_NAME


@pytest.mark.parametrize("change", [{"data.image_size": 64}, {"data.num_channels": 1}, {"data.dataset": "custom"},
                                    {"data.train_subset": "cat"}, {"sampling.train_subset": "cat"}])
def test_data_sets_without_published_statistics_and_other_forms_of_cifar10_need_a_target(inception, change):
    (field, value), = change.items()
    set_field(inception, field, value)
    with pytest.raises(UserError, match=f"{value}.*--target_path" if value == "cat" else "--target_path"):
        reference("", inception)


@pytest.mark.parametrize("change", [{"image_size": 2, "num_channels": 4}, {"dataset": "digits"}])
def test_a_reference_to_other_data_is_another_reference(monkeypatch, change):
    """Its identity decides whether a result is computed again."""
    monkeypatch.setattr(statistics, "load_images", lambda config: types.SimpleNamespace(
        images=images(), source=config.data.dataset, cache=None))
    config, other = small_config(), small_config()
    config.eval.nearest = other.eval.nearest = 3
    other.data.update(change)
    assert reference("", config).identity == reference("", config).identity
    assert reference("", config).identity != reference("", other).identity


def test_statistics_of_another_dimension_or_extractor_are_refused(tmp_path):
    np.savez(tmp_path / "large.npz", mu=np.zeros(20), sigma=np.eye(20))
    np.savez(tmp_path / "other.npz", mu=np.zeros(16), sigma=np.eye(16), extractor="inception")
    for name, holds in (("large.npz", "20 features, but"), ("other.npz", "16 features of inception, but")):
        with pytest.raises(UserError, match=f"{name} holds statistics of {holds} .* pixels has 16"):
            read_statistics(tmp_path / name, EXTRACTOR)


def write_npz(path, damage):
    """Write statistics of 16 numbers, damaged in one way."""
    arrays = {"mu": np.zeros(16), "sigma": np.eye(16), "features": np.zeros((9, 16)), "count": np.array(9)}
    save = np.savez_compressed if damage == "deflate" else np.savez
    change = {"no mu": {"mu": None}, "vector": {"sigma": np.ones(16)}, "negative": {"sigma": -np.eye(16)},
              "asymmetric": {"sigma": np.eye(16) + np.eye(16, k=1)}, "NaN": {"features": np.full((9, 16), np.nan)},
              "narrow": {"features": np.zeros((9, 4))}, "words": {"mu": np.array(["a"] * 16)},
              "objects": {"mu": np.array([None] * 16)}}.get(damage, {})
    arrays = {name: array for name, array in (arrays | change).items() if array is not None}
    save(path, **arrays)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "deflate":
        content[60:80] = bytes(20)
    elif damage == "encrypted":  # the flag in the headers, local and central
        for header, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            for found in re.finditer(header, bytes(content)):
                content[found.start() + place] |= 1
    elif damage == "text":
        content = b"no npz"
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["no mu", "vector", "negative", "asymmetric", "NaN", "narrow", "words",
                                    "objects", "cut", "deflate", "encrypted", "text"])
def test_files_that_are_no_statistics_are_refused_by_name(tmp_path, damage):
    write_npz(tmp_path / "x.npz", damage)
    with pytest.raises(UserError, match=r"x\.npz"):
        _ = reference(tmp_path / "x.npz").statistics


def test_mu_and_sigma_alone_and_other_number_types_are_read(tmp_path):
    np.savez(tmp_path / "edm.npz", mu=np.full(16, 3, ">f4"), sigma=np.eye(16).astype(np.longdouble))
    found = reference(tmp_path / "edm.npz").statistics
    assert found.features is None and found.mu[0] == 3
    assert torch.equal(found.sigma, torch.eye(16, dtype=torch.float64))
    write_npz(tmp_path / "x.npz", "nothing")
    assert len(reference(tmp_path / "x.npz").statistics.features) == 9


@pytest.mark.parametrize("name", ["x.npz", "absent.npz"])
def test_a_named_pipe_is_no_reference(tmp_path, name):
    os.mkfifo(tmp_path / "x.npz")
    with pytest.raises(UserError, match=rf"{name} is neither a file"):
        reference(tmp_path / name)
