"""tools/setup_env.sh: the environment of `make`, installed once per content of requirements.txt."""

import subprocess

import pytest

from tests.processes import ROOT

PYTHON = """#!/bin/sh
echo "$@" >> calls.txt
case "$*" in *"{failing}"*) exit 1;; esac
"""


@pytest.fixture
def setup(tmp_path):
    """A function that runs the script with a venv's Python that only writes down its arguments; returns its output."""
    def run(failing="nothing", **environment):
        python = tmp_path / "venv/bin/python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(PYTHON.format(failing=failing))
        python.chmod(0o755)
        (tmp_path / "calls.txt").unlink(missing_ok=True)
        environment |= {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}
        done = subprocess.run(["sh", str(ROOT / "tools/setup_env.sh"), "venv"], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, check=False)
        calls = (tmp_path / "calls.txt").read_text() if (tmp_path / "calls.txt").exists() else ""
        return done.returncode, done.stdout, [line for line in calls.splitlines() if " pip " in line]

    (tmp_path / "requirements.txt").write_text("torch\n")
    return run


def test_it_installs_once_per_content_with_a_pip_that_shows_its_progress(setup, tmp_path):
    status, shown, calls = setup(PIP_FLAGS="--find-links wheels")
    assert status == 0 and "installing requirements.txt" in shown
    upgrade, install = (call.split("--find-links wheels ") for call in calls)
    assert (upgrade[1], install[1]) == ("--quiet --upgrade pip", "-r requirements.txt")
    assert setup() == (0, "", [])
    (tmp_path / "requirements.txt").write_text("torch\nnumpy\n")
    assert setup()[2] and len(list((tmp_path / "venv").glob(".requirements-*"))) == 1


def test_an_old_pip_serves_without_network(setup):
    status, _, calls = setup(failing="--upgrade pip")
    assert status == 0 and calls[-1].endswith("-r requirements.txt")


def test_a_failed_installation_fails_and_is_repeated(setup):
    assert setup(failing="-r requirements.txt")[0] == 1
    assert setup()[0] == 0 and setup()[2] == []


def test_an_older_python_is_refused_in_one_sentence(setup):
    assert setup(failing="sys.version_info") == (1, "", [])
