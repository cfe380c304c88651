"""Samplers with fixed steps, the choice of a sampler by the config, and samples of the released implementation."""

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from configs.default import get_default_config
from flows import samplers
from flows.rectified_flow import velocity_from_network
from flows.runge_kutta import rk45
from flows.samplers import cm_stochastic, create_sampler, edm, euler, heun, one_step, straightness
from metrics.results import sampler_name
from models.checkpoint import load_model
from runtime.seeds import PATH_NOISE, index_noise
from runtime.terminal import UserError
from tests.flows.flows_with_solutions import gaussian_flow, gaussian_velocity, noise, tiny_network
from tests.models.released_numbers import NAMES, fields_of, inputs_of, path_of

ALL = pytest.mark.parametrize("name", samplers.SAMPLERS)


def config_of(name="euler", **changes):
    config = get_default_config()
    config.sampling.update(use_ode_sampler=name, sample_N=3, ode_tol=1e-3, batch_size=4)
    config.sampling.update(changes)
    return config


def constant(x, t, label=None):
    """A velocity that is 2 everywhere, plus the label."""
    v = torch.full_like(x, 2.0)
    return v if label is None else v + label[:, 0].view(-1, *(1,) * (x.ndim - 1))


@pytest.mark.parametrize(("sampler", "options", "order"), [(euler, {}, 1), (heun, {}, 2), (heun, {"rho": 0.5}, 2)])
def test_errors_fall_with_the_order_of_the_rule(sampler, options, order):
    """Between 64 and 128 steps, from t = 0."""
    z = noise(5, 3, dtype=torch.float64)
    errors = [(sampler(gaussian_velocity, z, steps=n, t_start=0.0, **options)[0] - gaussian_flow(z)).abs().max().item()
              for n in (64, 128)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.05 if order == 1 else 0.15)


def times_seen(sampler, **options):
    times = []

    def velocity(x, t, label):
        assert t.shape == (len(x),) and (t == t[0]).all()
        times.append(t[0].item())
        return torch.zeros_like(x)

    sampler(velocity, noise(2, 3, dtype=torch.float64), **options)
    return times


@pytest.mark.parametrize(("sampler", "options", "times", "moved"), [
    (one_step, {"t_start": 0.01}, [0.01], 0.99),
    # steps of 1/N at the times of the paper, and back from data
    (euler, {"steps": 4, "t_start": 0.2}, [0.2, 0.4, 0.6, 0.8], 1),
    (euler, {"steps": 4, "t_start": 1.0, "t_end": 0.2}, [1, 0.8, 0.6, 0.4], -1),
    (heun, {"steps": 2, "t_start": 0.04, "rho": 0.5}, [0.04, 0.36, 0.36], 0.96),  # t = (0.2 + 0.8·i/N)²
    (heun, {"steps": 1, "t_start": 0.04}, [0.04], 0.96),  # it ends with Euler
])
def test_fixed_steps_look_at_their_times_and_move_by_the_step(sampler, options, times, moved):
    z = noise(2, 3, dtype=torch.float64)
    assert times_seen(sampler, **options) == pytest.approx(times)
    torch.testing.assert_close(sampler(constant, z, **options)[0], z + 2 * moved)


def test_edm_steps_over_its_noise_levels_and_ends_with_euler_at_noise_level_zero():
    """Table 1 of arXiv 2206.00364: σ_i = (80^(1/7) + i/2·(0.002^(1/7) - 80^(1/7)))^7, and t = 1/(1+σ)."""
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    levels = [80, middle, middle, 0.002, 0.002]
    assert times_seen(edm, steps=3) == pytest.approx([1 / (1 + level) for level in levels])
    assert times_seen(edm, steps=1) == pytest.approx([1 / 81])


def test_edm_starts_at_its_noise_and_reaches_the_data_of_the_flow():
    z = noise(50, 3, dtype=torch.float64)
    x, nfe = edm(gaussian_velocity, z, steps=200)
    # Starting at σ_max·z0 misses the mean/σ_max of the data there, and no more.
    assert (x - gaussian_flow(z)).abs().max() < 3e-3 and nfe == 399
    coarse, fine, exact = (edm(gaussian_velocity, z, steps=n)[0] for n in (100, 200, 4000))
    assert math.log2((coarse - exact).abs().max() / (fine - exact).abs().max()) == pytest.approx(2, abs=0.3)


def test_cm_stochastic_jumps_to_data_and_noises_again():
    z, xi = noise(2, 3, dtype=torch.float64), noise(2, 3, seed=5, dtype=torch.float64)
    x, _ = cm_stochastic(constant, z, steps=2, t_start=0.2, noise=lambda: xi)
    middle = 0.6 * (z + 0.8 * 2) + 0.4 * xi
    torch.testing.assert_close(x, middle + 0.4 * 2)


