"""The state on disk: what a failed write leaves, which file is read, what is kept."""

import errno
import pathlib
import sys
import threading

import pytest
import torch

from configs.command_line import run_script
from models.checkpoint import numbered_checkpoints, write_checkpoint
from runtime.errors import UserError
from training import state
from training.state import (
    PREVIOUS,
    STATE,
    Writer,
    checkpoint_numbers,
    keep_newest,
    keep_previous,
    read_newest_state,
)

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "rectified_flow" / "digits_rf_gaussian.py")


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
    assert read_newest_state_in(tmp_path)["step"] == 1
    assert {p.name for p in tmp_path.iterdir()} <= {STATE, PREVIOUS}
    writer.submit(checkpoint(3), [path])
    writer.wait()
    assert read_newest_state_in(tmp_path)["step"] == 3


def read_newest_state_in(meta):
    """Return the newest state of a checkpoints-meta folder."""
    run = meta.parent / "run"
    run.mkdir(exist_ok=True)
    link = run / "checkpoints-meta"
    if not link.exists():
        link.symlink_to(meta)
    return read_newest_state(run)[0]


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
    meta, folder = tmp_path / "checkpoints-meta", tmp_path / "checkpoints"
    assert read_newest_state(tmp_path) == (None, None)
    for k in (1, 2, 10):
        write_checkpoint(folder / f"checkpoint_{k}.pth", checkpoint(k))
    (folder / "checkpoint_10.pth").write_bytes(b"broken")
    said = []
    found, path = read_newest_state(tmp_path, said.append)
    assert (found["step"], path.name) == (2, "checkpoint_2.pth") and "checkpoint_10.pth" in said[0]
    write_checkpoint(meta / PREVIOUS, checkpoint(11))
    write_checkpoint(meta / STATE, checkpoint(12))
    assert read_newest_state(tmp_path)[0]["step"] == 12
    (meta / STATE).write_bytes(b"")
    assert read_newest_state(tmp_path)[0]["step"] == 11
    write_checkpoint(folder / "checkpoint_9.pth", checkpoint(9))
    assert read_newest_state(tmp_path)[0]["step"] == 11
    write_checkpoint(folder / "checkpoint_11.pth", checkpoint(13))
    assert read_newest_state(tmp_path)[0]["step"] == 13  # the most updates, wherever they are


def test_moments_of_another_shape_are_passed_over_before_they_are_used(tmp_path):
    """The fused kernels would read beyond them."""
    meta = tmp_path / "checkpoints-meta"
    shadow = torch.zeros(3)
    moment = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    good = checkpoint(5) | {"ema": {"decay": 0.9, "num_updates": 5, "shadow_params": [shadow]},
                            "optimizer": {"state": {0: moment}, "param_groups": [{"params": [0]}]}}
    write_checkpoint(meta / PREVIOUS, good)
    for bad in ({"exp_avg_sq": torch.zeros(1)}, {"exp_avg": None}):
        write_checkpoint(meta / STATE, good | {"step": 6, "optimizer": {"state": {0: moment | bad}}})
        said = []
        assert read_newest_state(tmp_path, said.append)[0]["step"] == 5
        assert "optimizer's exp_avg" in said[0]


@pytest.mark.parametrize("step, frequency, ended, numbers", [
    (1, 20, False, []), (21, 20, False, [1]), (20, 20, False, []), (41, 20, True, [2]), (40, 20, True, [2]),
    (450, 300, True, [2]), (5, 20, True, [1]), (5, 1, False, [4]), (5, 1, True, [4, 5]), (1, 1, True, [1]),
])
def test_a_run_always_ends_with_a_numbered_checkpoint_of_its_last_state(step, frequency, ended, numbers):
    assert checkpoint_numbers(step, frequency, ended) == numbers


def test_a_writer_killed_between_two_states_leaves_no_third_name_of_the_old_one(tmp_path):
    (tmp_path / STATE).write_bytes(b"state")
    for _ in range(2):  # the second time both names are one file already
        keep_previous(tmp_path / STATE)
        assert {path.name for path in tmp_path.iterdir()} == {STATE, PREVIOUS}
        assert (tmp_path / PREVIOUS).samefile(tmp_path / STATE)


def test_no_readable_state_is_an_error_not_a_fresh_start(tmp_path):
    (tmp_path / "checkpoints-meta").mkdir()
    (tmp_path / "checkpoints-meta" / STATE).write_bytes(b"broken")
    with pytest.raises(UserError, match="no checkpoint of .* can be read"):
        read_newest_state(tmp_path)


def test_numbers_not_names_decide_which_checkpoints_are_newest(tmp_path):
    for k in (1, 2, 9, 10):
        write_checkpoint(tmp_path / f"checkpoint_{k}.pth", checkpoint(k))
    (tmp_path / "checkpoint_x.pth").write_bytes(b"")
    assert list(numbered_checkpoints(tmp_path)) == [1, 2, 9, 10]
    keep_newest(tmp_path, 0)
    assert len(numbered_checkpoints(tmp_path)) == 4
    keep_newest(tmp_path, 3)
    assert list(numbered_checkpoints(tmp_path)) == [2, 9, 10] and state.STATE == "checkpoint.pth"
