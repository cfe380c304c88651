"""Adaptive integration: correct, the same for every batch, never endless, and never waiting for the device."""

import contextlib
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flows import runge_kutta
from flows.runge_kutta import attempt_step, error_norm, inverse_fifth_root, rk45, start_slots
from runtime.terminal import UserError
from tests.flows.flows_with_solutions import gaussian_flow, gaussian_velocity, noise, tiny_network
from tests.processes import output_of

rk45_joint = functools.partial(rk45, step_control="batch")
BOTH = pytest.mark.parametrize("solver", [rk45, rk45_joint])


@BOTH
@pytest.mark.parametrize("tol", [1e-4, 1e-7])
def test_end_point_is_right_within_the_tolerance(solver, tol):
    z = noise(5, 1, 2, 3, dtype=torch.float64)
    x, nfe = solver(gaussian_velocity, z, t_start=0.0, tol=tol, slots=2)
    assert (x - gaussian_flow(z)).abs().max() < 10 * tol
    assert nfe.dtype == torch.int64 and nfe.shape == (5,) and ((nfe - 2) % 6 == 0).all()


def test_formula_has_order_five():
    def error(steps):
        z = noise(3, 4, dtype=torch.float64)
        state = start_slots(gaussian_velocity, z, None, 0.0, 1.0, 1e6, True)
        for _ in range(steps):
            state = state._replace(h=torch.full_like(state.h, 1 / steps))
            state, _ = attempt_step(gaussian_velocity, state, 1.0, 1e6, True, z.dtype)
        return (state.x - gaussian_flow(z)).abs().max().item()

    assert math.log2(error(16) / error(32)) == pytest.approx(5, abs=0.4)


SLOT_COUNT = 5  # odd: the last slots of a row are computed by other machine instructions than the first
NETWORK = tiny_network()
SAMPLES = noise(23, 2, 4, 4, seed=1) * torch.linspace(0.2, 3, 23).view(-1, 1, 1, 1)
LABELS = torch.linspace(-1, 1, 46).view(23, 2)


@functools.cache
def all_samples():
    """Return what becomes of all samples, and their evaluations."""
    return rk45(NETWORK, SAMPLES, LABELS, tol=1e-4, slots=SLOT_COUNT)


def in_float32(x, t, label=None):
    """The network in float32 under a float64 state, which shows every bit of the steps."""
    return NETWORK(x.float(), t.float(), label).double()


@functools.cache
def exact(tol):
    """Return what becomes of all samples to the last bit of the steps, and their evaluations."""
    return rk45(in_float32, SAMPLES.double(), LABELS, tol=tol, slots=SLOT_COUNT)


@pytest.mark.parametrize("tol", [1e-4, 1e-5])
@settings(max_examples=15, deadline=None)
@given(chosen=st.lists(st.integers(0, 22), min_size=1, max_size=23, unique=True))
def test_a_sample_is_the_same_bits_beside_any_others_and_in_any_order(tol, chosen):
    x, nfe = rk45(in_float32, SAMPLES.double()[chosen], LABELS[chosen], tol=tol, slots=SLOT_COUNT)
    assert torch.equal(x, exact(tol)[0][chosen])
    assert torch.equal(nfe, exact(tol)[1][chosen])


def rough(x, t, label=None):
    """A velocity with a sharp bend at t = 0.4, at which steps are refused."""
    bend = torch.tanh(300 * (t - 0.4)).view(-1, *(1,) * (x.ndim - 1))
    return 3 * bend * x + 20 * bend


@pytest.mark.parametrize("tol", [1e-3, 1e-4, 1e-6])
def test_joint_steps_after_refusals_are_scipys_to_rounding(tol, monkeypatch):
    """So no step grows right after a refused one, and the refused one shrinks by 0.9·e^(-1/5)."""
    z = noise(3, 4, dtype=torch.float64)

    def right_side(t, flat):
        x = torch.from_numpy(flat).view_as(z)
        return rough(x, torch.full((3,), t, dtype=torch.float64)).numpy().reshape(-1)

    expected = solve_ivp(right_side, (1e-3, 1), z.numpy().reshape(-1), rtol=tol, atol=tol)
    times = [1e-3]  # that the steps end at; a refused one repeats its own

    def attempt(*arguments):
        slots, status = attempt_step(*arguments)
        times.append(slots.t[0].item())
        return slots, status

    monkeypatch.setattr(runge_kutta, "attempt_step", attempt)
    x, _ = rk45_joint(rough, z, tol=tol, slots=3)
    refused = sum(a == b for a, b in itertools.pairwise(times))
    assert refused >= 3 and expected.nfev == 2 + 6 * (len(times) - 1)
    np.testing.assert_allclose(list(dict.fromkeys(times)), expected.t, rtol=1e-9)
    np.testing.assert_allclose(x.numpy().reshape(-1), expected.y[:, -1], rtol=1e-9)


