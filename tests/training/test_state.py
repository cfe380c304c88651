"""The state on disk and in memory: what a failed write leaves, which file is read, where weights come from."""

import errno
import pathlib
import sys
import threading
import types

import pytest
import torch

from configs.command_line import config_to_dict, run_script
from models.checkpoint import write_checkpoint
from models.create import create_model
from runtime.files import write_json
from runtime.run_folder import STATE, numbered_checkpoints
from runtime.terminal import UserError
from tests.helpers import DIGITS, SMALL, config_of
from training import state
from training.state import (
    Writer,
    due_paths,
    find_state,
    load_pretrained,
    load_teacher,
    read_newest_state,
    restore,
    take_architecture,
)
from training.update import ExponentialMovingAverage, UpdateStats, apply_update, create_optimizer

run = pathlib.Path("run")


def checkpoint(step):
    """Return a small checkpoint of our layout."""
    return {"model": {"a": torch.full((2,), float(step))}, "optimizer": {}, "step": step,
            "ema": {"decay": 0.9, "num_updates": step, "shadow_params": []},
            "config": config_to_dict(config_of(DIGITS))}


def test_full_disk_leaves_the_state_before_and_is_raised_at_the_next_call(tmp_path, monkeypatch):
    writer, path = Writer(), tmp_path / STATE
    writer.submit(checkpoint(1), [path])
    writer.wait()

    def full(content, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        writer.submit(checkpoint(2), [path])
        with pytest.raises(OSError, match="No space left"):
            writer.wait()
    assert read_newest_state(tmp_path)["step"] == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    writer.submit(checkpoint(3), [path])
    writer.wait()
    assert read_newest_state(tmp_path)["step"] == 3


def test_full_disk_is_one_sentence_for_the_user(monkeypatch, capsys):
    def main(config, args, given):
        raise OSError(errno.ENOSPC, "No space left on device", "logs/run/checkpoint.pth")

    monkeypatch.setattr(sys, "argv", ["train.py", "--config", DIGITS])
    with pytest.raises(SystemExit) as stop:
        run_script(main, "")
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1
    assert "logs/run/checkpoint.pth" in printed and "No space left" in printed


def test_state_that_changes_after_submission_is_written_as_it_was(tmp_path, monkeypatch):
    writer, content, changed = Writer(), checkpoint(1), threading.Event()
    monkeypatch.setattr(state, "write_checkpoint", lambda path, content: changed.wait(30) and write_checkpoint(
        path, content))
    writer.submit(content, [tmp_path / STATE])
    content["model"]["a"].fill_(7)
    changed.set()
    writer.wait()
    assert torch.equal(torch.load(tmp_path / STATE, weights_only=True)["model"]["a"], torch.ones(2))


def test_newest_readable_state_is_found_and_broken_ones_are_named(tmp_path):
    folder, said = tmp_path / "checkpoints", []
    assert read_newest_state(tmp_path) is None
    for k in (1, 2, 10):
        write_checkpoint(folder / f"checkpoint_{k}.pth", checkpoint(k))
    assert read_newest_state(tmp_path)["step"] == 10
    (folder / "checkpoint_10.pth").write_bytes(b"broken")
    found = read_newest_state(tmp_path, said.append)
    assert found["step"] == 2 and "checkpoint_10.pth" in said[0] and "checkpoint_2.pth" in said[0]
    for step, expected in ((12, 12), (1, 2)):  # an older state does not win over a newer checkpoint
        write_checkpoint(tmp_path / STATE, checkpoint(step))
        assert read_newest_state(tmp_path)["step"] == expected
    (tmp_path / STATE).write_bytes(b"")
    assert read_newest_state(tmp_path, said.append)["step"] == 2
    for path in tmp_path.glob("checkpoints*/*"):
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="no checkpoint of .* can be read"):  # rather than a start from scratch
        read_newest_state(tmp_path)


def test_moments_of_another_shape_are_passed_over_before_they_are_used(tmp_path):
    """The fused kernels would read beyond them."""
    shadow = torch.zeros(3)
    moment = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    good = checkpoint(5) | {"ema": {"decay": 0.9, "num_updates": 5, "shadow_params": [shadow]},
                            "optimizer": {"state": {0: moment}, "param_groups": [{"params": [0]}]}}
    write_checkpoint(tmp_path / "checkpoints" / "checkpoint_1.pth", good)
    for bad in (moment | {"exp_avg_sq": torch.zeros(1)}, moment | {"exp_avg": None}, {}, 5):
        write_checkpoint(tmp_path / STATE, good | {"step": 6, "optimizer": {"state": {0: bad}}})
        said = []
        assert read_newest_state(tmp_path, said.append)["step"] == 5
        assert "optimizer's exp_avg" in said[0]


