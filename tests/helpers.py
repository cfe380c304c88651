"""What many tests need: configs with fields set, command lines, a small checkpoint, and the operations of a call."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configs.command_line import config_to_dict, load_config
from configs.default import get_default_config, set_field
from models.create import create_model
from runtime.devices import Processes
from tests.processes import ROOT

ALONE = Processes(0, 1, torch.device("cpu"))
DIGITS = str(ROOT / "configs/rectified_flow/digits_rf_gaussian.py")
CIFAR10 = str(ROOT / "configs/rectified_flow/cifar10_rf_gaussian.py")
SMALL = {"model__nf": 8, "model__ch_mult": (1,), "model__num_res_blocks": 1, "model__attn_resolutions": (),
         "model__dropout": 0.0}
TINY = {"model.nf": 8, "model.ch_mult": (1, 2), "model.num_res_blocks": 1, "data.image_size": 8,
        "model.attn_resolutions": (4,)}  # of three channels


def config_of(path="", /, **fields):
    """Return the default config, or that of a file, with fields set: flow__eps=0.1, or **{"flow.eps": 0.1}."""
    config = load_config(path) if path else get_default_config()
    for name, value in fields.items():
        set_field(config, name.replace("__", "."), tuple(value) if isinstance(value, list) else value)
    return config


def overrides(**fields):
    """Return the arguments of a command line that set config fields."""
    return [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]


def small_checkpoint(seed=1, step=1, **fields):
    """Return the content of a checkpoint of a small random network for digits; EMA and raw weights differ."""
    config = config_of(DIGITS, **(SMALL | fields))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = create_model(config)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    averages = [0.9 * parameter.detach() for parameter in net.parameters()]
    return {"model": net.state_dict(), "ema": {"decay": 0.9, "num_updates": 1, "shadow_params": averages},
            "optimizer": {}, "step": step, "config": config_to_dict(config)}


def same(a, b):
    """Return whether two nested contents of checkpoints agree: bits and types of tensors, names in their order."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@contextlib.contextmanager
def tf32(allowed):
    """Allow or forbid TF32 within, which monkeypatch cannot restore; give the two backends that have the setting."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        yield backends
    finally:
        for backend, previous in zip(backends, before, strict=True):
            backend.allow_tf32 = previous


class Operations(TorchDispatchMode):
    """The names of the operations dispatched within, such as "aten::add.Tensor"."""

    READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::item"}

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))
