"""The path between noise and data, and the network as a velocity."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.rectified_flow import interpolate, point_on_path, velocity_from_network

Z0 = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
Z1 = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))


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
    velocity(Z0, 0.5)
    assert seen[0][0].tolist() == [0.0, 499.5, 999.0] and seen[0][1] is label
    assert seen[1][0].tolist() == [499.5] * 3 and seen[1][1] is None
