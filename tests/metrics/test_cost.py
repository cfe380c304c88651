"""What a network costs to use."""

import pytest
import torch

from metrics.cost import cost_line, cost_of, median_ms

CPU = torch.device("cpu")


class Counted(torch.nn.Module):
    """A network that notes what it is called with."""

    config_fields = {"data.image_size": 4, "data.num_channels": 2, "data.num_classes": 3}

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(5, 7)
        self.calls = []

    def forward(self, x, t, label=None):
        self.calls.append((tuple(x.shape), tuple(t.shape), None if label is None else tuple(label.shape)))
        return x


def test_the_cost_counts_parameters_and_two_operations_a_multiplication_and_evaluates_one_image_and_a_batch():
    net = Counted()
    cost = cost_of(net, 1.75, CPU)
    assert cost["parameters"] == 42
    assert (cost["gmacs"], cost["gflops"]) == (1.75, 3.5)
    assert set(net.calls) == {((1, 2, 4, 4), (1,), (1, 3)), ((8, 2, 4, 4), (8,), (8, 3))}
    assert cost["latency_ms"] > 0
    assert cost["batch_latency_ms"] > 0
    assert cost["peak_memory_mib"] > 10
    assert "42 parameters" in cost_line(cost)


def test_unconditional_networks_are_evaluated_without_labels():
    net = Counted()
    net.config_fields = net.config_fields | {"data.num_classes": 0}
    cost_of(net, 1.0, CPU)
    assert {label for _, _, label in net.calls} == {None}


def test_the_first_call_is_not_counted(monkeypatch):
    clock = iter([0.0, 0.0, 9.0, 9.0, 9.1, 9.1])
    monkeypatch.setattr("metrics.cost.time.perf_counter", lambda: next(clock))
    assert median_ms(lambda: None, CPU) == pytest.approx(100)
