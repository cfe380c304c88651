"""The moving average of the weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models.create import create_from_fields
from runtime.terminal import UserError
from tests.helpers import TINY, Operations, same
from training.update import ExponentialMovingAverage


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].bias.requires_grad_(False)
    return net


@given(decay=st.floats(0.0, 1.0), values=st.lists(st.floats(-10, 10), min_size=1, max_size=20))
def test_average_follows_the_formula_with_warm_up(decay, values):
    """shadow ← d·shadow + (1 - d)·p with d = min(decay, (1 + n) / (10 + n)) at update n = 1, 2, …"""
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    ema = ExponentialMovingAverage([p], decay)
    expected = 1.0
    for n, value in enumerate(values, start=1):
        p.data.fill_(value)
        ema.update()
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * value
    assert ema.shadow_params[0].item() == pytest.approx(expected, abs=1e-9)


def test_update_is_three_operations_for_all_parameters():
    ema = ExponentialMovingAverage(network().parameters(), 0.9)
    with Operations() as operations:
        ema.update()
    assert len(operations.names) == 3 and all("_foreach_" in name for name in operations.names)


@pytest.mark.parametrize("keep, moved", [(0.0, False), (1.0, True)])
def test_skipped_update_leaves_the_averages(keep, moved):
    """`keep` decides on the device whether an update counts."""
    net = network()
    ema, plain = (ExponentialMovingAverage(net.parameters(), 0.9) for _ in range(2))
    torch._foreach_add_([p.data for p in net.parameters()], 1.0)
    ema.update(keep=torch.tensor(keep))
    if moved:
        plain.update()
    torch.testing.assert_close(ema.shadow_params, plain.shadow_params)


def test_only_trained_parameters_are_averaged_and_shadows_are_copies():
    net = network()
    ema = ExponentialMovingAverage(net.parameters(), 0.9)
    assert [s.shape for s in ema.shadow_params] == [p.shape for p in net.parameters() if p.requires_grad]
    net[0].weight.data.zero_()
    assert ema.shadow_params[0].abs().sum() > 0


@pytest.mark.parametrize("fields", [{}, {"model.name": "DhariwalUNet", "data.num_classes": 3}])
def test_the_network_computes_with_the_averages_and_keeps_its_own_weights(fields):
    """Also where layers of many blocks are computed as one; a weight that is not averaged stays in use."""
    net, other = (create_from_fields(TINY | fields).eval() for _ in range(2))
    next(net.parameters()).requires_grad_(False)
    ema = ExponentialMovingAverage(net.parameters(), 0.9)
    ema.shadow_params = [torch.full_like(s, 0.01 * (i % 5 + 1)) for i, s in enumerate(ema.shadow_params)]
    other.load_state_dict(net.state_dict())
    for parameter, average in zip(list(other.parameters())[1:], ema.shadow_params, strict=True):
        parameter.data = average
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    inputs = torch.ones(2, 3, 8, 8), torch.tensor([5.0, 900.0]), torch.eye(3)[:2] if fields else None
    with torch.no_grad():
        assert torch.equal(ema.averaged(net)(*inputs), other(*inputs))
        assert not torch.equal(net(*inputs), other(*inputs))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_state_has_the_released_form_and_resumes_in_the_same_architecture_alone():
    """decay, num_updates, shadow_params; a second object goes on where the first was."""
    net = network()
    ema, resumed = (ExponentialMovingAverage(net.parameters(), 0.9) for _ in range(2))
    for _ in range(3):
        torch._foreach_add_([p.data for p in net.parameters()], 1.0)
        ema.update()
    state = ema.state_dict()
    assert list(state) == ["decay", "num_updates", "shadow_params"] and state["num_updates"] == 3
    resumed.load_state_dict(state)
    assert resumed.num_updates == 3 and same(resumed.shadow_params, ema.shadow_params)
    with pytest.raises(UserError, match="another architecture"):
        ema.load_state_dict(ExponentialMovingAverage(nn.Linear(3, 4).parameters(), 0.9).state_dict())
