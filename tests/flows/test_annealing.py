"""Annealing reflow: the schedule of β and the annealed noise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flows.annealing import anneal, create_annealing
from runtime.errors import UserError


def noise(seed, count=50):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "values"), [
    ("fix_0", {0: 0.0, 10**6: 0.0}),
    ("fix_0.3", {0: 0.3, 10**6: 0.3}),
    ("warmup_1000", {0: 1.0, 250: 0.75, 1000: 0.0, 5000: 0.0}),
    ("warmup_exp_1000", {0: 1.0, 1000: math.exp(-1), 3000: math.exp(-3)}),
    ("warmup_cos_1000", {0: 1.0, 250: (1 + math.sqrt(0.5)) / 2, 500: 0.5, 1000: 0.0, 5000: 0.0}),
])
def test_beta_has_its_closed_form(name, values):
    beta = create_annealing(name)
    for update, expected in values.items():
        assert isinstance(beta(update), float)
        assert beta(update) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["warmup", "warmup_exp", "warmup_cos"]), st.integers(1, 10**6), st.integers(0, 10**7),
       st.integers(0, 10**6))
def test_beta_falls_from_one_and_stays_in_range(kind, n, update, later):
    beta = create_annealing(f"{kind}_{n}")
    assert beta(0) == 1
    assert 0 <= beta(update + later) <= beta(update) <= 1


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1))
def test_annealed_noise_is_the_weighted_sum_of_the_equation(beta):
    z0, xi = noise(0, 4), noise(1, 4)
    assert torch.allclose(anneal(z0, xi, beta), (1 - beta**2) ** 0.5 * z0 + beta * xi, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.7, 1.0])
def test_annealed_noise_stays_standard_normal_and_keeps_its_correlation(beta):
    z0, xi = noise(0), noise(1)
    annealed = anneal(z0, xi, beta)
    assert stats.kstest(annealed.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = (annealed * z0).mean().item()
    assert correlation == pytest.approx(math.sqrt(1 - beta**2), abs=4 / math.sqrt(z0.numel()) * 2)


def test_the_limits_of_annealing_are_exact():
    z0, xi = noise(0, 2), noise(1, 2)
    assert anneal(z0, xi, 0.0) is z0
    assert torch.equal(anneal(z0, xi, 1.0), xi)


@pytest.mark.parametrize("name", ["", "fix", "fix_", "fix_1.1", "fix_-0.1", "fix_0.1.2", "warmup_0", "warmup_",
                                  "warm_10", "warmup_lin_10", "exp_10"])
def test_a_wrong_schedule_is_one_sentence_naming_the_field(name):
    with pytest.raises(UserError, match="training.x0_randomness"):
        create_annealing(name)
