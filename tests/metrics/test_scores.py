"""Every metric against clean-fid, brute force and closed forms; and all of them together."""

import math
import types

import numpy as np
import pytest
import scipy.linalg
import torch
from cleanfid.fid import kernel_distance as clean_fid_kernel_distance
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics import scores
from metrics.features import INCEPTION_NAMES, PixelExtractor
from metrics.scores import compare, frechet_distance, inception_score, kernel_distance, nearest_distances
from metrics.statistics import Statistics, measure
from runtime.terminal import UserError
from tests.helpers import ALONE, tf32


def gaussian(generator, dimension, samples, scale=1.0):
    """Mean and covariance of random correlated features."""
    mixing = generator.standard_normal((dimension, dimension))
    features = generator.standard_normal((samples, dimension)) @ mixing * scale + generator.standard_normal(dimension)
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def distance_by_matrix_root(mu1, sigma1, mu2, sigma2):
    """The formula as clean-fid and others compute it: scipy's root of the product, its imaginary part dropped."""
    root = np.real(scipy.linalg.sqrtm(sigma1 @ sigma2))
    return np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), dimension=st.integers(2, 60), scale=st.floats(1e-2, 1e2))
def test_the_distance_is_that_of_the_matrix_root_on_well_conditioned_statistics(seed, dimension, scale):
    generator = np.random.default_rng(seed)
    one, two = (gaussian(generator, dimension, 20 * dimension, scale) for _ in range(2))
    assert frechet_distance(*one, *two) == pytest.approx(distance_by_matrix_root(*one, *two), rel=1e-6)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), dimension=st.integers(1, 60), samples=st.integers(2, 60))
def test_the_distance_is_real_symmetric_and_within_its_bounds_even_of_few_samples(seed, dimension, samples):
    generator = np.random.default_rng(seed)
    one, two = (gaussian(generator, dimension, samples) for _ in range(2))
    distance = frechet_distance(*one, *two)
    assert isinstance(distance, float)
    assert 0 <= distance < np.inf
    # it lies between the distance of the means and what independent Gaussians would have
    gap = np.square(one[0] - two[0]).sum()
    assert gap * (1 - 1e-9) <= distance <= (gap + np.trace(one[1]) + np.trace(two[1])) * (1 + 1e-9)
    assert frechet_distance(*one, *one) <= 1e-7 * np.trace(one[1])
    assert distance == pytest.approx(frechet_distance(*two, *one), rel=1e-9)


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


@pytest.mark.parametrize(("sigma", "says"), [
    (np.diag([1.0, np.nan]), "NaN"), (-np.eye(2), "negative eigenvalues"), (np.ones(2), r"sigma \(2,\)"),
    (np.array([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"), (np.array([[1.0, 2.0], [2.0, 1.0]]), "negative eigenvalues"),
])
def test_what_is_no_covariance_is_refused_on_either_side(sigma, says):
    for pair in ((sigma, np.eye(2)), (np.eye(2), sigma)):
        with pytest.raises(UserError, match=says):
            frechet_distance(np.zeros(2), pair[0], np.zeros(2), pair[1])


def test_a_covariance_that_was_rounded_to_float32_is_accepted():
    sigma = gaussian(np.random.default_rng(0), 60, 20)[1].astype(np.float32)
    sigma[3, 5] *= 1 + 2e-7
    assert frechet_distance(np.zeros(60), sigma, np.zeros(60), sigma) < 1e-4 * np.trace(sigma)


def features(seed, count, dimension=12, offset=0.0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, dimension)) + offset).float()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), count=st.integers(2, 60), offset=st.floats(0, 2))
def test_the_kernel_distance_of_whole_sets_is_that_of_clean_fid(seed, count, offset):
    """With subsets as large as the sets, every subset is the whole set: no chance is left. In float64, since float32
    products of far sets cancel to fewer digits."""
    one, two = features(seed, count).double(), features(seed + 1, count, offset=offset).double()
    ours = kernel_distance(one, two, torch.Generator().manual_seed(0), subsets=2)
    theirs = clean_fid_kernel_distance(one.numpy(), two.numpy(), num_subsets=2)
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-10)


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
    radii = scores.neighbour_radii(reference, "false", chunk=7)
    precision, recall = scores.precision_recall(samples, reference, radii, "false", chunk=7)
    assert precision == pytest.approx(brute_force_share(samples.numpy(), reference.numpy(), 3))
    assert recall == pytest.approx(brute_force_share(reference.numpy(), samples.numpy(), 3))


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


def images(seed, count):
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 5, 5), dtype=np.uint8)


def brute_force(queries, data):
    flat = [a.reshape(len(a), -1) / 127.5 - 1 for a in (queries, data)]
    return np.linalg.norm(flat[0][:, None] - flat[1][None], axis=2)


