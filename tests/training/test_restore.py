"""Where weights come from: layouts in memory, teachers and pre-trained networks that do not fit."""

import copy

import pytest
import torch

from configs.default import get_default_config
from models import create_model
from models.checkpoint import write_checkpoint
from models.ema import ExponentialMovingAverage
from runtime.errors import UserError
from training.state import load_pretrained, load_teacher, restore
from training.update import UpdateStats, apply_update, create_optimizer


def small_config(**model):
    """A config of a small grey network."""
    config = get_default_config()
    config.data.image_size, config.data.num_channels = 8, 1
    config.model.nf, config.model.num_res_blocks, config.model.ch_mult = 8, 1, (1, 2)
    config.model.attn_resolutions, config.model.dropout = (4,), 0.0
    config.model.update(model)
    return config


def training_parts(network):
    """Return optimizer, EMA and stats of a network."""
    parameters = list(network.parameters())
    optimizer = create_optimizer(parameters, name="Adam", lr=1e-2, beta1=0.9, eps=1e-8, weight_decay=0)
    return optimizer, ExponentialMovingAverage(parameters, 0.9), UpdateStats("cpu")


def do_update(network, optimizer, ema, stats, update):
    """Train one update on fixed data."""
    x = torch.linspace(-1, 1, 128).view(2, 1, 8, 8)
    loss = (network(x, torch.ones(2)) - x).square().mean()
    loss.backward()
    apply_update(update, optimizer, ema, stats, loss.detach(), grad_clip=1.0)
    optimizer.zero_grad()


def state_of(network, optimizer, ema, stats):
    """Return a checkpoint whose tensors are all contiguous, as another program may write it."""
    state = {"model": network.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "step": 3,
             "stats": stats.state_dict()}

    def contiguous(value):
        if isinstance(value, torch.Tensor):
            return value.detach().clone(memory_format=torch.contiguous_format)
        if isinstance(value, dict):
            return {key: contiguous(v) for key, v in value.items()}
        return [contiguous(v) for v in value] if isinstance(value, list) else value

    return contiguous(state)


def test_moments_saved_in_another_memory_layout_meet_their_own_parameters():
    torch.manual_seed(0)
    network = create_model(small_config()).to(memory_format=torch.channels_last)
    parts = training_parts(network)
    for update in range(3):
        do_update(network, *parts, update)
    state = state_of(network, *parts)
    other = create_model(small_config()).to(memory_format=torch.channels_last)
    other_parts = training_parts(other)
    restore(state, other, other_parts[1], other_parts[0], other_parts[2])
    do_update(network, *parts, 3)
    do_update(other, *other_parts, 3)
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    kernels = [p for p in other.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert any(not p.is_contiguous() for p in kernels)  # the layouts did differ


def test_state_of_another_network_is_refused_in_one_sentence():
    network, wider = create_model(small_config()), create_model(small_config(nf=16))
    parts, wider_parts = training_parts(network), training_parts(wider)
    do_update(wider, *wider_parts, 0)
    with pytest.raises(UserError, match="does not fit config.model and config.optim"):
        restore(state_of(wider, *wider_parts), network, parts[1], parts[0], parts[2])


def save(network, config, path):
    """Write a network's checkpoint."""
    from configs.command_line import config_to_dict

    optimizer, ema, stats = training_parts(network)
    write_checkpoint(path, {**state_of(network, optimizer, ema, stats), "config": config_to_dict(config)})


def test_pretrained_weights_of_another_width_are_counted(tmp_path):
    config = small_config(nf=16)
    save(create_model(config), config, tmp_path / "wide.pth")
    narrow_config = small_config()
    narrow_config.flow.pre_train_model = str(tmp_path / "wide.pth")
    with pytest.raises(UserError, match=r"only \d+ of \d+ tensors fit this network.*flow.pre_train_partial"):
        load_pretrained(create_model(narrow_config), narrow_config)
    narrow_config.flow.pre_train_partial = True
    narrow = create_model(narrow_config)
    before = copy.deepcopy(narrow.state_dict())
    (message,) = load_pretrained(narrow, narrow_config)
    matched = int(message.split(": ")[1].split(" ")[0])
    assert 0 < matched < len(before) and f"{len(before) - matched} did not" in message
    same_config = small_config(nf=16)
    same_config.flow.pre_train_model = str(tmp_path / "wide.pth")
    assert load_pretrained(create_model(same_config), same_config)[0].endswith(", 0 did not")


def test_teacher_of_other_images_is_refused(tmp_path):
    config = small_config()
    save(create_model(config), config, tmp_path / "teacher.pth")
    student = small_config()
    student.flow.use_teacher, student.flow.pre_train_model = True, str(tmp_path / "teacher.pth")
    teacher = load_teacher(student, torch.device("cpu"))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    student.data.image_size = 16
    with pytest.raises(UserError, match="the teacher .* has data.image_size 8, this run 16"):
        load_teacher(student, torch.device("cpu"))
    student.flow.use_teacher = False
    assert load_teacher(student, torch.device("cpu")) is None
