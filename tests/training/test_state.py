"""The state on disk: what a failed write leaves, which file is read, what is kept."""

import errno
import pathlib
import sys
import threading
import types

import pytest
import torch

from configs.command_line import run_script
from models.checkpoint import write_checkpoint
from runtime.run_folder import STATE, numbered_checkpoints
from runtime.terminal import UserError
from training import state
from training.state import Writer, due_paths, read_newest_state

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "rectified_flow" / "digits_rf_gaussian.py")
run = pathlib.Path("run")


def checkpoint(step):
    """Return a small checkpoint of our layout."""
    from configs.command_line import config_to_dict, load_config

    return {"model": {"a": torch.full((2,), float(step))}, "optimizer": {}, "step": step,
            "ema": {"decay": 0.9, "num_updates": step, "shadow_params": []},
            "config": config_to_dict(load_config(CONFIG))}


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

    monkeypatch.setattr(sys, "argv", ["train.py", "--config", CONFIG])
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


def test_moments_of_another_shape_are_passed_over_before_they_are_used(tmp_path):
    """The fused kernels would read beyond them."""
    shadow = torch.zeros(3)
    moment = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    good = checkpoint(5) | {"ema": {"decay": 0.9, "num_updates": 5, "shadow_params": [shadow]},
                            "optimizer": {"state": {0: moment}, "param_groups": [{"params": [0]}]}}
    write_checkpoint(tmp_path / "checkpoints" / "checkpoint_1.pth", good)
    for bad in ({"exp_avg_sq": torch.zeros(1)}, {"exp_avg": None}):
        write_checkpoint(tmp_path / STATE, good | {"step": 6, "optimizer": {"state": {0: moment | bad}}})
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


def test_no_readable_state_is_an_error_not_a_fresh_start(tmp_path):
    (tmp_path / STATE).parent.mkdir()
    (tmp_path / STATE).write_bytes(b"broken")
    with pytest.raises(UserError, match="no checkpoint of .* can be read"):
        read_newest_state(tmp_path)


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
