"""What a run's folder says of the code and data that ran, who may go on in it, and how a signal ends it."""

import contextlib
import signal
import subprocess

import pytest

from configs import provenance
from configs.command_line import config_to_dict, load_config
from configs.default import set_field
from runtime.files import write_json
from runtime.terminal import UserError
from tests.conftest import ROOT
from training import run


def git(folder, *words):
    """Run git in a folder, as nobody in particular."""
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "color.ui=always"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


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
    monkeypatch.setattr(provenance, "CHECKOUT", folder)
    return folder


def test_patch_has_tracked_changes_alone_and_names_what_is_untracked(checkout, tmp_path):
    """An untracked file may be a private key: its content must not enter the folder of a run."""
    assert provenance.uncommitted_changes() == (b"", [])
    (checkout / "train.py").write_bytes(b"a\nb\xe4\n")
    (checkout / "new key.pem").write_text("SECRET")
    (checkout / "logs").mkdir()
    (checkout / "logs" / "log.txt").write_text("ignored")
    patch, untracked = provenance.uncommitted_changes()
    assert untracked == ["new key.pem"] and b"SECRET" not in patch and provenance.git_commit().endswith("+")
    git(tmp_path, "clone", "-q", checkout, "clone")
    (tmp_path / "run.patch").write_bytes(patch)
    git(tmp_path / "clone", "apply", tmp_path / "run.patch")
    assert (tmp_path / "clone" / "train.py").read_bytes() == b"a\nb\xe4\n"


def test_code_outside_git_has_neither_commit_nor_patch(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git_commit() is None and provenance.uncommitted_changes() == (b"", [])


def config_in(folder, **fields):
    """Return the digits' config of a run in `folder`."""
    config = load_config(ROOT / "configs/rectified_flow/digits_rf_gaussian.py")
    config.work_dir, config.expr = str(folder), "run"
    for name, value in fields.items():
        set_field(config, name.replace("__", "."), value)
    return config


def test_a_second_start_of_a_run_is_refused(tmp_path):
    config = config_in(tmp_path)
    with contextlib.ExitStack() as held, contextlib.ExitStack() as second:
        run.open_run(config, held)
        with pytest.raises(UserError, match="another process is training in"):
            run.open_run(config, second)


def test_a_slash_at_the_end_of_a_path_is_no_other_run(tmp_path):
    config = config_in(tmp_path, data__reflow_data_root="pairs", flow__pre_train_model="a/b.pth")
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "config.json", config_to_dict(config))
    other = config_in(tmp_path, data__reflow_data_root="pairs/", flow__pre_train_model="./a/b.pth",
                      training__compile=True, training__precision="bf16")
    assert run.check_same_run(other, tmp_path / "run") == ["training.precision ('tf32' there, 'bf16' here)"]
    other.flow.pre_train_model = "a/c.pth"
    with pytest.raises(UserError, match="a/c.pth.*training.resume_from"):
        run.check_same_run(other, tmp_path / "run")


def open_run(config):
    """Open a run and let it go again."""
    with contextlib.ExitStack() as held:
        return run.open_run(config, held)


def test_data_that_changed_between_two_starts_are_named(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"one")
    config = config_in(tmp_path, data__dataset="custom", data__data_root=str(tmp_path / "images"))
    assert open_run(config) == [] and open_run(config) == []
    (tmp_path / "images" / "a.png").write_bytes(b"another")
    (said,) = open_run(config)
    assert str(tmp_path / "images") in said and "changed" in said
    assert open_run(config) == []  # said once


def test_schedules_that_are_longer_than_the_run_are_said(tmp_path):
    long = config_in(tmp_path, training__n_iters=20, optim__warmup=21, training__x0_randomness="warmup_cos_21",
                     data__reflow_data_root="pairs")
    assert [text.split(" is longer")[0] for text in run.endless_schedules(long)] == [
        "config.optim.warmup 21", "config.training.x0_randomness warmup_cos_21"]
    fitting = config_in(tmp_path, training__n_iters=20, optim__warmup=20, training__x0_randomness="warmup_20",
                        data__reflow_data_root="pairs")
    assert run.endless_schedules(fitting) == []


def test_the_first_signal_decides_and_only_a_second_ctrl_c_interrupts(monkeypatch):
    with run.stop_requests(1) as agreed:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert agreed() == signal.SIGTERM
    with run.stop_requests(1) as agreed, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        assert agreed() == signal.SIGINT
        signal.raise_signal(signal.SIGINT)


def test_processes_agree_on_a_signal_and_outlive_a_second_ctrl_c(monkeypatch):
    """torchrun sends its workers the Ctrl-C that they had from the terminal."""
    monkeypatch.setattr(run.dist, "new_group", lambda backend: "group")
    monkeypatch.setattr(run.dist, "all_reduce", lambda vote, op, group: vote.fill_(max(vote, from_another)))
    with run.stop_requests(2) as agreed:
        from_another = 0
        assert agreed() == 0
        from_another = signal.SIGTERM
        assert agreed() == signal.SIGTERM
        from_another = 0
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert agreed() == signal.SIGINT
