"""The closed-form velocity of a finite data set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.rectified_flow import analytic_velocity
from flows.runge_kutta import rk45
from flows.samplers import one_step

EPS = 1e-3


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pixels(count, *shape, seed=0):
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def by_definition(data, x, t):
    """The formula of the conditional mean, word for word, in float64."""
    velocities = []
    for x_n, t_n in zip(x, t, strict=True):
        exponents = -(x_n - t_n * data).square().flatten(1).sum(1) / (2 * (1 - t_n) ** 2)
        mean = torch.tensordot(torch.softmax(exponents, 0), data, 1)
        velocities.append((mean - x_n) / (1 - t_n))
    return torch.stack(velocities)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(1, 25), st.floats(0, 0.95))
def test_velocity_is_the_formula_for_any_chunk(count, chunk, t):
    data, x = noise(count, 2, 3, 3).clamp(-1, 1), noise(4, 2, 3, 3, seed=1)
    times = torch.tensor([t, 0.5, 0.0, 0.9], dtype=torch.float64)
    v = analytic_velocity(data, chunk)(x, times)
    torch.testing.assert_close(v, by_definition(data, x, times), rtol=1e-9, atol=1e-9)


def test_uint8_images_are_spread_over_minus_one_to_one():
    data, x, t = pixels(7, 1, 4, 4), noise(3, 1, 4, 4), torch.full((3,), 0.6, dtype=torch.float64)
    torch.testing.assert_close(analytic_velocity(data, 3)(x, t), analytic_velocity(data / 127.5 - 1.0)(x, t),
                               rtol=1e-5, atol=1e-5)


def test_one_image_is_reached_on_a_straight_trajectory():
    data, z = pixels(1, 1, 4, 4), noise(5, 1, 4, 4)
    x, _ = one_step(analytic_velocity(data), z, t_start=0.0)
    torch.testing.assert_close(x, (data.double() / 127.5 - 1).expand_as(x))


def test_flow_ends_at_images_of_the_data():
    data, z = pixels(10, 1, 3, 3), noise(20, 1, 3, 3)
    x, _ = rk45(analytic_velocity(data), z, t_end=1 - EPS, tol=1e-6, slots=20)
    distances = torch.cdist(x.flatten(1), data.double().flatten(1) / 127.5 - 1).amin(1)
    assert distances.max() < 4 * EPS * 3  # what is left of the noise, in 9 dimensions
    assert len(torch.cdist(x.flatten(1), data.double().flatten(1) / 127.5 - 1).argmin(1).unique()) > 1


def test_reverse_flow_of_points_on_the_path_is_normal_noise():
    data = pixels(40, 1, 2, 2)
    z1 = (data.double() / 127.5 - 1).repeat(15, 1, 1, 1)
    start = (1 - EPS) * z1 + EPS * noise(600, 1, 2, 2)
    z0, _ = rk45(analytic_velocity(data), start, t_start=1 - EPS, t_end=EPS, tol=1e-3, slots=600)
    assert abs(z0.mean().item()) < 0.07 and z0.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("t", [0.0, 0.5, 1 - EPS])
def test_float32_close_to_the_data_is_finite_and_as_exact_as_its_time(t):
    data, x = pixels(50, 3, 8, 8), noise(4, 3, 8, 8)
    on_path = t * (data[:4].double() / 127.5 - 1) + (1 - t) * x
    time = torch.full((4,), t, dtype=torch.float32)
    v = analytic_velocity(data, 16)(on_path.float(), time)
    assert v.dtype == torch.float32 and v.shape == on_path.shape
    expected = by_definition(data.double() / 127.5 - 1, on_path.float().double(), time.double())
    torch.testing.assert_close(v.double(), expected, rtol=1e-5, atol=1e-4)
