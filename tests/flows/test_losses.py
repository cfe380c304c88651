"""Distances and weights against closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flows import losses
from flows.losses import WEIGHTS, create_distance
from flows.rectified_flow import point_on_path

EPS = 1e-3
Z0 = torch.tensor([[[[1.0, -1.0], [0.5, 0.0]]]])
Z1 = torch.tensor([[[[0.0, 1.0], [0.5, 2.0]]]])
DELTA = torch.tensor([[[[3.0, -4.0], [0.0, 0.0]]]])  # predicted minus true velocity: 25 its squared norm, d = 4


def point(t=0.25, alpha=0.25):
    return point_on_path(Z0, Z1, torch.tensor([t]), torch.tensor([alpha]))


@pytest.fixture
def references(monkeypatch):
    """The references that LPIPS is given; it is replaced by the squared distance."""
    seen = []

    def squared(image, reference):
        seen.append(reference)
        return (image - reference).square().sum(dim=(1, 2, 3))

    monkeypatch.setattr(losses, "load_lpips", lambda device: squared)
    return seen


@pytest.mark.parametrize(("loss_type", "reduce_mean", "value"), [
    ("l2", True, 25 / 4), ("l2", False, 25 / 2), ("l1", True, 7 / 4), ("l1", False, 7 / 2),
    ("huber", True, (math.sqrt(25 + 0.00216**2) - 0.00216) / 4), ("huber", False, 1.2494601166),
])
def test_velocity_distances_have_their_closed_form_without_lpips(loss_type, reduce_mean, value, monkeypatch):
    monkeypatch.setattr(losses, "load_lpips", None)
    distance = create_distance(loss_type, reduce_mean)
    assert distance(point().target + DELTA, point()).tolist() == pytest.approx([value], rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-9, 1e3), st.integers(1, 3))
def test_pseudo_huber_is_exact_for_any_size_of_error(size, channels):
    """In float32 the textbook form loses all digits where the error is far below c."""
    delta = torch.full((1, channels, 4, 4), size)
    zero = torch.zeros_like(delta)
    found = create_distance("huber")(delta, point_on_path(zero, zero, torch.ones(1), torch.ones(1)))
    d = 16 * channels
    c, norm = 0.00054 * d, delta.double().norm().item()
    assert found.item() == pytest.approx(norm**2 / (math.hypot(norm, c) + c) / d, rel=1e-5)


def test_pseudo_huber_has_a_zero_gradient_at_no_error():
    v = point().target.clone().requires_grad_()
    create_distance("huber")(v, point()).sum().backward()
    assert torch.equal(v.grad, torch.zeros_like(v))


@pytest.mark.parametrize(("loss_type", "value"), [
    # one step from the start of the path: the images differ by Δ
    ("lpips", 25), ("lpips+l2", 25 + 25 / 4), ("lpips+l1", 25 + 7 / 4),
    # one step from x_t: they differ by (1-α)·Δ, α = 0.25; t = 0.2; both forms weight Huber by t
    ("lpips+huber", 0.2 * 1.2494601166 + 25 * 0.75**2), ("lpips/1mt+huber", 0.2 * 1.2494601166 + 25 * 0.75**2 / 0.8),
])
def test_image_distances_compare_the_image_they_lead_to_with_the_true_one(loss_type, value, references):
    for reduce_mean in (True, False):  # a mixed form always takes the mean
        distance = create_distance(loss_type, reduce_mean)
        found = distance(point().target + DELTA, point(t=0.2, alpha=0.25))
        assert found.tolist() == pytest.approx([value], rel=1e-6) and torch.allclose(references[-1], Z1)


def test_lpips_divided_by_one_minus_t_is_finite_at_the_image(references):
    found = create_distance("lpips/1mt+huber")(point().target + DELTA, point(t=1.0, alpha=1.0))
    assert found.isfinite().all()


@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "lpips+l2"])
def test_losses_are_float32_whatever_the_network_computes_in(loss_type, references):
    v = (point().target + DELTA).to(torch.bfloat16)
    assert create_distance(loss_type)(v, point()).dtype == torch.float32


SNR_HALF = (0.5 / 0.501) ** 2


@pytest.mark.parametrize(("name", "at_eps", "at_half", "at_one"), [
    ("uniform", 1, 1, 1),
    ("snr", 1e-6, SNR_HALF, 1e6),
    ("snr_inv", 1e6, 1 / SNR_HALF, 1e-6),
    ("snr+1", 1 + 1e-6, 1 + SNR_HALF, 1 + 1e6),
    ("karras", 4 + 1e-6, 4 + SNR_HALF, 4 + 1e6),
    ("truncated-snr", 1, 1, 1e6),
    ("1mt", 0.999**2, 0.25, 0),
])
def test_weights_have_their_closed_form(name, at_eps, at_half, at_one):
    found = WEIGHTS[name](torch.full((3,), 2.0), torch.tensor([EPS, 0.5, 1.0]), EPS)
    assert found.tolist() == pytest.approx([2 * at_eps, 2 * at_half, 2 * at_one], rel=2e-4)
