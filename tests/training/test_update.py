"""One update: what is learnt from it, what a non-finite one leaves alone, its cost, and that no device is read."""

import collections
import copy
import types

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from configs.default import FIELDS
from flows.objective import Draws, create_objective
from flows.rectified_flow import velocity_from_network
from models.create import create_model
from runtime.seeds import DRAWS, step_generator
from runtime.terminal import UserError
from tests.helpers import Operations, config_of
from train import Training
from training.update import ExponentialMovingAverage, UpdateStats, apply_update, check_skipped, create_optimizer

OPTIMIZERS = ("Adam", "AdamW", "RAdam")


def make(name="Adam", lr=0.1):
    """Return a small network, its optimizer, EMA and stats."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    parameters = list(network.parameters())
    optimizer = create_optimizer(parameters, config_of(optim__optimizer=name, optim__lr=lr).optim)
    return network, optimizer, ExponentialMovingAverage(parameters, 0.9), UpdateStats("cpu")


def step(network, optimizer, ema, stats, factor=1.0, grad_clip=1.0):
    """Do one update on fixed data; `factor` scales the loss (nan spoils it)."""
    x = torch.linspace(-1, 1, 6).view(2, 3)
    loss = network(x).square().mean() * factor
    loss.backward()
    apply_update(optimizer, ema, stats, loss.detach(), grad_clip=grad_clip)
    optimizer.zero_grad()
    return loss


def tensors(network, optimizer, ema):
    """Return copies of every tensor that an update changes."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [t.detach().clone() for t in (*network.parameters(), *states, *ema.shadow_params)]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_non_finite_update_leaves_weights_moments_and_ema_as_they_were(name, spoilt):
    network, optimizer, ema, stats = make(name)
    for _ in range(7):
        step(network, optimizer, ema, stats)
    before = tensors(network, optimizer, ema)
    step(network, optimizer, ema, stats, factor=spoilt)
    after = tensors(network, optimizer, ema)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    step(network, optimizer, ema, stats)
    assert not torch.equal(tensors(network, optimizer, ema)[0], before[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_very_first_update_can_be_skipped(name):
    network, optimizer, ema, stats = make(name)
    fresh = [p.detach().clone() for p in network.parameters()]
    step(network, optimizer, ema, stats, factor=float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(fresh, network.parameters(), strict=True))
    other, other_optimizer, other_ema, other_guard = make(name)
    for _ in range(3):
        step(network, optimizer, ema, stats)
        step(other, other_optimizer, other_ema, other_guard)
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss, spoilt", [(0.0, True), (float("inf"), False)])
def test_a_loss_or_a_gradient_alone_that_is_not_finite_is_enough_to_skip(loss, spoilt):
    network, optimizer, ema, stats = make()
    before = [p.detach().clone() for p in network.parameters()]
    total = network[0].weight.sum() * 0 + network[1].bias.sum() * 0
    (total.sqrt() if spoilt else total).backward()  # 0·inf: gradient nan, loss 0
    apply_update(optimizer, ema, stats, torch.tensor(loss), grad_clip=1.0)
    assert stats.read()["nonfinite"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_equals_torchs_own_clip_and_step(name):
    network, optimizer, ema, stats = make(name)
    reference = copy.deepcopy(network)
    plain = getattr(torch.optim, name)(reference.parameters(), lr=0.1, weight_decay=0.0)
    shadow = [p.detach().clone() for p in reference.parameters()]
    for update in range(1, 6):
        step(network, optimizer, ema, stats, factor=30.0, grad_clip=0.5)
        plain.zero_grad()
        (reference(torch.linspace(-1, 1, 6).view(2, 3)).square().mean() * 30).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        plain.step()
        decay = min(0.9, (1 + update) / (10 + update))
        shadow = [decay * s + (1 - decay) * p.detach() for s, p in zip(shadow, reference.parameters(), strict=True)]
    for a, b in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(ema.shadow_params, shadow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_without_a_gradient_stay_finite_at_the_ends_of_the_ranges(name):
    """A branch that starts with zeros gives none to the layers before its last."""
    weight = torch.nn.Parameter(torch.ones(3))
    config = config_of(optim__optimizer=name, optim__lr=0.1, optim__beta1=FIELDS["optim.beta1"].high,
                       optim__eps=FIELDS["optim.eps"].low)
    optimizer = create_optimizer([weight], config.optim)
    for _ in range(7):
        weight.grad = torch.zeros(3)
        apply_update(optimizer, ExponentialMovingAverage([weight], 0.9), UpdateStats("cpu"), torch.tensor(1.0),
                     grad_clip=1.0)
    assert torch.equal(weight, torch.ones(3))


def test_negative_clip_leaves_the_gradient_alone():
    changes = []
    for grad_clip in (-1.0, 1e-3):
        network, optimizer, ema, stats = make(lr=0.1)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, fused=True)
        before = network[0].weight.detach().clone()
        step(network, optimizer, ema, stats, factor=10.0, grad_clip=grad_clip)
        changes.append((network[0].weight - before).norm().item())
    assert changes[0] > 100 * changes[1]


def test_stats_are_sums_and_counts():
    network, optimizer, ema, stats = make()
    losses = []
    for factor in [1.0, float("nan"), float("nan"), 1.0, float("inf")]:
        loss = step(network, optimizer, ema, stats, factor=factor)
        losses += [loss.item()] if factor == 1.0 else []
    found = stats.read()
    assert (found["finite"], found["nonfinite"], found["consecutive"], found["most_consecutive"]) == (2, 3, 1, 2)
    assert found["loss_sum"] == pytest.approx(sum(losses), rel=1e-6)
    stats.restart()
    step(network, optimizer, ema, stats, factor=float("nan"))
    found = stats.read()
    assert (found["finite"], found["loss_sum"], found["nonfinite"], found["most_consecutive"]) == (0, 0, 4, 2)


def test_too_many_skipped_in_a_row_stop_training():
    stats = UpdateStats("cpu")
    for _ in range(4):
        stats.count(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0))
    check_skipped(stats.read(), 4)
    stats.count(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0.0))  # a finite one since does not excuse it
    with pytest.raises(UserError, match="4 updates in a row"):
        check_skipped(stats.read(), 3)


def test_fp16_scale_halves_on_overflow_and_doubles_after_a_long_good_run():
    stats = UpdateStats("cpu", scaled=True)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    start = float(stats.scale)
    stats.count(one, one, one)
    assert float(stats.scale) == start / 2
    for _ in range(2000):
        stats.count(one, one, zero)
    assert float(stats.scale) == start


def test_stats_survive_a_checkpoint():
    stats = UpdateStats("cpu")
    for update in range(5):
        stats.count(torch.tensor(2.0), torch.tensor(1.0), torch.tensor(float(update == 3)))
    other = UpdateStats("cpu")
    other.load_state(stats.values)
    assert other.read() == stats.read()


@pytest.mark.parametrize("start", ["", "start.pth"])
@pytest.mark.parametrize("update, warmup, factor", [(0, 9, 0), (3, 6, 0.5), (9, 9, 1), (99, 9, 1), (0, 0, 1)])
def test_warm_up_is_linear_from_zero_and_left_out_with_weights_to_start_from(update, warmup, factor, start):
    config = config_of(optim__warmup=warmup, optim__lr=0.25, flow__pre_train_model=start)
    rate = Training.learning_rate(types.SimpleNamespace(config=config), update)
    assert rate == 0.25 if start else rate == 0.25 * factor


# A whole step of the real networks


def test_whole_step_of_the_cifar_3m_network_dispatches_few_operations_and_reads_nothing():
    config = config_of(model__nf=64, model__num_res_blocks=1, model__ch_mult=(1, 1, 2))
    network = create_model(config).train()
    assert sum(p.numel() for p in network.parameters()) == 3437123
    parameters = list(network.parameters())
    optimizer = create_optimizer(parameters, config.optim)
    ema, stats = ExponentialMovingAverage(parameters, 0.999), UpdateStats("cpu")
    objective, velocity = create_objective(config), velocity_from_network(network)
    batch = types.SimpleNamespace(z0=None, z1=torch.zeros(1, 3, 32, 32), label=None)

    def step(update):
        generator = step_generator(0, update, DRAWS, "cpu")
        loss = objective(velocity, batch, Draws(generator, 1), update).mean()
        loss.backward()
        apply_update(optimizer, ema, stats, loss.detach(), grad_clip=1.0)
        optimizer.zero_grad(set_to_none=True)

    step(0)
    with Operations() as seen:
        step(1)
    assert len(seen.names) <= 1500, collections.Counter(seen.names).most_common(20)
    assert not Operations.READS & set(seen.names)
    assert stats.read()["nonfinite"] == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_on_cuda_needs_nothing_from_the_host(name):
    """On fake CUDA tensors a tensor on the CPU raises, and so does any read; autograd needs a real GPU."""
    config = config_of(data__image_size=16, model__nf=16, model__num_res_blocks=1, model__ch_mult=(1, 2),
                       model__attn_resolutions=(8,), data__reflow_data_root="pairs", flow__use_teacher=True,
                       training__x0_randomness="warmup_10", optim__optimizer=name, optim__weight_decay=0.1)
    networks = [create_model(config).to(memory_format=torch.channels_last) for _ in range(2)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        network, teacher = (each.to_empty(device="cuda") for each in networks)
        objective = create_objective(config, velocity_from_network(teacher), "cuda")
        parameters = list(network.parameters())
        optimizer = create_optimizer(parameters, config.optim)
        ema, stats = ExponentialMovingAverage(parameters, 0.9), UpdateStats("cuda", scaled=True)
        images = torch.zeros(4, 3, 16, 16, device="cuda")
        batch = types.SimpleNamespace(z0=images, z1=images, label=None)
        for update in range(2):
            draws = Draws(None, 4, device="cuda")
            loss = objective(velocity_from_network(network), batch, draws, update).mean()
            assert (loss * stats.scale.float()).device.type == "cuda"
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            with Operations() as seen:
                apply_update(optimizer, ema, stats, loss.detach(), grad_clip=1.0)
        assert sum(name.startswith("aten") for name in seen.names) <= len(parameters) + 150
        moments = [moment for state in optimizer.state.values() for moment in state.values()]
        assert len(moments) == 3 * len(parameters)
        assert {t.device.type for t in (*moments, *ema.shadow_params, stats.values)} == {"cuda"}
        with pytest.raises(DataDependentOutputException):
            stats.read()
