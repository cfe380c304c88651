"""Couplings: each direction pairs the right noise with the right image, and none waits on idle slots."""

import types

import numpy as np
import pytest
import torch

from flows.runge_kutta import rk45
from flows.samplers import create_coupling
from runtime.seeds import index_noise
from tests.flows.flows_with_solutions import gaussian_flow, gaussian_velocity, tiny_network
from tests.helpers import config_of

SHAPE = (2, 4, 4)


Z0, IMAGES = index_noise(0, range(12), SHAPE), gaussian_flow(index_noise(1, range(12), SHAPE))
INITIAL_POINTS = types.SimpleNamespace(z0=Z0.__getitem__, z1=IMAGES.__getitem__, label=lambda indices: None)


def make(direction, numbers=range(12), velocity=gaussian_velocity, eps=1e-5, **fields):
    """Return (z0, z1, label, nfe) of pairs, and how many were reported as done."""
    fields = {"direction": direction, "ode_tol": 1e-6, **fields}
    config = config_of(training__batch_size=4, flow__eps=eps, **{f"sampling.{k}": v for k, v in fields.items()})
    done = []
    return *create_coupling(config, velocity, INITIAL_POINTS, "cpu")(list(numbers), done.append), sum(done)


def test_noise_is_taken_to_the_image_it_flows_to():
    z0, z1, label, nfe, done = make("from_z0")
    assert torch.equal(z0, Z0) and label is None
    torch.testing.assert_close(z1, gaussian_flow(z0), atol=1e-4, rtol=0)
    assert nfe.shape == (12,) and (nfe > 0).all() and done == 12


def test_an_image_is_taken_back_to_the_noise_that_flows_to_it():
    z0, z1, _, _, done = make("from_z1")
    assert torch.equal(z1, IMAGES) and done == 12
    torch.testing.assert_close(gaussian_flow(z0), z1, atol=1e-4, rtol=0)


def test_random_pairs_are_noise_and_image_of_the_same_number():
    z0, z1, _, nfe, done = make("random_paired", velocity=None)
    assert torch.equal(z0, Z0) and torch.equal(z1, IMAGES) and nfe.sum() == 0 and done == 12


@pytest.mark.parametrize("eps", [1e-3, 1e-2])
def test_the_closed_form_ends_before_its_singularity_and_starts_on_the_path_backwards(eps):
    seen = []

    def velocity(x, t, label=None):
        seen.append((t.max().item(), x.clone()))
        return gaussian_velocity(x, t)

    make("gt_v_from_z0", range(4), velocity, eps, ode_tol=1e-3)
    assert max(t for t, _ in seen) == pytest.approx(1 - eps, abs=1e-6)
    seen.clear()
    make("gt_v_from_z1", range(4), velocity, eps, ode_tol=1e-3)
    assert seen[0][0] == pytest.approx(1 - eps, abs=1e-6)
    torch.testing.assert_close(seen[0][1], (1 - eps) * IMAGES[:4] + eps * Z0[:4])


def test_a_sample_that_needs_noise_on_the_way_gets_that_of_its_number():
    all_images, later = (make("from_z0", numbers, use_ode_sampler="cm_stochastic", sample_N=3)[1]
                         for numbers in (range(12), range(8, 12)))
    assert torch.equal(later, all_images[8:])


def test_idle_slots_are_given_up_and_the_results_stay_within_the_tolerance():
    network, rows = tiny_network(), []

    def velocity(x, t, label=None):
        rows.append(len(x))
        return network(x, t, label)

    z, label = index_noise(3, range(21), SHAPE), torch.arange(21.0)[:, None] / 10
    wide, _ = rk45(velocity, z, label, tol=1e-4, slots=8)
    wide_rows = sum(rows)
    rows.clear()
    narrow, narrow_nfe = rk45(velocity, z, label, tol=1e-4, slots=8, shrink_slots=True)
    assert set(rows[:5]) == {8} and rows == sorted(rows, reverse=True) and rows[-1] < 8
    assert int(narrow_nfe.sum()) <= sum(rows) < wide_rows
    np.testing.assert_allclose(narrow, wide, atol=1e-3, rtol=1e-3)