@ALL
def test_evaluations_are_counted_as_made(name):
    counted = 0

    def velocity(x, t, label):
        nonlocal counted
        counted += 1
        return constant(x, t)

    _, nfe = create_sampler(config_of(name))(velocity, noise(4, 1, 4, 4))
    assert nfe.tolist() == [counted] * 4
    assert counted == {"one_step": 1, "euler": 3, "heun": 5, "edm": 5, "cm_stochastic": 3}.get(name, counted)


@ALL
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 9), st.permutations(range(9)))
def test_a_sample_does_not_depend_on_batch_size_or_order(name, batch_size, order):
    z, label, network = noise(9, 2, 4, 4), noise(9, 2, seed=1), tiny_network()
    expected, _ = create_sampler(config_of(name, batch_size=9))(network, z, label)
    x, _ = create_sampler(config_of(name))(network, z[order], label[order], indices=order, batch_size=batch_size)
    tolerance = {"rk45": 1e-2, "edm": 80 * 1e-5}.get(name, 1e-5)  # edm multiplies slopes by steps of σ, up to 80
    torch.testing.assert_close(x, expected[order], rtol=0, atol=tolerance)


def test_noise_on_the_way_is_not_the_noise_at_the_start():
    """Each purpose has a random stream of its own, or a sample would meet its z0 again."""
    fresh = samplers.path_noise(3, range(4), (1, 4, 4), "cpu")
    first, second = fresh(), fresh()
    for stream in range(10):
        assert torch.equal(first, index_noise(3, range(4), (1, 4, 4), stream)) == (stream == PATH_NOISE)
    assert not torch.equal(first, second)


def test_fresh_noise_of_cm_stochastic_belongs_to_seed_and_sample():
    z, config = torch.zeros(3, 1, 4, 4), config_of("cm_stochastic")
    sample = create_sampler(config)
    x, _ = sample(constant, z)
    assert not torch.equal(x[0], x[1])
    assert torch.equal(sample(constant, z[:2], indices=[2, 0])[0], x[[2, 0]])
    config.seed += 1
    assert not torch.equal(create_sampler(config)(constant, z)[0], x)


@ALL
@pytest.mark.parametrize("batch_size", [2, 5])
def test_every_sample_keeps_its_label_and_is_reported_as_finished(name, batch_size):
    z, label, counts = torch.zeros(5, 1, 2, 2), torch.arange(5.0).view(5, 1), []
    sample = create_sampler(config_of(name, batch_size=batch_size))
    gained = (sample(constant, z, label, finished=counts.append)[0] - sample(constant, z)[0])[:, 0, 0, 0]
    assert (gained.diff() > 0.5).all() and sum(counts) == 5


@pytest.mark.parametrize("name", ["euler", "rk45"])
def test_config_samples_data_to_noise_in_reverse(name):
    config = config_of(name, sample_N=1000, ode_tol=1e-5)
    z = noise(3, 1, 2, 2, dtype=torch.float64)
    x, _ = create_sampler(config)(gaussian_velocity, z)
    back, _ = create_sampler(config, reverse=True)(gaussian_velocity, x)
    assert (back - z).abs().max() < 1e-2


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["euler", "rk45"])
def test_end_of_time_can_be_moved_before_the_data(name, reverse):
    seen = []

    def velocity(x, t, label):
        seen.append(t)
        return constant(x, t)

    create_sampler(config_of(name), reverse=reverse, T=0.9)(velocity, noise(2, 1, 2, 2))
    assert torch.cat(seen).max() <= 0.9 + 1e-6 and torch.cat(seen).min() >= 1e-3 - 1e-6


def test_step_control_chooses_joint_or_own_steps():
    z = noise(4, 2, 4, 4) * torch.tensor([0.1, 1, 2, 4]).view(-1, 1, 1, 1)
    own = create_sampler(config_of("rk45", ode_tol=1e-4))(tiny_network(), z)[1]
    joint = create_sampler(config_of("rk45", ode_tol=1e-4, step_control="batch"))(tiny_network(), z)[1]
    assert len(own.unique()) > 1 and len(joint.unique()) == 1


@pytest.mark.parametrize("name", [name for name in samplers.SAMPLERS if name != "rk45"])  # see test_runge_kutta.py
@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_fixed_steps_stay_on_the_device(name, device):
    with FakeTensorMode() if device == "cuda" else contextlib.nullcontext():
        z, label = torch.empty(5, 1, 4, 4, device=device), torch.empty(5, 2, device=device)
        x, nfe = create_sampler(config_of(name))(lambda x, t, label: x * t.view(-1, 1, 1, 1) + label[:, :1, None, None],
                                                 z, label)
    assert x.device.type == device and x.dtype == torch.float32 and x.shape == z.shape
    assert nfe.device.type == "cpu"


