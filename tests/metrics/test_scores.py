"""Kernel distance, precision, recall and Inception score against clean-fid, brute force and closed forms."""

import math

import numpy as np
import pytest
import torch
from cleanfid.fid import kernel_distance as clean_fid_kernel_distance
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.scores import inception_score, kernel_distance, precision_recall


def features(seed, count, dimension=12, offset=0.0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, dimension)) + offset).float()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), count=st.integers(2, 60), offset=st.floats(0, 2))
def test_the_kernel_distance_of_whole_sets_is_that_of_clean_fid(seed, count, offset):
    """With subsets as large as the sets, every subset is the whole set: no chance is left."""
    one, two = features(seed, count), features(seed + 1, count, offset=offset)
    ours = kernel_distance(one, two, torch.Generator().manual_seed(0), subsets=2)
    theirs = clean_fid_kernel_distance(one.double().numpy(), two.double().numpy(), num_subsets=2)
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_the_kernel_distance_of_subsets_agrees_with_clean_fid_within_its_spread_and_repeats_itself():
    one, two = features(0, 400), features(1, 300, offset=0.3)
    first, again = (kernel_distance(one, two, torch.Generator().manual_seed(3), subset_size=100) for _ in range(2))
    assert first == again
    theirs = clean_fid_kernel_distance(one.numpy(), two.numpy(), max_subset_size=100)
    assert first == pytest.approx(theirs, rel=0.15)


def brute_force_share(queries, points, k):
    """Share of queries that lie in some ball around a point, reaching to its k-th other point."""
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    radii = np.sort(distance, axis=1)[:, k]
    inside = np.linalg.norm(queries[:, None] - points[None], axis=2) <= radii
    return inside.any(1).mean()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), m=st.integers(5, 40), n=st.integers(5, 40), offset=st.floats(0, 3))
def test_precision_and_recall_are_shares_inside_balls_to_the_third_neighbour(seed, m, n, offset):
    samples, reference = features(seed, m, 3, offset).double(), features(seed + 1, n, 3).double()
    precision, recall = precision_recall(samples, reference, chunk=7)
    assert precision == pytest.approx(brute_force_share(samples.numpy(), reference.numpy(), 3))
    assert recall == pytest.approx(brute_force_share(reference.numpy(), samples.numpy(), 3))


def test_samples_far_from_the_data_have_no_precision_and_no_recall():
    assert precision_recall(features(0, 50), features(1, 50, offset=100.0)) == (0.0, 0.0)
    assert precision_recall(features(0, 50), features(0, 50)) == (1.0, 1.0)


def test_the_inception_score_is_one_for_equal_predictions_and_the_class_count_for_certain_ones():
    equal = torch.full((100, 8), 1 / 8)
    certain = torch.eye(8).repeat(20, 1)
    assert inception_score(equal) == pytest.approx((1.0, 0.0), abs=1e-6)
    assert inception_score(certain, splits=2) == pytest.approx((8.0, 0.0), abs=1e-6)


def test_the_inception_score_is_the_mean_over_stretches_of_the_definition():
    p = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(5), 40))
    expected = []
    for part in p.numpy().reshape(4, 10, 5):
        marginal = part.mean(0)
        expected.append(math.exp(np.mean(np.sum(part * (np.log(part) - np.log(marginal)), axis=1))))
    assert inception_score(p, splits=4) == pytest.approx((np.mean(expected), np.std(expected)))
