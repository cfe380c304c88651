"""Which software made a number: the commit of this checkout and the versions of what decides results."""

import contextlib
import pathlib
import platform
import subprocess
from importlib import metadata

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "ml_collections", "absl-py", "lpips", "clean-fid")
CHECKOUT = pathlib.Path(__file__).parent.parent


def git(*words):
    """Return what git prints about this checkout, as bytes; nothing outside of one."""
    try:
        return subprocess.run(["git", *words], cwd=CHECKOUT, capture_output=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return b""


def git_commit():
    """Return the commit of this checkout, with a + where tracked files differ from it; None outside git."""
    commit = git("rev-parse", "HEAD").decode().strip()
    return commit + "+" * bool(git("status", "--porcelain", "--untracked-files=no")) if commit else None


def uncommitted_changes():
    """Return (the patch of the tracked files, as bytes; the names of untracked files, which may be secret or large)."""
    listed = git("ls-files", "--others", "--exclude-standard", "-z").decode(errors="replace")
    return git("diff", "--binary", "--no-color", "--no-ext-diff", "HEAD"), listed.split("\0")[:-1]


def versions():
    """Return the versions of Python and of the packages that decide results; None for one that is not installed."""
    found = {"python": platform.python_version()} | dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
