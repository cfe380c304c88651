"""The folder of a run: what it was started with, and whether a second start may go on in it."""

import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from importlib import metadata

from configs.command_line import load_config, save_config
from configs.default import field_names, get_field
from runtime.errors import UserError
from runtime.files import atomic_path, write_json, write_text

# What may change when a run is continued: how long, how often it reports, and how it uses the machine.
FREE_FIELDS = {
    "work_dir", "training.n_iters", "training.snapshot_sampling", "training.snapshot_freq_for_preemption",
    "training.record_iters", "training.progress", "training.keep_checkpoints", "training.max_skipped",
    "training.resume_from", "data.on_device", "data.cache_dir", "data.skip_corrupt", "data.data_root",
    "data.custom_data_root",
}
FREE_GROUPS = ("sampling.", "eval.")
# Pairs and models that a run was started from may be moved or named otherwise; a change of these two is refused
# all the same, since they say what is learnt.
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "ml_collections", "absl-py", "lpips", "clean-fid")
CHECKOUT = pathlib.Path(__file__).parent.parent
# New files that the patch of a run takes up: code and configs, not data that git was not told to ignore.
LARGEST_NEW_FILE, MOST_NEW_FILES = 2**18, 200


def run_path(config):
    """Return the folder of the run, {work_dir}/{expr}."""
    return pathlib.Path(config.work_dir) / config.expr


def check_same_run(config, path):
    """Raise UserError, naming the fields, if `path` holds a run whose config differs in anything that matters."""
    saved = path / "config.json"
    if not saved.exists():
        return
    before = load_config(saved)
    changed = [
        f"{name} ({get_field(before, name)!r} there, {get_field(config, name)!r} here)"
        for name in field_names()
        if name not in FREE_FIELDS and not name.startswith(FREE_GROUPS)
        and get_field(before, name) != get_field(config, name)
    ]
    if changed:
        raise UserError(f"{path} holds a run with another config: {', '.join(changed)}; choose another "
                        "--config.expr, or remove that folder")


def open_run(config):
    """Create the run folder with all that says how the run was made; return its path.

    config.json is what the run is; command.txt gains a line at each start; versions.json and git.json describe the
    code, uncommitted.patch holds what was not committed. Raises UserError for another run's folder or an unwritable
    place.
    """
    path = run_path(config)
    check_same_run(config, path)
    try:
        for name in ("checkpoints", "checkpoints-meta", "samples"):
            (path / name).mkdir(parents=True, exist_ok=True)
        save_config(config, path / "config.json")
        with open(path / "command.txt", "a") as opened:
            opened.write(shlex.join([sys.executable, *sys.argv]) + "\n")
        write_json(path / "versions.json", versions())
        _record_code(path)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"the run folder {path} cannot be written ({error.strerror}): choose another "
                        "--config.work_dir") from None
    return path


def versions():
    """Return the versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_commit():
    """Return the commit of the checkout that runs, or None outside git."""
    return _git("rev-parse", "HEAD").decode().strip() or None


def _git(*words):
    """Return what git prints, as bytes; nothing outside a checkout."""
    try:
        return subprocess.run(["git", *words], cwd=CHECKOUT, capture_output=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return b""


def uncommitted_changes():
    """Return the patch, as bytes, that leads from the last commit to the code that runs, new files included."""
    listed = _git("ls-files", "--others", "--exclude-standard", "-z").split(b"\0")[:-1]
    paths = {name: CHECKOUT / os.fsdecode(name) for name in listed}
    new = [name for name, path in paths.items() if path.is_file() and path.stat().st_size <= LARGEST_NEW_FILE]
    diff = ("diff", "--binary", "--no-color", "--no-ext-diff")
    added = [_git(*diff, "--no-index", "/dev/null", name) for name in new[:MOST_NEW_FILES]]
    return b"".join([_git(*diff, "HEAD"), *added])


def _record_code(path):
    patch = uncommitted_changes()
    write_text(path / "git.json", json.dumps({"commit": git_commit(), "uncommitted": bool(patch)}) + "\n")
    with atomic_path(path / "uncommitted.patch") as temporary:
        temporary.write_bytes(patch)