@pytest.mark.parametrize("step, frequency, ended, numbers", [
    (1, 20, False, []), (21, 20, False, [1]), (20, 20, False, []), (41, 20, True, [2]), (40, 20, True, [2]),
    (450, 300, True, [2]), (5, 20, True, [1]), (5, 1, False, [4]), (5, 1, True, [4, 5]), (1, 1, True, [1]),
])
def test_a_run_always_ends_with_a_numbered_checkpoint_and_a_state_that_is_not_older(step, frequency, ended, numbers):
    options = types.SimpleNamespace(snapshot_freq=frequency, snapshot_freq_for_preemption=1000)
    due = [run / f"checkpoints/checkpoint_{k}.pth" for k in numbers]
    assert due_paths(run, step, ended, False, options) == (due and [*due, run / STATE])


@pytest.mark.parametrize("step, stopped, due", [(11, 0, True), (10, 0, False), (1, 0, False), (7, 15, True)])
def test_a_state_is_written_regularly_and_when_the_run_is_stopped(step, stopped, due):
    options = types.SimpleNamespace(snapshot_freq=1000, snapshot_freq_for_preemption=10)
    assert due_paths(run, step, False, stopped, options) == [run / STATE] * due


def test_numbers_not_names_decide_which_checkpoints_are_newest_and_kept(tmp_path):
    folder, writer = tmp_path / "checkpoints", Writer()
    for k in (1, 2, 9, 10):
        writer.submit(checkpoint(k), [folder / f"checkpoint_{k}.pth", tmp_path / STATE])
    writer.wait()
    (folder / "checkpoint_x.pth").write_bytes(b"")
    assert list(numbered_checkpoints(folder)) == [1, 2, 9, 10]
    writer.submit(checkpoint(11), [folder / "checkpoint_11.pth"], keep=3)
    writer.wait()
    assert list(numbered_checkpoints(folder)) == [9, 10, 11]


# Where weights come from


def small_config(**fields):
    """A config of a small grey network."""
    own = {"data__image_size": 8, "data__num_channels": 1, "model__ch_mult": (1, 2), "model__attn_resolutions": (4,)}
    return config_of(**(SMALL | own | fields))


def training_parts(network):
    """Return optimizer, EMA and stats of a network."""
    parameters = list(network.parameters())
    optimizer = create_optimizer(parameters, config_of(optim__lr=1e-2).optim)
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
    network, wider = create_model(small_config()), create_model(small_config(model__nf=16))
    parts, wider_parts = training_parts(network), training_parts(wider)
    do_update(wider, *wider_parts)
    with pytest.raises(UserError, match="does not fit config.model and config.optim"):
        restore(state_of(wider, *wider_parts), network, parts[1], parts[0], parts[2])


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("stats", [torch.zeros(2), {}, {"values": torch.zeros(3)}])
def test_damaged_counters_are_refused_in_one_sentence(stats):
    network = create_model(small_config())
    parts = training_parts(network)
    with pytest.raises(UserError, match="does not fit config.model and config.optim"):
        restore(state_of(network, *parts) | {"stats": stats}, network, parts[1], parts[0], parts[2])


def save(network, config, path):
    """Write a network's checkpoint."""
    optimizer, ema, stats = training_parts(network)
    write_checkpoint(path, {**state_of(network, optimizer, ema, stats), "config": config_to_dict(config)})


@pytest.fixture
def pretrained(tmp_path):
    """A config, in a folder of its own, that starts from a network of 16 channels; its own has 8."""
    config = small_config(model__nf=16)
    save(create_model(config), config, tmp_path / "wide.pth")
    return small_config(work_dir=str(tmp_path), expr="run", flow__pre_train_model=str(tmp_path / "wide.pth"))


def test_a_forgotten_model_flag_is_taken_from_the_pretrained_network_and_a_wrong_one_is_refused(pretrained):
    """Otherwise 2 of 143 tensors fit, warm-up is off, and a random network is trained for days."""
    config, (message,) = take_architecture(pretrained, frozenset())
    assert config.model.nf == 16 and "model.nf (16 there, 8 here)" in message
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
    there = small_config(work_dir=str(tmp_path), expr="there")
    save(create_model(there), there, tmp_path / "there" / "checkpoints" / "checkpoint_1.pth")
    here = small_config(work_dir=str(tmp_path), expr="here", training__resume_from=str(tmp_path / "there"),
                        optim__beta1=0.5)
    said = []
    assert find_state(here, said.append)["step"] == 3
    assert "optim.beta1 (0.9 there, 0.5 here)" in said[0]
    here.optim.optimizer = "RAdam"
    with pytest.raises(UserError, match="was trained with config.optim.optimizer Adam"):
        find_state(here, said.append)


def test_teacher_of_other_images_is_refused(tmp_path):
    config = small_config()
    save(create_model(config), config, tmp_path / "teacher.pth")
    student = small_config(flow__use_teacher=True, flow__teacher_model=str(tmp_path / "teacher.pth"),
                           flow__pre_train_model="absent.pth")  # another network than its teacher
    teacher = load_teacher(student, torch.device("cpu"))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    student.data.image_size = 16
    with pytest.raises(UserError, match="data.image_size is 8 in the checkpoint and 16 here"):
        load_teacher(student, torch.device("cpu"))
    student.flow.use_teacher = False
    assert load_teacher(student, torch.device("cpu")) is None
