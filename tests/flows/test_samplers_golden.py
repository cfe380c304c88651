"""Samples of the released implementation are reproduced, by every sampler, from its own checkpoints."""

import json

import numpy as np
import pytest
import torch

from flows.rectified_flow import velocity_from_network
from flows.runge_kutta import rk45
from flows.samplers import euler, heun, one_step
from models import load_model

NETWORKS = ("dhariwal_cond", "dhariwal_uncond", "ncsnpp_cifar", "ncsnpp_ddpm_blocks", "ncsnpp_deep",
            "ncsnpp_elu_fourier_scaled", "ncsnpp_fourier_fir_residual", "ncsnpp_input_skip_cat",
            "ncsnpp_progressive_residual", "ncsnpp_unconditional_time")
FIXED = {
    "one_step": (one_step, {}),
    "euler_2": (euler, {"steps": 2}),
    "euler_10": (euler, {"steps": 10}),
    "heun_3": (heun, {"steps": 3}),
    "heun_3_rho2": (heun, {"steps": 3, "rho": 2.0}),
    "euler_5_reverse": (euler, {"steps": 5, "t_start": 1.0, "t_end": 1e-3}),
}


@pytest.fixture
def recorded(data_folder):
    """A function from a network's name to (velocity, z, label, recorded numbers)."""

    def load(name):
        folder = data_folder / "golden"
        numbers = np.load(folder / f"{name}.npz")
        net = load_model(folder / f"{name}.pth", fields=json.loads((folder / f"{name}.json").read_text()))
        label = torch.from_numpy(numbers["label"]) if numbers["label"].size else None
        return velocity_from_network(net.requires_grad_(False)), torch.from_numpy(numbers["x"]), label, numbers

    return load


@pytest.mark.parametrize("name", NETWORKS)
def test_fixed_steps_reach_the_recorded_images(recorded, name):
    velocity, z, label, numbers = recorded(name)
    for rule, (sampler, options) in FIXED.items():
        x, nfe = sampler(velocity, z, label, **options)
        np.testing.assert_allclose(x.numpy(), numbers[f"sample_{rule}"], rtol=0, atol=1e-3, err_msg=rule)
        assert nfe == int(numbers[f"nfe_{rule}"]), rule


FORWARD, REVERSE = ("rk45", 1e-3, 1.0), ("rk45_reverse", 1.0, 1e-3)


@pytest.mark.parametrize(("name", "rule", "t_start", "t_end"), [
    ("ncsnpp_unconditional_time", *FORWARD), ("ncsnpp_unconditional_time", *REVERSE),
    ("ncsnpp_elu_fourier_scaled", *FORWARD), ("ncsnpp_elu_fourier_scaled", *REVERSE),
    ("ncsnpp_cifar", *FORWARD), ("dhariwal_cond", *FORWARD),
])
def test_joint_rk45_reaches_the_recorded_images_with_as_many_evaluations(recorded, name, rule, t_start, t_end):
    velocity, z, label, numbers = recorded(name)
    x, nfe = rk45(velocity, z, label, step_control="batch", t_start=t_start, t_end=t_end, tol=1e-5)
    assert np.abs(x.numpy() - numbers[f"sample_{rule}"]).mean() < 1e-2
    assert abs(nfe[0].item() - int(numbers[f"nfe_{rule}"])) <= 0.1 * int(numbers[f"nfe_{rule}"])


@pytest.mark.parametrize("name", ["ncsnpp_deep", "dhariwal_cond"])
def test_a_sample_of_a_real_network_is_the_same_bits_beside_any_others_and_in_any_order(recorded, name):
    velocity, z, label, _ = recorded(name)
    order = [2, 0, 1, 2, 0]
    label = torch.zeros(3, 1) if label is None else label
    seen = velocity if name.startswith("dhariwal") else lambda x, t, label: velocity(x, t)
    x, nfe = rk45(seen, z, label, tol=1e-2, slots=4)
    again, nfe_again = rk45(seen, z[order], label[order], tol=1e-2, slots=4)
    assert torch.equal(again, x[order]) and torch.equal(nfe_again, nfe[order])