def test_the_nearest_image_is_found_across_chunks_and_a_copied_one_has_distance_zero_exactly():
    queries, data = images(0, 9), images(1, 50)
    found = nearest_distances(torch.from_numpy(queries), data, chunk=7)
    np.testing.assert_allclose(found, brute_force(queries, data).min(1), rtol=1e-5)
    assert nearest_distances(torch.from_numpy(data[[3, 17]]), data, chunk=8).tolist() == [0.0, 0.0]


def test_real_images_are_compared_with_every_other_image_a_repeated_one_too_but_not_with_themselves():
    data = images(3, 40)
    distance = brute_force(data, data)
    np.fill_diagonal(distance, np.inf)
    for places in (torch.arange(40), torch.tensor([0, 10, 20, 30])):
        found = nearest_distances(torch.from_numpy(data)[places], data, places, chunk=7)
        np.testing.assert_allclose(found, distance.min(1)[places], rtol=1e-5)
    repeated = np.concatenate([data, data[:1]])
    assert nearest_distances(torch.from_numpy(repeated), repeated, torch.arange(41))[0] == 0


DIMENSION = 6


def statistics_of(seed, count, with_features=True):
    images = torch.randint(0, 256, (count, 1, 2, 3), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    found = measure([images], PixelExtractor(DIMENSION), count, ALONE, "random")
    return found if with_features else Statistics(found.mu, found.sigma, None, None, "mu and sigma")


def inception_like():
    weight = torch.randn(4, DIMENSION, generator=torch.Generator().manual_seed(0))
    return types.SimpleNamespace(dimension=DIMENSION, probabilities=lambda f: (f @ weight.T).softmax(1),
                                 names=INCEPTION_NAMES)


def test_the_metrics_are_those_that_reference_and_extractor_allow():
    samples, reference, bare = statistics_of(0, 50), statistics_of(1, 40), statistics_of(1, 40, with_features=False)
    found = compare(samples, reference, inception_like(), 1, scores.neighbour_radii(reference.features))
    assert set(found) == {"fid", "kid", "precision", "recall", "inception_score", "inception_score_std"}
    assert all(value is not None for value in found.values())
    without = compare(samples, bare, inception_like(), seed=1)
    assert without["kid"] is without["precision"] is without["recall"] is None
    assert without["fid"] > 0 and without["inception_score"] > 1
    pixels = compare(samples, reference, PixelExtractor(DIMENSION), seed=1)
    assert len(pixels) == 4 and all(name.startswith("pixel_") for name in pixels)


@pytest.mark.parametrize(("count", "real", "warned"), [(DIMENSION, 40, "6 samples"), (DIMENSION + 1, 40, ""),
                                                       (40, DIMENSION, "6 reference images"), (40, None, "")])
def test_fewer_images_than_the_covariance_needs_are_warned_of_with_the_bias(capsys, count, real, warned):
    reference = statistics_of(1, real or 40, with_features=real is not None)  # of statistics the count is not known
    compare(statistics_of(0, count), reference, PixelExtractor(DIMENSION), seed=1)
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith(f"warning: {warned} for 6 features") if warned else said == ""


@pytest.mark.parametrize(("dimension", "said"), [
    (1024, "the Fréchet distance of 1024 features takes some seconds\n"), (8, "")])
def test_a_distance_that_takes_seconds_is_announced(capsys, monkeypatch, dimension, said):
    monkeypatch.setattr(scores, "frechet_distance", lambda *gaussians: 1.0)
    samples, reference = (Statistics(torch.zeros(dimension), torch.eye(dimension), features, None, "")
                          for features in (torch.zeros(1, dimension), None))
    extractor = types.SimpleNamespace(dimension=dimension, probabilities=None, names={"frechet": "fid"})
    assert compare(samples, reference, extractor, seed=1) == {"fid": 1.0}
    assert capsys.readouterr().err == said


def test_the_inception_score_does_not_depend_on_the_order_of_the_samples():
    """In order of their classes each split would hold one class and score 1."""
    certain = 50 * torch.eye(DIMENSION)[:4].repeat_interleave(50, 0)
    given = Statistics(torch.zeros(DIMENSION, dtype=torch.float64), torch.eye(DIMENSION, dtype=torch.float64),
                       certain, 200, "by class")
    extractor = types.SimpleNamespace(dimension=DIMENSION, probabilities=lambda f: f[:, :4].softmax(1),
                                      names=INCEPTION_NAMES)
    assert compare(given, given, extractor, seed=1)["inception_score"] > 3.5


def test_nearest_images_are_searched_in_float32_also_where_the_network_uses_tf32(monkeypatch):
    seen = []
    monkeypatch.setattr(scores, "pixel_features", lambda images: (
        seen.append(torch.backends.cuda.matmul.allow_tf32), images.flatten(1).float())[1])
    with tf32(True):
        nearest_distances(torch.from_numpy(images(0, 3)), images(1, 5))
    assert seen and not any(seen)
