"""What a run's folder says of the code that ran."""

import subprocess

import pytest

from training import run_folder


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
    monkeypatch.setattr(run_folder, "CHECKOUT", folder)
    return folder


def test_patch_leads_from_the_commit_to_the_code_that_ran(checkout, tmp_path):
    """Also a new file, bytes that are no UTF-8 and names with spaces; not what is ignored, nor large new files."""
    assert run_folder.uncommitted_changes() == b""
    (checkout / "train.py").write_bytes(b"a\nb\xe4\n")
    (checkout / "new config.py").write_text("nf = 8\n")
    (checkout / "noise.bin").write_bytes(bytes(range(256)))
    (checkout / "data.npy").write_bytes(b"0" * (run_folder.LARGEST_NEW_FILE + 1))
    (checkout / "dead").symlink_to("nowhere")
    (checkout / "logs").mkdir()
    (checkout / "logs" / "log.txt").write_text("ignored")
    patch = run_folder.uncommitted_changes()
    git(tmp_path, "clone", "-q", checkout, "clone")
    (tmp_path / "run.patch").write_bytes(patch)
    git(tmp_path / "clone", "apply", tmp_path / "run.patch")
    for name in ("train.py", "new config.py", "noise.bin"):
        assert (tmp_path / "clone" / name).read_bytes() == (checkout / name).read_bytes()
    assert not (tmp_path / "clone" / "data.npy").exists() and b"ignored" not in patch


def test_code_outside_git_has_neither_commit_nor_patch(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "CHECKOUT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run_folder.git_commit() is None and run_folder.uncommitted_changes() == b""
