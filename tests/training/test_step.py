"""A whole training step of the real networks: operations dispatched, reads of the device, placement on `meta`."""

import types
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from configs.default import get_default_config
from flows.objective import Draws, create_objective
from flows.rectified_flow import velocity_from_network
from models import create_model
from models.ema import ExponentialMovingAverage
from runtime.seeds import DRAWS, step_generator
from training.update import UpdateStats, apply_update, create_optimizer


class Operations(TorchDispatchMode):
    """Counts dispatched operations by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def cifar_3m():
    """The CIFAR-10 config of the 3.4M network."""
    config = get_default_config()
    config.model.nf, config.model.num_res_blocks, config.model.ch_mult = 64, 1, (1, 1, 2)
    return config


def test_whole_step_of_the_cifar_3m_network_dispatches_few_operations_and_reads_nothing():
    config = cifar_3m()
    network = create_model(config).train()
    assert sum(p.numel() for p in network.parameters()) == 3437123
    parameters = list(network.parameters())
    optimizer = create_optimizer(parameters, name="Adam", lr=2e-4, beta1=0.9, eps=1e-8, weight_decay=0)
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
    assert sum(seen.names.values()) <= 1500, seen.names.most_common(20)
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::item"} & set(seen.names)
    assert stats.read()["nonfinite"] == 0


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RAdam"])
def test_update_on_cuda_needs_nothing_from_the_host(name):
    """On fake CUDA tensors a tensor on the CPU raises, and so does any read; autograd needs a real GPU."""
    config = get_default_config()
    config.data.image_size, config.model.nf, config.model.num_res_blocks = 16, 16, 1
    config.model.ch_mult, config.model.attn_resolutions = (1, 2), (8,)
    config.data.reflow_data_root, config.flow.use_teacher = "pairs", True
    config.training.x0_randomness = "warmup_10"
    networks = [create_model(config).to(memory_format=torch.channels_last) for _ in range(2)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        network, teacher = (each.to_empty(device="cuda") for each in networks)
        objective = create_objective(config, velocity_from_network(teacher), "cuda")
        parameters = list(network.parameters())
        optimizer = create_optimizer(parameters, name=name, lr=1e-3, beta1=0.9, eps=1e-8, weight_decay=0.1)
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
        assert sum(n for name, n in seen.names.items() if name.startswith("aten")) <= len(parameters) + 150
        moments = [moment for state in optimizer.state.values() for moment in state.values()]
        assert len(moments) == 3 * len(parameters)
        assert {t.device.type for t in (*moments, *ema.shadow_params, stats.values)} == {"cuda"}
        with pytest.raises(DataDependentOutputException):
            stats.read()


@pytest.mark.parametrize("name", ["ncsnpp", "DhariwalUNet"])
@pytest.mark.parametrize("pairs", [False, True], ids=["images", "annealed pairs with a teacher"])
def test_step_stays_on_the_device_of_the_network(name, pairs):
    """On `meta` any tensor made on the CPU and any read of a value raises, forward and backward."""
    config = get_default_config()
    config.data.image_size, config.data.num_classes = 16, 10 if name == "DhariwalUNet" else 0
    config.model.name, config.model.nf, config.model.num_res_blocks = name, 16, 1
    config.model.ch_mult, config.model.attn_resolutions = (1, 2), (8,)
    if pairs:
        config.data.reflow_data_root, config.flow.use_teacher = "pairs", True
        config.training.x0_randomness = "warmup_10"
    network, teacher = (create_model(config).to("meta") for _ in range(2))
    velocity = velocity_from_network(network)
    objective = create_objective(config, velocity_from_network(teacher), "meta")
    images = torch.zeros(4, 3, 16, 16, device="meta")
    label = torch.zeros(4, 10, device="meta") if config.data.num_classes else None
    batch = types.SimpleNamespace(z0=images if pairs else None, z1=images, label=label)
    loss = objective(velocity, batch, Draws(None, 4, device="meta"), 3).mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in network.parameters())
    parameters = list(network.parameters())
    optimizer = create_optimizer(parameters, name="RAdam", lr=0.1, beta1=0.9, eps=1e-8, weight_decay=0.1)
    ema, stats = ExponentialMovingAverage(parameters, 0.9), UpdateStats("meta")
    apply_update(optimizer, ema, stats, loss.detach(), grad_clip=1.0)
