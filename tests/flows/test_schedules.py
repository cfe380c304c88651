"""Distributions of the training time, α of the path, and annealing: β and the annealed noise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flows.rectified_flow import anneal
from flows.schedules import ALPHA_SCHEDULES, create_annealing, create_time_schedule
from runtime.terminal import UserError
from tests.flows.flows_with_solutions import noise

EPS = 1e-3
COUNT = 20_000


def draw(name, count=COUNT, seed=0, eps=EPS):
    return create_time_schedule(name)(torch.Generator().manual_seed(seed), count, "cpu", eps, 1.0)


def u_shaped_distribution(t, a=4.0):
    """The integral of the paper's density ∝ e^{as} + e^{a(1-s)}, a = 4, from 0 to t over that to 1, term by term."""
    s = (np.asarray(t) - EPS) / (1 - EPS)
    return (np.exp(a * s) - 1 + math.exp(a) - np.exp(a * (1 - s))) / (2 * (math.exp(a) - 1))


def exponential_distribution(t, base=10.0):
    s = (np.asarray(t) - EPS) / (1 - EPS)
    return (1 - base**-s) / (1 - 1 / base)


DISTRIBUTIONS = {
    "uniform": stats.uniform(EPS, 1 - EPS).cdf,
    "range_0.2_0.8": stats.uniform(0.2, 0.6).cdf,
    "u_shaped": u_shaped_distribution,
    "exp_10": exponential_distribution,
    "exp_0.5": lambda t: exponential_distribution(t, 0.5),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_times_follow_their_distribution(name, seed):
    assert stats.kstest(draw(name, seed=seed).numpy(), DISTRIBUTIONS[name]).pvalue > 1e-3


def test_k_step_times_are_the_starts_of_k_euler_steps_equally_often():
    t = draw("4")
    values, counts = t.double().unique(return_counts=True)
    assert values.tolist() == pytest.approx([EPS + j * (1 - EPS) / 4 for j in range(4)], abs=1e-6)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert torch.equal(t, draw(4))


def test_t0t1_takes_each_end_half_of_the_time_sample_by_sample():
    t = draw("t0t1")
    at_end = t == 1
    assert torch.equal(t[~at_end], torch.full_like(t[~at_end], EPS))
    assert stats.binomtest(int(at_end.sum()), COUNT).pvalue > 1e-3
    changes = (at_end[1:] != at_end[:-1]).sum()
    assert stats.binomtest(int(changes), COUNT - 1).pvalue > 1e-3


@pytest.mark.parametrize(("name", "time"), [("t0", EPS), ("t1", 1.0), ("fix_0", EPS), ("fix_1", 1.0),
                                            ("fix_0.25", EPS + 0.25 * (1 - EPS))])
def test_constant_times_are_exact(name, time):
    assert torch.equal(draw(name, 5), torch.full((5,), time))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["uniform", "t0", "t1", "t0t1", "u_shaped", "exp_10", "exp_0.1", "fix_0.3", "range_0.1_0.9",
                        "7"]), st.integers(0, 2**32), st.sampled_from([1e-5, 1e-3, 0.1]))
def test_every_time_lies_between_eps_and_one(name, seed, eps):
    t = draw(name, 1000, seed, eps)
    assert t.dtype == torch.float32 and t.shape == (1000,)
    assert t.min() >= torch.tensor(eps) and t.max() <= 1


@pytest.mark.parametrize("name", ["u_shaped", "exp_10", "exp_0.1"])
def test_inverted_distributions_reach_both_ends_and_no_further(name, monkeypatch):
    for u, time in [(0.0, EPS), (1.0, 1.0)]:
        monkeypatch.setattr(torch, "rand", lambda count, u=u, **_: torch.full((count,), u))
        assert draw(name, 1).item() == pytest.approx(time, abs=1e-6)


@pytest.mark.parametrize("name", ["uniform", "t0t1", "u_shaped", "exp_10", "4"])
def test_times_belong_to_the_generator(name):
    assert torch.equal(draw(name, seed=3), draw(name, seed=3))
    assert not torch.equal(draw(name, seed=3), draw(name, seed=4))


@pytest.mark.parametrize(("create", "field", "names"), [
    (create_time_schedule, "flow.flow_t_schedule", [
        "", "t2", "fix_", "fix_1.5", "range_0.8_0.2", "range_0.2_1.2", "range_0.5_0.5", "range_0.5", "1", "0", "2.5",
        "exp_1", "exp_0", "uniform_3", "-3", "fix_0.1_0.2"]),
    (create_annealing, "training.x0_randomness", [
        "", "fix", "fix_", "fix_1.1", "fix_-0.1", "fix_0.1.2", "warmup_0", "warmup_", "warm_10", "warmup_lin_10",
        "warmup_1.5", "exp_10"]),
])
def test_a_wrong_name_or_range_is_one_sentence_naming_the_field(create, field, names):
    for name in names:
        with pytest.raises(UserError, match=field) as caught:
            create(name)
        assert "\n" not in str(caught.value)


def test_the_place_on_the_path_is_the_time_or_an_end():
    t = torch.tensor([0.25, 0.5])
    assert torch.equal(ALPHA_SCHEDULES["uniform"](t, EPS), t)
    assert torch.equal(ALPHA_SCHEDULES["t0"](t, EPS), torch.full_like(t, EPS))
    assert torch.equal(ALPHA_SCHEDULES["t1"](t, EPS), torch.ones(2))


@pytest.mark.parametrize(("name", "values"), [
    ("fix_0", {0: 0.0, 10**6: 0.0}),
    ("fix_0.3", {0: 0.3, 10**6: 0.3}),
    ("warmup_1000", {0: 1.0, 250: 0.75, 1000: 0.0, 5000: 0.0}), ("warmup_1", {0: 1.0, 1: 0.0}),
    ("warmup_exp_1000", {0: 1.0, 1000: math.exp(-1), 3000: math.exp(-3)}),
    ("warmup_cos_1000", {0: 1.0, 250: (1 + math.sqrt(0.5)) / 2, 500: 0.5, 1000: 0.0, 5000: 0.0}),
])
def test_beta_has_its_closed_form(name, values):
    beta = create_annealing(name)
    for update, expected in values.items():
        assert isinstance(beta(update), float)
        assert beta(update) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1))
def test_annealed_noise_is_the_weighted_sum_of_the_equation(beta):
    z0, xi = noise(4, 3, 16, 16), noise(4, 3, 16, 16, seed=1)
    assert torch.allclose(anneal(z0, xi, beta), (1 - beta**2) ** 0.5 * z0 + beta * xi, atol=1e-6)


def test_the_limits_of_annealing_are_exact():
    z0, xi = noise(2, 3, 16, 16), noise(2, 3, 16, 16, seed=1)
    assert anneal(z0, xi, 0.0) is z0
    assert torch.equal(anneal(z0, xi, 1.0), xi)
