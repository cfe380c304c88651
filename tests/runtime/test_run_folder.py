"""Which checkpoints a run has, which of them a sweep visits and how it waits; which code a run used."""

import os
import subprocess
import threading
import time

import pytest

from runtime import run_folder as folders
from runtime.run_folder import checkpoint_folder, git_commit, numbered_checkpoints, sweep, uncommitted_changes
from runtime.terminal import UserError


def touch(folder, *numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for k in numbers:
        (folder / f"checkpoint_{k}.pth").write_bytes(b"complete")


def read(path):
    """Stands for `read_checkpoint`; the config in a checkpoint says that number 2 is the run's last."""
    if not path.exists() or path.read_bytes() != b"complete":
        raise UserError("it is cut short")
    return {"number": int(path.stem.split("_")[1]), "config": {"training": {"n_iters": 1000, "snapshot_freq": 500}}}


def numbers(folder, begin, end, limit=0.0, read=read):
    """The checkpoints that a sweep visits."""
    return [found["number"] for found in sweep(folder, begin, end, limit, read)]


def test_the_numbers_in_the_names_decide_and_other_files_do_not_count(tmp_path):
    for name in ("checkpoint_2.pth", "checkpoint_10.pth", "checkpoint_9.pth", "checkpoint.pth", "checkpoint_x.pth",
                 ".checkpoint_3.17.tmp.pth", "checkpoint_4.pth.part", "checkpoint_010.pth", "checkpoint_٣.pth"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "checkpoint_11.pth").mkdir()
    os.mkfifo(tmp_path / "checkpoint_12.pth")
    found = numbered_checkpoints(tmp_path)
    assert list(found) == [2, 9, 10]
    assert found[9] == tmp_path / "checkpoint_9.pth"
    assert numbered_checkpoints(tmp_path / "absent") == {}
    touch(tmp_path / "run" / "checkpoints", 0, 30)
    assert numbered_checkpoints(checkpoint_folder(tmp_path / "run")) == {
        k: folders.checkpoint_path(tmp_path / "run", k) for k in (0, 30)}


def test_an_open_sweep_goes_to_the_newest_and_tells_of_gaps_without_counting_through_them(tmp_path, capsys):
    touch(tmp_path, 1, 2, 4, 99999999)
    assert numbers(tmp_path, 2, 0) == [2, 4, 99999999]
    assert "checkpoints 3 to 3 are not in" in capsys.readouterr().out
    assert numbers(tmp_path, 1, 2) == [1, 2]
    assert numbers(tmp_path, 4, 10**9) == [4, 99999999]
    assert "checkpoints 5 to 99999998 are" in (said := capsys.readouterr().out)
    assert "checkpoints 100000000 to 1000000000 are" in said


def test_a_checkpoint_that_training_deletes_during_the_sweep_is_told_of_and_left_out(tmp_path, capsys):
    touch(tmp_path, 1, 2, 3)
    found = sweep(tmp_path, 1, 0, 0.0, read)
    assert next(found)["number"] == 1
    (tmp_path / "checkpoint_2.pth").unlink()
    assert [checkpoint["number"] for checkpoint in found] == [3]
    assert "checkpoints 2 to 2 are" in capsys.readouterr().out


def test_the_run_folder_of_a_checkpoint_is_above_its_checkpoints_folder(tmp_path):
    assert folders.run_folder("logs/run/checkpoints/checkpoint_1.pth").as_posix() == "logs/run"
    assert folders.run_folder("downloads/slimflow.pth").as_posix() == "downloads"
    assert folders.run_folder("hf://someone/Slim-Flow/a/x.pth", "w").as_posix() == "w/someone_Slim_Flow_a_x"
    assert folders.run_folder("https://host.org/y/x.pkl", "w").as_posix() == "w/host_org_y_x"
    (tmp_path / "README.md").touch()
    assert folders.run_folder(tmp_path / "model.safetensors") == tmp_path
    (tmp_path / "config.json").touch()  # a folder to be shared
    assert folders.run_folder(tmp_path / "model.safetensors", "w").as_posix() == f"w/{tmp_path.name}"
    assert checkpoint_folder(tmp_path) == tmp_path / "checkpoints"
    touch(tmp_path, 1)
    assert checkpoint_folder(tmp_path) == tmp_path


def test_waiting_goes_on_when_the_awaited_checkpoint_is_complete(tmp_path):
    touch(tmp_path, 1)
    (tmp_path / "checkpoint_2.pth").write_bytes(b"comp")
    started = time.monotonic()
    threading.Timer(0.3, lambda: (tmp_path / "checkpoint_2.pth").write_bytes(b"complete")).start()
    threading.Timer(0.6, lambda: touch(tmp_path, 3)).start()
    assert numbers(tmp_path, 1, 3, 30) == [1, 2, 3]
    assert time.monotonic() - started >= 0.6


@pytest.mark.parametrize("updates", [501, 750, 1000, 1001])  # of 500 for a checkpoint: also a shorter last stretch
def test_an_open_sweep_that_waits_ends_with_the_last_checkpoint_of_the_run(tmp_path, updates):
    touch(tmp_path, 1)
    written = {"config": {"training": {"n_iters": updates, "snapshot_freq": 500}}}
    last = [1] if updates == 501 else [1, 2]
    threading.Timer(0.2, lambda: touch(tmp_path, *last)).start()
    assert numbers(tmp_path, 1, 0, 30, lambda path: written | {"number": read(path)["number"]}) == last


@pytest.mark.parametrize("content", [{}, {"config": {"training": {"n_iters": 1, "snapshot_freq": 0}}}])
def test_an_open_sweep_of_a_run_that_does_not_say_its_end_stops_at_the_limit(tmp_path, content):
    touch(tmp_path, 1, 2)
    assert numbers(tmp_path, 1, 0, 0.1, lambda path: content | {"number": read(path)["number"]}) == [1, 2]


def test_checkpoints_that_training_has_deleted_are_not_waited_for(tmp_path):
    touch(tmp_path, 3, 5)
    assert numbers(tmp_path, 1, 5, 0.1) == [3, 5]


def test_a_checkpoint_that_is_deleted_while_it_is_looked_at_is_passed_over(tmp_path, monkeypatch):
    touch(tmp_path, 1, 2)

    def delete_after_listing(folder):
        found = numbered_checkpoints(folder)
        (tmp_path / "checkpoint_1.pth").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(folders, "numbered_checkpoints", delete_after_listing)
    assert numbers(tmp_path, 1, 2, 30) == [2]


def test_checkpoints_that_are_missing_never_come_or_never_complete_are_named_with_what_is_there(tmp_path):
    touch(tmp_path, 1)
    for folder, begin, limit, said in (
            (tmp_path, 9, 0.0, r"of the checkpoints 9 to 26 in .* none exists \(found: 1\)"),
            (tmp_path / "absent", 1, 0.0, "found: none"),
            (tmp_path, 9, 0.1, "of the checkpoints 9 to 26 in .* none appeared within config.eval.wait_limit")):
        with pytest.raises(UserError, match=said):
            numbers(folder, begin, 26, limit)
    (tmp_path / "checkpoint_2.pth").write_bytes(b"comp")
    with pytest.raises(UserError, match="cut short"):
        numbers(tmp_path, 1, 2, 0.1)


def git(folder, *arguments):
    """Run git in a folder, as nobody in particular."""
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "color.ui=always"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit, which the run folder takes for its own."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "train.py").write_text("a\nb\n")
    (folder / ".gitignore").write_text("logs/\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "start")
    monkeypatch.setattr(folders, "CHECKOUT", folder)
    return folder


def test_patch_has_tracked_changes_alone_and_names_what_is_untracked(checkout, tmp_path):
    """An untracked file may be a private key: its content must not enter the folder of a run."""
    assert uncommitted_changes() == (b"", [])
    (checkout / "train.py").write_bytes(b"a\nb\xe4\n")
    (checkout / "new key.pem").write_text("SECRET")
    (checkout / "logs").mkdir()
    (checkout / "logs" / "log.txt").write_text("ignored")
    patch, untracked = uncommitted_changes()
    assert untracked == ["new key.pem"] and b"SECRET" not in patch and git_commit().endswith("+")
    git(tmp_path, "clone", "-q", checkout, "clone")
    (tmp_path / "run.patch").write_bytes(patch)
    git(tmp_path / "clone", "apply", tmp_path / "run.patch")
    assert (tmp_path / "clone" / "train.py").read_bytes() == b"a\nb\xe4\n"


def test_code_outside_git_has_neither_commit_nor_patch(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "CHECKOUT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None and uncommitted_changes() == (b"", [])
