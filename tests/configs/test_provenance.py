"""What a run was trained on comes from its checkpoint, in every script; which code ran is in the run's folder."""

import json
import subprocess

import pytest

from configs import provenance
from configs.command_line import config_to_dict
from configs.default import get_default_config, get_field
from configs.provenance import take_run_fields
from runtime.terminal import UserError
from tests.helpers import config_of


def taken(config, run, *given):
    """Return (remarks, the fields that are the run's now) of a config and the config of a run."""
    saved = json.loads(json.dumps(config_to_dict(run)))
    remarks = take_run_fields(config, saved, frozenset(given), "c.pth")
    return remarks, {name for name in ("data.dataset", "data.data_root", "flow.eps", "sampling.init_noise_scale")
                     if get_field(config, name) == get_field(run, name)}


RUN = {"data__dataset": "custom", "data__data_root": "/own", "flow__eps": 0.1, "sampling__init_noise_scale": 2.0}


def test_data_set_eps_and_noise_scale_are_the_runs_and_the_config_files_are_named():
    remarks, own = taken(config_of(data__cache_dir="/here"), config_of(**RUN))
    assert own == {"data.dataset", "data.data_root", "flow.eps", "sampling.init_noise_scale"}
    assert len(remarks) == 1
    assert "data.dataset 'custom' (not 'CIFAR10')" in remarks[0] and "flow.eps 0.1 (not 0.001)" in remarks[0]
    assert taken(config_of(**RUN), config_of(**RUN)) == ([], own)


def test_the_command_line_wins_and_is_said_to_contradict():
    remarks, own = taken(config_of(flow__eps=0.01), config_of(**RUN), "flow.eps")
    assert own == {"data.dataset", "data.data_root", "sampling.init_noise_scale"}
    assert remarks[0] == "trained with flow.eps 0.1, but 0.01 of the command line is used"
    remarks, own = taken(config_of(data__data_root="/moved"), config_of(**RUN), "data.data_root")
    assert own == {"data.dataset", "flow.eps", "sampling.init_noise_scale"} and "'/moved' of the command" in remarks[0]


def test_a_data_set_of_the_command_line_is_not_looked_for_in_the_runs_folder():
    config = config_of(data__dataset="digits")
    remarks, own = taken(config, config_of(**RUN), "data.dataset")
    assert own == {"flow.eps", "sampling.init_noise_scale"} and config.data.data_root == ""
    assert "trained with data.dataset 'custom', but 'digits' of the command line is used" in remarks


def test_where_this_machine_keeps_a_usual_data_set_is_the_configs_matter():
    config = config_of(data__data_root="/disk/cifar", data__cache_dir="/disk/cache", data__on_device="false")
    assert taken(config, config_of(data__cache_dir="/theirs"))[0] == []
    assert (config.data.data_root, config.data.cache_dir) == ("/disk/cifar", "/disk/cache")


def test_a_config_without_the_groups_changes_nothing_and_a_damaged_one_is_named():
    config = get_default_config()
    assert take_run_fields(config, {}, frozenset(), "released.pth") == [] and config == get_default_config()
    with pytest.raises(UserError, match=r"c\.pth: config\.flow\.eps must be a number, not 'x'"):
        take_run_fields(config, {"flow": {"eps": "x"}}, frozenset(), "c.pth")


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