@pytest.mark.parametrize("joint", [True, False])
def test_no_step_grows_right_after_a_refused_one(joint):
    z = noise(2, 3, dtype=torch.float64)
    state = start_slots(gaussian_velocity, z, None, 0.0, 1.0, 1e-4, joint)
    for refused, growth in ((False, 2.0), (True, 1.0)):
        small = state._replace(h=torch.full_like(state.h, 1e-3), rejected=torch.full((2,), refused))
        after, _ = attempt_step(gaussian_velocity, small, 1.0, 1e-4, joint, z.dtype)
        assert not after.rejected.any() and ((after.h > 1e-3 * growth) if growth > 1 else (after.h == 1e-3)).all()


def test_single_samples_are_stepped_with_half_the_gain_at_every_tolerance():
    """A step that was accepted with the error e is followed by one 0.9·e^(-k/5) times as long, k = 1 or 1/2."""
    z = noise(1, 3, dtype=torch.float64)  # of one sample, both norms are the same
    for tol in (1e-2, 1e-4, 1e-5, 1e-7):
        factors = []
        for joint in (True, False):
            state = start_slots(gaussian_velocity, z, None, 0.0, 1.0, tol, joint)
            after, _ = attempt_step(gaussian_velocity, state, 1.0, tol, joint, z.dtype)
            assert not after.rejected.any()
            factors.append(after.h / state.h / 0.9)
        torch.testing.assert_close((factors[1] ** 2).clamp(max=10 / 0.9), factors[0], rtol=1e-9, atol=0)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40))
def test_a_sample_is_the_same_within_the_tolerance_for_any_number_of_slots(slots):
    x, _ = rk45(NETWORK, SAMPLES, LABELS, tol=1e-4, slots=slots)
    assert (x - all_samples()[0]).abs().max() < 10 * 1e-4


def test_every_evaluation_is_full_and_no_sample_waits_for_another():
    sizes = []

    def velocity(x, t, label):
        sizes.append(len(x))
        return NETWORK(x, t, label)

    rk45(velocity, SAMPLES, LABELS, tol=1e-4, slots=SLOT_COUNT)
    assert set(sizes) == {SLOT_COUNT}
    nfe = all_samples()[1]
    assert len(nfe.unique()) > 2  # samples have their own steps
    work, longest = int(nfe.sum()), int(nfe.max())
    # All the work spread over the slots, the slopes of the padding, and one sample's trajectory at the end.
    assert len(sizes) * SLOT_COUNT <= work + 2 * SLOT_COUNT + (SLOT_COUNT - 1) * longest


@BOTH
def test_no_samples_give_no_samples(solver):
    x, nfe = solver(NETWORK, SAMPLES[:0], tol=1e-3)
    assert x.shape == (0, 2, 4, 4) and nfe.shape == (0,)


def nan_after_a_while(x, t, label=None):
    """Not a number for samples that start above 10, from t = 0.5 on."""
    nonfinite = (x.flatten(1).amax(1) > 10) & (t > 0.5)
    return torch.where(nonfinite.view(-1, 1), torch.nan, torch.ones_like(x))


HALF = r"t = 0\.(49999|5\b)"


@BOTH
@pytest.mark.parametrize(("velocity", "z", "options", "message"), [
    (nan_after_a_while, torch.tensor([[1.0], [2.0], [3.0], [4.0], [25.0]]), {}, f"sample 4 at {HALF}.*not finite"),
    (lambda x, t, label: x * torch.nan, torch.ones(4, 3), {}, r"sample 0 at t = 0\.001: the velocity is not finite"),
    # dx/dt = x² goes to infinity at t = 0.5
    (lambda x, t, label: x**2, torch.tensor([[0.1], [0.1], [0.1], [2.0], [0.1]], dtype=torch.float64),
     {"t_start": 0.0, "tol": 1e-6}, f"sample 3 at {HALF}.*no step is small enough"),
    (NETWORK, SAMPLES[:3], {"tol": 1e-6, "max_steps": 4},
     r"sample 0 at t = 0\.\d+: 4 steps were not enough.*max_steps"),
], ids=["nan later", "nan at once", "no step is small enough", "too many steps"])
def test_a_trajectory_that_cannot_be_followed_is_named_with_sample_and_time(solver, velocity, z, options, message):
    with pytest.raises(UserError, match=message):
        solver(velocity, z, slots=2, **options)


