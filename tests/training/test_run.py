"""What a run's folder says of the code that ran."""

import subprocess

import pytest

from runtime import versions


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
    monkeypatch.setattr(versions, "CHECKOUT", folder)
    return folder


def test_patch_has_tracked_changes_alone_and_names_what_is_untracked(checkout, tmp_path):
    """An untracked file may be a private key: its content must not enter the folder of a run."""
    assert versions.uncommitted_changes() == (b"", [])
    (checkout / "train.py").write_bytes(b"a\nb\xe4\n")
    (checkout / "new key.pem").write_text("SECRET")
    (checkout / "logs").mkdir()
    (checkout / "logs" / "log.txt").write_text("ignored")
    patch, untracked = versions.uncommitted_changes()
    assert untracked == ["new key.pem"] and b"SECRET" not in patch and versions.git_commit().endswith("+")
    git(tmp_path, "clone", "-q", checkout, "clone")
    (tmp_path / "run.patch").write_bytes(patch)
    git(tmp_path / "clone", "apply", tmp_path / "run.patch")
    assert (tmp_path / "clone" / "train.py").read_bytes() == b"a\nb\xe4\n"


def test_code_outside_git_has_neither_commit_nor_patch(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "CHECKOUT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert versions.git_commit() is None and versions.uncommitted_changes() == (b"", [])
