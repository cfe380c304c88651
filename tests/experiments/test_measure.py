"""The measure of the studies: halves that share nothing, a classifier of use, distances that mean something."""

import numpy as np
import pytest
import torch

from experiments.images import Classifier, load_classifier, write_archives
from experiments.measure import Yardstick, gaussian
from experiments.steps import DIGITS


@pytest.fixture(scope="module")
def yardstick():
    torch.set_num_threads(1)
    return Yardstick(DIGITS)


def test_no_image_is_both_trained_on_and_held_out(yardstick):
    halves = yardstick.halves
    assert (len(halves.train), len(halves.held_out)) == (899, 898)
    train = {image.tobytes() for image in halves.train}
    assert sum(image.tobytes() in train for image in halves.held_out) == 0


def test_the_committed_classifier_is_the_one_its_accuracy_speaks_of(yardstick):
    found = (yardstick.classifier.classes(yardstick.halves.held_out) == yardstick.halves.held_out_labels).mean()
    assert found == pytest.approx(yardstick.classifier.accuracy, abs=2e-3) and found > 0.93


def test_a_missing_classifier_is_trained_and_kept(yardstick, tmp_path):
    made = load_classifier(DIGITS, yardstick.halves, tmp_path)
    again = load_classifier(DIGITS, yardstick.halves, tmp_path)
    assert made.accuracy == again.accuracy > 0.9
    np.testing.assert_array_equal(made.features(yardstick.halves.held_out), again.features(yardstick.halves.held_out))
    assert made.features(yardstick.halves.held_out[:3]).shape == (3, 64)


def test_features_are_those_of_the_fitted_perceptron(yardstick):
    from sklearn.neural_network import MLPClassifier

    few = yardstick.halves.train[:200]
    fitted = MLPClassifier((128, 64), random_state=0, max_iter=20).fit(few.reshape(200, -1) / 255,
                                                                       yardstick.halves.train_labels[:200])
    ours = Classifier(fitted.coefs_, fitted.intercepts_, 0.0)
    np.testing.assert_array_equal(ours.classes(few), fitted.predict(few.reshape(200, -1) / 255))


def test_real_images_are_nearer_than_noise_and_copies_show(yardstick):
    found = yardstick.references()
    real, replayed = found["real against real"], found["training images replayed"]
    noise = np.random.default_rng(0).integers(0, 256, (898, 1, 8, 8)).astype(np.uint8)
    measured = yardstick.measure(noise)
    assert replayed["nearest"] == 0 < real["nearest"] < measured["nearest"]
    for name in ("feature_distance", "pixel_distance"):
        assert 0 < real[name] < replayed[name] < 0.1 * measured[name]
    assert yardstick.measure(np.array(yardstick.halves.held_out))["feature_distance"] == pytest.approx(0, abs=1e-6)


def test_groups_are_averaged_and_not_pooled(yardstick):
    halves = yardstick.halves
    first, second = halves.train[:898], halves.held_out
    single = [yardstick.measure(np.array(part))["pixel_distance"] for part in (first, second)]
    both = yardstick.measure(np.concatenate([first, second]))["pixel_distance"]
    assert both == pytest.approx(np.mean(single))
    with pytest.raises(ValueError, match="reshape"):
        yardstick.measure(np.array(first[:100]))


def test_gaussian_is_mean_and_covariance():
    rows = np.random.default_rng(0).normal(size=(50, 3))
    mean, covariance = gaussian(rows)
    np.testing.assert_allclose(mean, rows.mean(0))
    np.testing.assert_allclose(covariance, (rows - mean).T @ (rows - mean) / 49)


def test_archives_hold_the_images_and_are_written_once(yardstick, tmp_path):
    from configs.rectified_flow.digits_rf_gaussian import get_config
    from datasets import load_images

    write_archives(tmp_path, yardstick.halves)
    written = (tmp_path / "train.zip").stat().st_mtime_ns
    write_archives(tmp_path, yardstick.halves)
    assert (tmp_path / "train.zip").stat().st_mtime_ns == written
    config = get_config()
    config.data.dataset, config.data.data_root = "custom", str(tmp_path / "held_out.zip")
    config.data.cache_dir = str(tmp_path / "cache")
    np.testing.assert_array_equal(load_images(config).images, yardstick.halves.held_out)
