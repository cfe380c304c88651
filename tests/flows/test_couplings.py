"""Couplings: each direction pairs the right noise with the right image, and none waits on idle slots."""

import types

import numpy as np
import pytest
import torch

from configs.default import get_default_config
from flows.couplings import create_coupling
from flows.runge_kutta import rk45
from runtime.seeds import index_noise
from tests.flows.flows_with_solutions import gaussian_flow, gaussian_velocity, tiny_network

SHAPE = (2, 4, 4)


def initial_points(z1=lambda indices: gaussian_flow(index_noise(1, indices, SHAPE))):
    """Noise and images by number, without classes."""
    return types.SimpleNamespace(z0=lambda indices: index_noise(0, indices, SHAPE), z1=z1, label=lambda indices: None)


def make(direction, count=12, velocity=gaussian_velocity, **fields):
    """Return (z0, z1, label, nfe) of the first pairs, and how many were reported as done."""
    config = get_default_config()
    config.sampling.direction, config.sampling.ode_tol, config.training.batch_size = direction, 1e-6, 4
    config.flow.eps = 1e-5
    for name, value in fields.items():
        config.sampling[name] = value
    done = []
    return *create_coupling(config, velocity, initial_points(), "cpu")(range(count), done.append), sum(done)


def test_noise_is_taken_to_the_image_it_flows_to():
    z0, z1, label, nfe, done = make("from_z0")
    assert torch.equal(z0, index_noise(0, range(12), SHAPE)) and label is None
    torch.testing.assert_close(z1, gaussian_flow(z0), atol=1e-4, rtol=0)
    assert nfe.shape == (12,) and (nfe > 0).all() and done == 12


def test_an_image_is_taken_back_to_the_noise_that_flows_to_it():
    z0, z1, _, _, done = make("from_z1")
    assert torch.equal(z1, gaussian_flow(index_noise(1, range(12), SHAPE))) and done == 12
    torch.testing.assert_close(gaussian_flow(z0), z1, atol=1e-4, rtol=0)


def test_random_pairs_are_noise_and_image_of_the_same_number():
    z0, z1, _, nfe, done = make("random_paired", velocity=None)
    assert torch.equal(z0, index_noise(0, range(12), SHAPE)) and done == 12
    assert torch.equal(z1, gaussian_flow(index_noise(1, range(12), SHAPE))) and nfe.sum() == 0


@pytest.mark.parametrize("eps", [1e-3, 1e-2])
def test_the_closed_form_ends_before_its_singularity_and_starts_on_the_path_backwards(eps):
    config, seen = get_default_config(), []
    config.sampling.ode_tol, config.training.batch_size, config.flow.eps = 1e-3, 4, eps

    def velocity(x, t, label=None):
        seen.append((t.max().item(), x.clone()))
        return gaussian_velocity(x, t)

    config.sampling.direction = "gt_v_from_z0"
    create_coupling(config, velocity, initial_points(), "cpu")(range(4), lambda count: None)
    assert max(t for t, _ in seen) == pytest.approx(1 - eps, abs=1e-6)
    seen.clear()
    config.sampling.direction = "gt_v_from_z1"
    _, z1, _, _ = create_coupling(config, velocity, initial_points(), "cpu")(range(4), lambda count: None)
    assert seen[0][0] == pytest.approx(1 - eps, abs=1e-6)
    torch.testing.assert_close(seen[0][1], (1 - eps) * z1 + eps * index_noise(0, range(4), SHAPE))


def test_a_sample_that_needs_noise_on_the_way_gets_that_of_its_number():
    z0, z1, _, _, _ = make("from_z0", use_ode_sampler="cm_stochastic", sample_N=3)
    config = get_default_config()
    config.sampling.direction, config.sampling.use_ode_sampler, config.sampling.sample_N = "from_z0", "cm_stochastic", 3
    config.flow.eps = 1e-5
    later = create_coupling(config, gaussian_velocity, initial_points(), "cpu")(range(8, 12), lambda count: None)
    assert torch.equal(later[1], z1[8:])


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
    again, _ = rk45(velocity, z, label, tol=1e-4, slots=8, shrink_slots=True)
    assert torch.equal(again, narrow)
