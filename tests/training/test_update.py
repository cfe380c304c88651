"""One update: what is learnt from it, what a non-finite one leaves alone, and that the device is not read."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.ema import ExponentialMovingAverage
from runtime.terminal import UserError
from training.update import UpdateStats, apply_update, check_finite, create_optimizer, warmup_factor

OPTIMIZERS = ("Adam", "AdamW", "RAdam")


def make(name="Adam", lr=0.1, **options):
    """Return a small network, its optimizer, EMA and stats."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    parameters = list(network.parameters())
    optimizer = create_optimizer(parameters, name=name, lr=lr, beta1=0.9, eps=1e-8, weight_decay=0.0, **options)
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


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RAdam"])
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
    check_finite(stats.read(), 4)
    stats.count(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0.0))  # a finite one since does not excuse it
    with pytest.raises(UserError, match="4 updates in a row"):
        check_finite(stats.read(), 3)


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


class Reads(TorchDispatchMode):
    """Counts the operations that read the device, and all of them."""

    def __init__(self):
        super().__init__()
        self.reads, self.operations = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        self.reads += func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::_to_copy.cpu")
        return func(*args, **(kwargs or {}))


def test_update_reads_nothing_from_the_device_and_is_a_handful_of_operations():
    network, optimizer, ema, stats = make()
    step(network, optimizer, ema, stats)
    loss = network(torch.ones(2, 3)).square().mean()
    loss.backward()
    with Reads() as seen:
        apply_update(optimizer, ema, stats, loss.detach(), grad_clip=1.0)
    assert seen.reads == 0
    assert seen.operations < 80


@pytest.mark.parametrize("update, warmup, factor", [(0, 9, 0), (3, 6, 0.5), (9, 9, 1), (99, 9, 1), (0, 0, 1)])
def test_warm_up_is_linear_from_zero(update, warmup, factor):
    assert warmup_factor(update, warmup) == factor
