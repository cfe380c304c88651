"""Noise belongs to (seed, index): no company, order or number of threads changes it."""

import numpy as np
import pytest
import torch

from runtime import seeds


@pytest.mark.parametrize("threads", [1, 3])
def test_noise_of_an_index_is_that_of_its_own_generator_in_any_company_and_any_number_of_threads(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(seeds, "PARALLEL_VALUES", 1)
    indices = [7, 0, 7, 2**40, 3]
    noise = seeds.index_noise(2**64 - 1, indices, (3, 5, 5), seeds.EVALUATION)
    for row, index in zip(noise.numpy(), indices, strict=True):
        alone = seeds.index_generator(2**64 - 1, index, seeds.EVALUATION)
        np.testing.assert_array_equal(row, alone.standard_normal((3, 5, 5), dtype=np.float32))
    assert seeds.index_noise(0, range(0), (3, 5, 5)).shape == (0, 3, 5, 5)