class ReadsBack(TorchDispatchMode):
    """Lists the operations whose result the host, or the shape of a tensor, waits for."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "item")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.name().split("::")[1].split(".")[0]
        leaves_device = (isinstance(result, torch.Tensor) and result.device.type == "cpu"
                         and any(isinstance(a, torch.Tensor) and a.device.type == "cuda" for a in args))
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1])
        to_device = (name == "_to_copy" and result.device.type == "cuda" and args[0].device.type == "cpu"
                     and not (kwargs or {}).get("non_blocking"))
        if name in self.WAITING or leaves_device or by_mask or to_device:
            self.found.append(name)
        return result


@pytest.fixture
def status_reads(monkeypatch):
    """What is read from the device, in order."""
    reads, original = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(original(tensor)) or reads[-1])
    return reads


FEW = SAMPLES[:8], LABELS[:8]  # more than there are slots


@BOTH
def test_the_device_is_read_once_per_step_and_never_else(solver, status_reads):
    evaluations = []

    def velocity(x, t, label):
        evaluations.append(len(x))
        return NETWORK(x, t, label)

    with ReadsBack() as reads:
        solver(velocity, FEW[0], FEW[1], tol=1e-3, slots=SLOT_COUNT)
    assert reads.found == []
    starts = -(-len(FEW[0]) // SLOT_COUNT)
    assert len(status_reads) == (len(evaluations) - 2 * starts) // 6


@BOTH
@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_steps_and_refills_stay_on_the_device(solver, device, status_reads, monkeypatch):
    solver(NETWORK, FEW[0], FEW[1], tol=1e-3, slots=SLOT_COUNT)
    recorded = iter(list(status_reads))
    for kind in (torch.Tensor, FakeTensor):
        monkeypatch.setattr(kind, "tolist", lambda status: next(recorded))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # fake tensors cannot be pinned

    def velocity(x, t, label):
        return torch.tanh(x) * t.view(-1, 1, 1, 1) + label[:, :1, None, None]

    with FakeTensorMode() if device == "cuda" else contextlib.nullcontext(), ReadsBack() as reads:
        z, label = torch.empty(FEW[0].shape, device=device), torch.empty(FEW[1].shape, device=device)
        x, nfe = solver(velocity, z, label, tol=1e-3, slots=SLOT_COUNT)
    assert x.device.type == device and x.shape == z.shape and x.dtype == torch.float32
    assert reads.found == []
    assert next(recorded, None) is None


def test_norms_say_who_is_stepped_with_whom():
    x = torch.tensor([2.0, 4.0, 1.0]).view(3, 1, 1).expand(3, 2, 2)
    assert torch.equal(error_norm(x, joint=False), torch.tensor([2.0, 4.0, 1.0]))
    assert torch.equal(error_norm(x, joint=True), torch.full((3,), 7.0).sqrt())


def test_fifth_root_is_accurate_and_the_same_bits_wherever_in_the_tensor_it_stands():
    values = 10 ** torch.linspace(-250, 250, 1003, dtype=torch.float64)
    found = inverse_fifth_root(values)
    torch.testing.assert_close(found, values.pow(-1 / 5), rtol=1e-14, atol=0)
    assert torch.equal(found, torch.cat([inverse_fifth_root(value.view(1)) for value in values]))
    ends = inverse_fifth_root(torch.tensor([0.0, math.inf, math.nan], dtype=torch.float64))
    assert ends[0] > 1e59 and ends[1] < 1e-59 and ends[2].isnan()


ON_OTHER_PROCESSORS = """
import hashlib, torch
from flows.runge_kutta import inverse_fifth_root, rk45
values = torch.arange(1, 1004, dtype=torch.float64) / 7
print(torch.backends.cpu.get_cpu_capability(), hashlib.sha256(inverse_fifth_root(values).numpy().tobytes()).hexdigest())
z = torch.randn(23, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
velocity = lambda x, t, label=None: (x * x - 1) * (t * t).view(-1, 1, 1, 1) - x
x, nfe = rk45(velocity, z, tol=1e-5, slots=5)
chosen = [7, 22, 3]
alone, alone_nfe = rk45(velocity, z[chosen], tol=1e-5, slots=5)
assert torch.equal(alone, x[chosen]) and torch.equal(alone_nfe, nfe[chosen])
"""


def test_steps_are_the_same_bits_in_any_place_on_every_instruction_set(tmp_path):
    seen = {}
    (tmp_path / "program.py").write_text(ON_OTHER_PROCESSORS)
    for capability in ("default", "avx2", "avx512"):
        printed = output_of(tmp_path, str(tmp_path / "program.py"), environment={"ATEN_CPU_CAPABILITY": capability})
        used, digest = printed.split()  # a processor without an instruction set runs the best that it has
        seen[used] = digest
    assert "DEFAULT" in seen and len(set(seen.values())) == 1, seen


def test_what_is_left_is_shared_by_two_steps_rather_than_leaving_a_tiny_one():
    """The step 0.3 is taken, or 0.65 of what is left where that is less, or what is left."""
    to_go, taken = torch.tensor([[0.7, 0.47, 0.4, 0.3, 0.1], [0.3, 0.3, 0.26, 0.3, 0.1]], dtype=torch.float64)
    z = torch.zeros(5, 1, dtype=torch.float64)
    state = start_slots(lambda x, t, label: x, z, None, -1.0, 0.0, 1e-3, False)
    state = state._replace(t=-to_go, h=torch.full_like(to_go, 0.3))
    after, _ = attempt_step(lambda x, t, label: x, state, 0.0, 1e-3, False, z.dtype)
    torch.testing.assert_close(after.t - state.t, taken)
