"""Streaming statistics against numpy's over everything at once."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from metrics.features import FeatureExtractor, pixel_extractor
from metrics.statistics import evenly_spread, measure, quantise


def moments(features, size, device="cpu"):
    """Mean and covariance that `measure` finds of features (N, D) that come in batches of `size`."""
    own = FeatureExtractor("own", features.shape[1], lambda rows: rows, None, {}, "")
    found = measure(features.split(size), own, 0, len(features), device, "features")
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


def test_measuring_does_not_depend_on_the_batch_size_and_keeps_evenly_spread_features():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 1, 4, 4), dtype=np.uint8))
    extractor = pixel_extractor(16)
    whole = measure([images], extractor, 0, 50, "cpu", "whole", max_features=7)
    parts = measure(images.split(8), extractor, 0, 50, "cpu", "parts", max_features=7)
    torch.testing.assert_close(whole.mu, parts.mu, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.sigma, parts.sigma, rtol=1e-12, atol=1e-12)
    expected = extractor.features(images)[[0, 7, 14, 21, 28, 35, 42]]
    assert torch.equal(whole.features, expected)
    assert torch.equal(parts.features, expected)


def test_observers_see_every_image_once_with_its_number():
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1)
    seen = {}
    measure(images.split(3), pixel_extractor(1), 100, 10, "cpu", "seen",
            observers=[lambda first, part: seen.update({first + i: int(v) for i, v in enumerate(part.flatten())})])
    assert seen == {100 + i: i for i in range(10)}


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
