"""The path between noise and data, the network as a velocity, and the closed-form velocity of a finite data set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.rectified_flow import analytic_velocity, interpolate, point_on_path, velocity_from_network
from tests.flows.flows_with_solutions import noise

Z0, Z1 = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3))
def test_a_path_point_is_the_weighted_sum_of_its_ends(places):
    a = torch.tensor(places)
    expected = torch.stack([p * one + (1 - p) * zero for p, one, zero in zip(places, Z1, Z0, strict=True)])
    assert torch.allclose(interpolate(Z0, Z1, a), expected, atol=1e-6)


def test_both_ends_of_a_path_are_exact():
    assert torch.equal(interpolate(Z0, Z1, torch.zeros(3)), Z0)
    assert torch.equal(interpolate(Z0, Z1, torch.ones(3)), Z1)
    assert torch.equal(interpolate(Z0, Z1, 0.0), Z0)


def test_a_point_leads_to_the_image_with_the_target_velocity():
    a = torch.tensor([0.1, 0.5, 0.9])
    point = point_on_path(Z0, Z1, torch.tensor([0.2, 0.3, 0.4]), a)
    assert torch.allclose(point.z0 + point.target, Z1, atol=1e-6)
    assert torch.allclose(point.x_t + (1 - a).view(-1, 1, 1, 1) * point.target, Z1, atol=1e-6)
    assert point.t.tolist() == torch.tensor([0.2, 0.3, 0.4]).tolist()


def test_a_network_is_called_with_999_t_and_the_label():
    seen = []

    def net(x, t999, label):
        seen.append((t999, label))
        return 2 * x

    velocity, label = velocity_from_network(net), torch.eye(3)
    assert torch.equal(velocity(Z0, torch.tensor([0.0, 0.5, 1.0]), label), 2 * Z0)
    velocity(Z0, torch.full((3,), 0.5))
    assert seen[0][0].tolist() == [0.0, 499.5, 999.0] and seen[0][1] is label
    assert seen[1][0].tolist() == [499.5] * 3 and seen[1][1] is None


# The closed-form velocity


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
    data, x = noise(count, 2, 3, 3, dtype=torch.float64).clamp(-1, 1), noise(4, 2, 3, 3, seed=1, dtype=torch.float64)
    times = torch.tensor([t, 0.5, 0.0, 0.9], dtype=torch.float64)
    v = analytic_velocity(data, chunk)(x, times)
    torch.testing.assert_close(v, by_definition(data, x, times), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", [0.0, 0.5, 1 - 1e-3])
def test_float32_with_uint8_images_is_finite_and_exact_up_to_the_data(t):
    data, x = (60 * noise(50, 3, 8, 8, seed=2) + 128).clamp(0, 255).byte(), noise(4, 3, 8, 8, dtype=torch.float64)
    on_path = t * (data[:4].double() / 127.5 - 1) + (1 - t) * x
    time = torch.full((4,), t, dtype=torch.float32)
    v = analytic_velocity(data, 16)(on_path.float(), time)
    assert v.dtype == torch.float32 and v.shape == on_path.shape
    expected = by_definition(data.double() / 127.5 - 1, on_path.float().double(), time.double())
    torch.testing.assert_close(v.double(), expected, rtol=1e-5, atol=1e-4)
