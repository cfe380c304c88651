"""Nearest training images against brute force; a copy has distance zero."""

import numpy as np
import torch

from metrics.neighbours import leave_one_out_distances, nearest_distances


def images(seed, count):
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 5, 5), dtype=np.uint8)


def brute_force(queries, data):
    flat = [a.reshape(len(a), -1) / 127.5 - 1 for a in (queries, data)]
    return np.linalg.norm(flat[0][:, None] - flat[1][None], axis=2)


def test_the_nearest_image_is_found_across_chunks():
    queries, data = images(0, 9), images(1, 50)
    found = nearest_distances(torch.from_numpy(queries), data, chunk=7)
    np.testing.assert_allclose(found, brute_force(queries, data).min(1), rtol=1e-5)


def test_a_copied_image_has_distance_zero_exactly():
    data = images(2, 30)
    assert nearest_distances(torch.from_numpy(data[[3, 17]]), data, chunk=8).tolist() == [0.0, 0.0]


def test_real_images_are_compared_with_every_other_image_but_not_with_themselves():
    data = images(3, 40)
    distance = brute_force(data, data)
    np.fill_diagonal(distance, np.inf)
    found = leave_one_out_distances(data, 40, "cpu")
    np.testing.assert_allclose(found, distance.min(1), rtol=1e-5)
    some = leave_one_out_distances(data, 4, "cpu")
    np.testing.assert_allclose(some, distance.min(1)[[0, 10, 20, 30]], rtol=1e-5)


def test_a_repeated_real_image_counts_as_a_neighbour_of_its_twin():
    data = np.concatenate([images(4, 10), images(4, 10)[:1]])
    assert leave_one_out_distances(data, 11, "cpu")[0] == 0
