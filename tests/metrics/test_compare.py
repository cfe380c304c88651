"""All metrics of a set of samples: names, what is not available, and the warning about few samples."""

import pytest
import torch

from metrics.compare import compare
from metrics.features import INCEPTION_NAMES, FeatureExtractor, pixel_extractor
from metrics.statistics import Statistics, measure

DIMENSION = 6


def statistics_of(seed, count, with_features=True):
    images = torch.randint(0, 256, (count, 1, 2, 3), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    found = measure([images], pixel_extractor(DIMENSION), 0, count, "cpu", "random")
    return found if with_features else Statistics(found.mu, found.sigma, None, None, "mu and sigma")


def inception_like():
    weight = torch.randn(4, DIMENSION, generator=torch.Generator().manual_seed(0))
    return FeatureExtractor("inception", DIMENSION, lambda images: images, lambda f: (f @ weight.T).softmax(1),
                            INCEPTION_NAMES, "a stand-in")


def test_every_metric_has_its_value_when_the_reference_has_features():
    found = compare(statistics_of(0, 50), statistics_of(1, 40), inception_like(), "cpu", seed=1)
    assert set(found) == {"fid", "kid", "precision", "recall", "inception_score", "inception_score_std"}
    assert all(value is not None for value in found.values())


def test_metrics_that_need_reference_features_are_none_without_them():
    found = compare(statistics_of(0, 50), statistics_of(1, 40, with_features=False), inception_like(), "cpu", seed=1)
    assert found["kid"] is found["precision"] is found["recall"] is None
    assert found["fid"] > 0
    assert found["inception_score"] > 1


def test_pixel_metrics_carry_pixel_names_and_no_inception_score():
    found = compare(statistics_of(0, 50), statistics_of(1, 40), pixel_extractor(DIMENSION), "cpu", seed=1)
    assert all(name.startswith("pixel_") for name in found)
    assert len(found) == 4


@pytest.mark.parametrize(("count", "warned"), [(DIMENSION, True), (DIMENSION + 1, False)])
def test_fewer_samples_than_the_covariance_needs_are_warned_of_with_the_bias(capsys, count, warned):
    compare(statistics_of(0, count), statistics_of(1, 40), pixel_extractor(DIMENSION), "cpu", seed=1)
    assert ("comes out too large" in capsys.readouterr().err) is warned