def test_straight_trajectories_have_straightness_zero_and_bent_trajectories_the_integral():
    z = noise(6, 1, 2, 2, dtype=torch.float64)
    values, times, states = straightness(constant, z)
    assert values.abs().max() < 1e-12 and times[-1] == 1 and torch.equal(states[-1], euler(constant, z, steps=100)[0])
    # v = (t, 1): the trajectory ends at z + (1/2, 1), and ‖v - (1/2, 1)‖ = |t - 1/2| has the mean 1/4.
    values, _, _ = straightness(lambda x, t, label: torch.stack([t, torch.ones_like(t)], 1), z[:, 0, 0], t_start=0.0)
    assert values.shape == (6,)
    torch.testing.assert_close(values, torch.full((6,), 0.25, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["one_step", "heun", "edm", "cm_stochastic"])
def test_a_sampler_that_only_runs_forward_says_so(name):
    with pytest.raises(UserError, match=f"use_ode_sampler {name} does not run from data to noise; use euler or rk45"):
        create_sampler(config_of(name), reverse=True)


def test_noise_levels_that_rise_are_refused():
    with pytest.raises(UserError, match=r"sampling\.sigma_min 3 is above config\.sampling\.sigma_max 2"):
        create_sampler(config_of("edm", sigma_min=3.0, sigma_max=2.0))


def test_values_and_names_have_just_the_fields_that_a_sampler_reads():
    values = {name: {k: v for k, v in samplers.sampler_values(config_of(name)).items() if v is not None}
              for name in samplers.SAMPLERS}
    assert values == {"one_step": {}, "euler": {"sample_N": 3}, "heun": {"sample_N": 3, "rho": 1.0},
                      "edm": {"sample_N": 3, "sigma_max": 80.0, "sigma_min": 0.002},
                      "rk45": {"ode_tol": 1e-3, "step_control": "sample"}, "cm_stochastic": {"sample_N": 3}}
    assert [sampler_name({"sampler": name} | values[name]) for name in ("one_step", "euler", "heun", "rk45")] == [
        "one_step", "euler-3", "heun-3 (rho 1)", "rk45 (ode_tol 0.001, step_control sample)"]


# Samples of the released implementation, from its own checkpoints

FIXED = {
    "one_step": (one_step, {}),
    "euler_2": (euler, {"steps": 2}),
    "euler_10": (euler, {"steps": 10}),
    "heun_3": (heun, {"steps": 3}),
    "heun_3_rho2": (heun, {"steps": 3, "rho": 2.0}),
    "euler_5_reverse": (euler, {"steps": 5, "t_start": 1.0, "t_end": 1e-3}),
}


def recorded_flow(name):
    """Return (velocity, z, label, recorded numbers) of a released network."""
    z, _, label, numbers = inputs_of(name)
    net = load_model(path_of(name), fields=fields_of(name)).requires_grad_(False)
    return velocity_from_network(net), z, label, numbers


@pytest.mark.parametrize("name", NAMES)
def test_fixed_steps_reach_the_recorded_images(name):
    velocity, z, label, numbers = recorded_flow(name)
    for rule, (sampler, options) in FIXED.items():
        x, nfe = sampler(velocity, z, label, **options)
        np.testing.assert_allclose(x.numpy(), numbers[f"sample_{rule}"], rtol=0, atol=1e-3, err_msg=rule)
        assert nfe == int(numbers[f"nfe_{rule}"]), rule


FORWARD, REVERSE = ("rk45", 1e-3, 1.0), ("rk45_reverse", 1.0, 1e-3)


@pytest.mark.parametrize(("rule", "t_start", "t_end"), [("rk45", 1e-3, 1.0), ("rk45_reverse", 1.0, 1e-3)])
@pytest.mark.parametrize("name", ["ncsnpp_unconditional_time", "ncsnpp_elu_fourier_scaled"])
def test_joint_rk45_reaches_the_recorded_images_with_as_many_evaluations(name, rule, t_start, t_end):
    velocity, z, label, numbers = recorded_flow(name)
    x, nfe = rk45(velocity, z, label, step_control="batch", t_start=t_start, t_end=t_end, tol=1e-5)
    assert np.abs(x.numpy() - numbers[f"sample_{rule}"]).mean() < 1e-2
    assert abs(nfe[0].item() - int(numbers[f"nfe_{rule}"])) <= 0.1 * int(numbers[f"nfe_{rule}"])


@pytest.mark.parametrize("name", ["ncsnpp_deep", "dhariwal_cond"])
def test_a_sample_of_a_real_network_is_the_same_bits_beside_any_others_and_in_any_order(name):
    velocity, z, label, _ = recorded_flow(name)
    order = [2, 0, 1, 2, 0]
    x, nfe = rk45(velocity, z, label, tol=1e-2, slots=4)
    again, nfe_again = rk45(velocity, z[order], label if label is None else label[order], tol=1e-2, slots=4)
    assert torch.equal(again, x[order]) and torch.equal(nfe_again, nfe[order])
