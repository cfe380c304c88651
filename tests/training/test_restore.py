"""Where weights come from: layouts in memory, teachers and pre-trained networks that do not fit."""

import pytest
import torch

from configs.command_line import config_to_dict
from configs.default import get_default_config
from models import create_model
from models.checkpoint import write_checkpoint
from models.ema import ExponentialMovingAverage
from runtime.files import write_json
from runtime.terminal import UserError
from training.state import find_state, load_pretrained, load_teacher, restore, take_architecture
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


def do_update(network, optimizer, ema, stats):
    """Train one update on fixed data."""
    x = torch.linspace(-1, 1, 128).view(2, 1, 8, 8)
    loss = (network(x, torch.ones(2)) - x).square().mean()
    loss.backward()
    apply_update(optimizer, ema, stats, loss.detach(), grad_clip=1.0)
    optimizer.zero_grad()


def state_of(network, optimizer, ema, stats):
    """Return a checkpoint whose tensors are all contiguous, as another program may write it."""
    state = {"model": network.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "step": 3,
             "stats": {"values": stats.values}}

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
    for _ in range(3):
        do_update(network, *parts)
    state = state_of(network, *parts)
    other = create_model(small_config()).to(memory_format=torch.channels_last)
    other_parts = training_parts(other)
    restore(state, other, other_parts[1], other_parts[0], other_parts[2])
    do_update(network, *parts)
    do_update(other, *other_parts)
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    kernels = [p for p in other.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert any(not p.is_contiguous() for p in kernels)  # the layouts did differ


def test_state_of_another_network_is_refused_in_one_sentence():
    network, wider = create_model(small_config()), create_model(small_config(nf=16))
    parts, wider_parts = training_parts(network), training_parts(wider)
    do_update(wider, *wider_parts)
    with pytest.raises(UserError, match="does not fit config.model and config.optim"):
        restore(state_of(wider, *wider_parts), network, parts[1], parts[0], parts[2])


def save(network, config, path):
    """Write a network's checkpoint."""
    optimizer, ema, stats = training_parts(network)
    write_checkpoint(path, {**state_of(network, optimizer, ema, stats), "config": config_to_dict(config)})


@pytest.fixture
def pretrained(tmp_path):
    """A config, in a folder of its own, that starts from a network of 16 channels; its own has 8."""
    config = small_config(nf=16)
    save(create_model(config), config, tmp_path / "wide.pth")
    narrow = small_config()
    narrow.work_dir, narrow.expr, narrow.flow.pre_train_model = str(tmp_path), "run", str(tmp_path / "wide.pth")
    return narrow


def test_a_forgotten_model_flag_is_taken_from_the_pretrained_network_and_a_wrong_one_is_refused(pretrained):
    """Otherwise 2 of 143 tensors fit, warm-up is off, and a random network is trained for days."""
    config, (message,) = take_architecture(pretrained, frozenset())
    assert config.model.nf == 16 and "model.nf (8 there, 16 here)" in message
    assert load_pretrained(create_model(config), config)[0].endswith(", 0 did not")
    with pytest.raises(UserError, match="model.nf is 16 in the checkpoint and 8 here.*flow.pre_train_partial"):
        take_architecture(pretrained, frozenset({"model.nf"}))


def test_a_run_that_is_there_keeps_its_architecture_when_the_pretrained_file_is_gone(pretrained, tmp_path):
    config, _ = take_architecture(pretrained, frozenset())
    write_json(tmp_path / "run" / "config.json", config_to_dict(config))
    (tmp_path / "wide.pth").unlink()
    assert take_architecture(pretrained, frozenset())[0].model.nf == 16


def test_tensors_that_fit_are_copied_where_partial_loading_is_asked_for_and_counted(pretrained):
    narrow = create_model(pretrained)
    with pytest.raises(UserError, match=r"only \d+ of \d+ tensors fit this network.*flow.pre_train_partial"):
        load_pretrained(narrow, pretrained)
    pretrained.flow.pre_train_partial = True
    assert take_architecture(pretrained, frozenset()) == (pretrained, [])
    (message,) = load_pretrained(narrow, pretrained)
    matched = int(message.split(": ")[1].split(" ")[0])
    assert 0 < matched < len(narrow.state_dict()) and f"{len(narrow.state_dict()) - matched} did not" in message


@pytest.mark.parametrize("name, form", [
    ("weights alone", lambda state: {"model": state["model"], "config": state["config"]}),
    ("wrapped", lambda state: state | {"model": {f"module._orig_mod.{k}": v for k, v in state["model"].items()}}),
])
def test_weights_alone_and_wrapped_names_are_enough_to_start_from(name, form, pretrained):
    path = pretrained.flow.pre_train_model
    torch.save(form(torch.load(path, weights_only=True)), path)
    config, _ = take_architecture(pretrained, frozenset())
    assert load_pretrained(create_model(config), config)[0].endswith(", 0 did not")


def test_options_of_the_optimizer_are_those_of_the_run_not_of_the_state_it_goes_on_from():
    """Also those that only a GPU knows: a state of a CUDA run goes on on a CPU."""
    network = create_model(small_config())
    optimizer, ema, stats = training_parts(network)
    do_update(network, optimizer, ema, stats)
    state = state_of(network, optimizer, ema, stats)
    state["optimizer"]["param_groups"][0] |= {"betas": (0.1, 0.2), "eps": 1.0, "weight_decay": 9.0, "capturable": True}
    other = create_model(small_config())
    optimizer, ema, stats = training_parts(other)
    restore(state, other, ema, optimizer, stats)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0)
    do_update(other, optimizer, ema, stats)


def test_another_optimizer_cannot_go_on_and_other_values_are_said(tmp_path):
    there, here = small_config(), small_config()
    there.work_dir = here.work_dir = str(tmp_path)
    there.expr, here.expr, here.training.resume_from = "there", "here", str(tmp_path / "there")
    (tmp_path / "there" / "checkpoints").mkdir(parents=True)
    save(create_model(there), there, tmp_path / "there" / "checkpoints" / "checkpoint_1.pth")
    here.optim.beta1 = 0.5
    said = []
    assert find_state(here, said.append)["step"] == 3
    assert "optim.beta1 (0.9 there, 0.5 here)" in said[0]
    here.optim.optimizer = "RAdam"
    with pytest.raises(UserError, match="was trained with config.optim.optimizer Adam"):
        find_state(here, said.append)


def test_teacher_of_other_images_is_refused(tmp_path):
    config = small_config()
    save(create_model(config), config, tmp_path / "teacher.pth")
    student = small_config()
    student.flow.use_teacher, student.flow.teacher_model = True, str(tmp_path / "teacher.pth")
    student.flow.pre_train_model = "absent.pth"  # the student's start is another network than its teacher
    teacher = load_teacher(student, torch.device("cpu"))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    student.data.image_size = 16
    with pytest.raises(UserError, match="data.image_size is 8 in the checkpoint and 16 here"):
        load_teacher(student, torch.device("cpu"))
    student.flow.use_teacher = False
    assert load_teacher(student, torch.device("cpu")) is None
