"""The Fréchet distance against clean-fid's, against closed forms, and where `sqrtm` fails."""

import warnings

import numpy as np
import pytest
import torch
from cleanfid.fid import frechet_distance as clean_fid_distance
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.frechet import frechet_distance
from runtime.errors import UserError


def gaussian(generator, dimension, samples, scale=1.0):
    """Mean and covariance of random correlated features."""
    mixing = generator.standard_normal((dimension, dimension))
    features = generator.standard_normal((samples, dimension)) @ mixing * scale + generator.standard_normal(dimension)
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), dimension=st.integers(2, 60), scale=st.floats(1e-2, 1e2))
def test_the_distance_is_that_of_clean_fid_on_well_conditioned_statistics(seed, dimension, scale):
    generator = np.random.default_rng(seed)
    one, two = (gaussian(generator, dimension, 20 * dimension, scale) for _ in range(2))
    assert frechet_distance(*one, *two) == pytest.approx(clean_fid_distance(*one, *two), rel=1e-6)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), dimension=st.integers(4, 60), samples=st.integers(2, 12))
def test_the_distance_stays_real_and_non_negative_when_there_are_fewer_samples_than_features(seed, dimension, samples):
    generator = np.random.default_rng(seed)
    one, two = (gaussian(generator, dimension, samples) for _ in range(2))
    distance = frechet_distance(*one, *two)
    assert isinstance(distance, float)
    assert 0 <= distance < np.inf
    # it lies between the distance of the means and what independent Gaussians would have
    gap = np.square(one[0] - two[0]).sum()
    assert gap * (1 - 1e-9) <= distance <= (gap + np.trace(one[1]) + np.trace(two[1])) * (1 + 1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), dimension=st.integers(1, 40), samples=st.integers(2, 60))
def test_statistics_have_no_distance_to_themselves_and_the_same_both_ways(seed, dimension, samples):
    generator = np.random.default_rng(seed)
    one, two = (gaussian(generator, dimension, samples) for _ in range(2))
    assert frechet_distance(*one, *one) <= 1e-7 * np.trace(one[1])
    assert frechet_distance(*one, *two) == pytest.approx(frechet_distance(*two, *one), rel=1e-9)


def test_a_singular_product_on_which_sqrtm_gives_complex_numbers_or_a_failure_gives_the_exact_distance():
    """Σ₁ and Σ₂ share half of their directions; the shared part has a distance in closed form."""
    dimension, shared = 400, 100
    spread1 = np.r_[np.full(shared, 4.0), np.full(150, 1.0), np.zeros(150)]
    spread2 = np.r_[np.full(shared, 9.0), np.zeros(150), np.full(150, 1.0)]
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((dimension, dimension)))[0]
    sigma1, sigma2 = (rotation * spread @ rotation.T for spread in (spread1, spread2))
    mean = np.zeros(dimension)
    exact = np.square(np.sqrt(spread1) - np.sqrt(spread2)).sum()
    assert frechet_distance(mean, sigma1, mean, sigma2) == pytest.approx(exact, rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            other = clean_fid_distance(mean, sigma1, mean, sigma2)
        except ValueError:  # "Imaginary component"
            return
    assert abs(other - exact) >= abs(frechet_distance(mean, sigma1, mean, sigma2) - exact)


def test_diagonal_gaussians_have_the_distance_of_their_roots():
    mu1, mu2 = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0])
    sigma1, sigma2 = torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([9.0, 0.0]))
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(4 + (1 - 3) ** 2 + 2**2)


def test_statistics_of_different_dimensions_are_refused():
    with pytest.raises(UserError, match="different dimensions"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))


def test_statistics_with_nan_are_refused():
    with pytest.raises(UserError, match="NaN"):
        frechet_distance(np.zeros(2), np.diag([1.0, np.nan]), np.zeros(2), np.eye(2))
