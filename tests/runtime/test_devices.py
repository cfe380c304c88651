"""Arithmetic of float32 on GPUs, networks compiled for sampling, and failures in one sentence."""

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from flows.rectified_flow import velocity_from_network
from flows.samplers import create_sampler
from models.create import create_model
from models.edm import Preconditioned
from runtime.devices import compiled, explained, in_precision, set_precision
from runtime.terminal import UserError
from tests.helpers import DIGITS, SMALL, config_of, tf32

CLASSES = {"data__num_classes": 10}
ADM = {"model__name": "DhariwalUNet", **CLASSES}


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("tf32", True), ("bf16", True), ("fp16", True)])
def test_tf32_is_allowed_at_every_precision_except_fp32(precision, allowed):
    with tf32(not allowed) as backends:
        set_precision(precision)
        assert [backend.allow_tf32 for backend in backends] == [allowed, allowed]


def lively(config, kind=None, seed=0):
    """A network with random weights, with EDM's preconditioning of this kind if one is given."""
    torch.manual_seed(seed)
    net = create_model(config).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Preconditioned(net, kind) if kind else net


@pytest.mark.parametrize(("sampler", "own", "kind", "precision", "reverse"), [
    ("heun", CLASSES, None, "fp32", False), ("euler", ADM, "edm", "fp32", True), ("edm", {}, "ve", "fp32", False),
    ("cm_stochastic", {}, "vp", "bf16", False), ("rk45", {}, None, "fp32", True)])
def test_compiled_network_is_one_graph_whose_samples_are_the_same(sampler, own, kind, precision, reverse, cuda_graphs):
    config = config_of(DIGITS, **(SMALL | own), sampling__use_ode_sampler=sampler, sampling__sample_N=4, flow__eps=0.01,
                       sampling__ode_tol=0.03, training__compile=True)
    net, sample = lively(config, kind), create_sampler(config, reverse=reverse, T=0.99, shrink_slots=True)
    names, found = list(net.state_dict()), []
    z, label = torch.randn(11, 1, 8, 8), torch.eye(10)[torch.arange(11) % 10] if own else None
    for network in (net, compiled(net, config.training)):
        velocity = velocity_from_network(in_precision(network, precision, "cpu"))
        found.append([part for count in (11, 3) for part in  # the last batch of each is smaller
                      sample(velocity, z[:count], label if label is None else label[:count], batch_size=4)])
    tolerance = 1e-4 if precision == "fp32" else 0.1
    for eager, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=tolerance, atol=tolerance)
    assert cuda_graphs == ["default"]
    assert list(net.state_dict()) == names


def test_networks_of_one_architecture_share_the_graph_and_a_larger_batch_gets_its_own(cuda_graphs):
    config = config_of(DIGITS, **SMALL, training__compile=True, training__compile_mode="reduce-overhead")
    for seed in range(10):  # more than Dynamo compiles
        net = lively(config, seed=seed)
        velocity = velocity_from_network(compiled(net, config.training))
        for count in (2, 1):
            x, t = torch.randn(count, 1, 8, 8), torch.full((count,), 0.5)
            with torch.no_grad():
                torch.testing.assert_close(velocity(x, t), velocity_from_network(net)(x, t))
    assert cuda_graphs == ["reduce-overhead"]
    x, t = torch.randn(3, 1, 8, 8), torch.full((3,), 0.5)
    with torch.inference_mode():
        torch.testing.assert_close(velocity(x, t), velocity_from_network(net)(x, t))
    assert len(cuda_graphs) == 2


def test_network_is_called_itself_unless_it_is_to_be_compiled():
    net = torch.nn.Identity()
    assert compiled(net, config_of().training) is net


@pytest.mark.parametrize(("error", "sentence"), [
    (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: lower it"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: lower it"),
    (BackendCompilerFailed(print, torch.OutOfMemoryError("CUDA out of memory"), None), "out of memory: lower it"),
    (BackendCompilerFailed(print, OSError("no g++\nsearched"), None),
     "config.training.compile is true, but torch.compile fails: OSError: no g..; set it to false, or install"),
])
def test_what_memory_and_compiler_cannot_do_is_one_sentence(error, sentence):
    with pytest.raises(UserError, match=sentence), explained("lower it"):
        raise error


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="shapes differ"), explained("lower it"):
        raise RuntimeError("shapes differ")
