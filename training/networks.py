"""Where a run's weights come from: its own state, another run's, a pre-trained network; and the teacher."""

import contextlib

import numpy as np
import torch

from models import load_model
from models.checkpoint import load_matching
from runtime.errors import UserError
from runtime.seeds import DROPOUT
from training.run_folder import run_path
from training.state import read_newest_state


def find_state(config):
    """Return (state, messages): the newest state of this run, else of the run that training.resume_from names.

    (None, []) when the run starts anew. Raises UserError if resume_from has no state.
    """
    messages = []
    state, path = read_newest_state(run_path(config), messages.append)
    other = config.training.resume_from
    if state is None and other:
        state, path = read_newest_state(other, messages.append)
        if state is None:
            raise UserError(f"config.training.resume_from {other} has no checkpoint in checkpoints-meta/ or "
                            "checkpoints/: name the folder of a run")
    if state is not None:
        messages.append(f"continuing from {path}, {state['step']} updates done")
    return state, messages


def restore(state, network, ema, optimizer, guard):
    """Put a checkpoint's weights, EMA, optimizer state and counters in place.

    Raises UserError if it belongs to another network, or another optimizer.
    """
    try:
        network.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        match_layout(optimizer)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the checkpoint does not fit config.model and config.optim: {reason}") from None
    if "guard" in state:  # absent in the released layout
        guard.load_state_dict(state["guard"])


def match_layout(optimizer):
    """Lay every moment out in memory as its parameter is: fused kernels walk both in the order of memory.

    A checkpoint from another program may hold them contiguous where the network is channels_last.
    """
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def load_pretrained(network, config):
    """Copy every tensor of flow.pre_train_model's raw weights that fits; return what to tell about it."""
    path = config.flow.pre_train_model
    if not path:
        return []
    matched, unmatched = load_matching(network, path)
    if not matched:
        raise UserError(f"config.flow.pre_train_model {path}: none of its tensors fits this network")
    message = f"started from {path}: {len(matched)} tensors matched, {len(unmatched)} did not"
    return [message + (f" ({', '.join(unmatched[:4])}{', …' if len(unmatched) > 4 else ''})" if unmatched else "")]


def load_teacher(config, device):
    """Return the frozen teacher (EMA weights, eval mode), or None without flow.use_teacher.

    The teacher is flow.teacher_model, or flow.pre_train_model. Raises UserError if it sees other images or classes.
    """
    if not config.flow.use_teacher:
        return None
    path = config.flow.teacher_model or config.flow.pre_train_model
    teacher = load_model(path, use_ema=True, device=device).requires_grad_(False)
    for name in ("image_size", "num_channels", "num_classes"):
        there, here = teacher.config_fields.get(f"data.{name}"), config.data[name]
        if there is not None and there != here:
            raise UserError(f"the teacher {path} has data.{name} {there}, this run {here}")
    return teacher


@contextlib.contextmanager
def compiler_failures(compiling):
    """Raise a UserError for what torch.compile cannot do here, for instance without a C++ compiler."""
    try:
        yield
    except RuntimeError as error:
        if not (compiling and isinstance(error, torch._dynamo.exc.TorchDynamoException)):
            raise
        cause = getattr(error, "inner_exception", error)
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
        raise UserError(f"config.training.compile is true, but torch.compile fails: {reason}; set it to false, or "
                        "install the compiler that it needs") from error


def seed_dropout(seed, update, rank):
    """Seed torch's global generators, which dropout draws from, by (seed, update, rank)."""
    words = np.random.SeedSequence([seed, update, rank, DROPOUT]).generate_state(2, np.uint32)
    torch.manual_seed(int(words[0]) << 31 ^ int(words[1]))
