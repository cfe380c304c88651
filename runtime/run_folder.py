"""The folder of a run, {work_dir}/{expr}: its files, its checkpoints, also those still to come, and the code it ran."""

import contextlib
import itertools
import pathlib
import platform
import re
import subprocess
import time
from importlib import metadata

from runtime.terminal import UserError, print_message

CONFIG, DATA, LOG, SAMPLES, CHECKPOINTS = "config.json", "data.json", "log.jsonl", "samples", "checkpoints"
STATE = "checkpoints-meta/checkpoint.pth"  # from which an interrupted run continues
RESULTS, GRIDS = "eval/results.jsonl", "eval_sample"  # of evaluation_fid.py and image_sampling.py
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "ml_collections", "absl-py", "lpips", "clean-fid")
CHECKOUT = pathlib.Path(__file__).parent.parent
POLL = 5.0  # longest time between two checks of the folder, in seconds


def run_path(config):
    """Return the folder of the run, {work_dir}/{expr}."""
    return pathlib.Path(config.work_dir) / config.expr


def run_folder(path, work_dir="logs"):
    """Return the run folder of a checkpoint: the parent of checkpoints/, or else its own folder; a folder as it is.

    A shared file, remote or in a folder of `tools.convert --hub`, has one in `work_dir`.
    """
    if "://" in str(path):  # named after the whole address, since other repositories may have the same file name
        return pathlib.Path(work_dir, re.sub(r"\W+", "_", str(path).partition("://")[2].rpartition(".")[0]))
    if pathlib.Path(path).is_dir():
        return pathlib.Path(path)
    parent = pathlib.Path(path).parent
    if (parent / "README.md").is_file() and (parent / CONFIG).is_file():
        return pathlib.Path(work_dir, parent.resolve().name)
    return parent.parent if parent.name in (CHECKPOINTS, pathlib.Path(STATE).parent.name) else parent


def checkpoint_path(folder, k):
    """Return the file of checkpoint k of the run in `folder`."""
    return pathlib.Path(folder) / CHECKPOINTS / f"checkpoint_{k}.pth"


def numbered_checkpoints(folder):
    """Return {k: path} of the files checkpoint_{k}.pth in `folder`, in the order of k."""
    found = ((re.fullmatch(r"checkpoint_(0|[1-9][0-9]*)\.pth", path.name), path)
             for path in pathlib.Path(folder).glob("*.pth") if path.is_file())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def checkpoint_folder(ckpt_dir):
    """Return the folder with the numbered checkpoints of a run folder (or of a folder that holds them itself)."""
    inner = pathlib.Path(ckpt_dir) / CHECKPOINTS
    return inner.parent if not inner.is_dir() and numbered_checkpoints(inner.parent) else inner


def last_number(updates, frequency):
    """Return the k of the last checkpoint_k of a run of `updates` ≥ 1 updates (see `training.state.due_paths`)."""
    return updates if frequency == 1 else max(1, -(-(updates - 1) // frequency))


def sweep(folder, begin, end, limit, read):
    """Yield `read(path)` of the checkpoints begin ≤ k ≤ end (end 0: to the newest) in `folder`.

    limit: seconds to wait for each checkpoint to exist and to be complete (`read` raises UserError for an incomplete
    one). With a limit and `end` 0 the sweep ends with the run's last checkpoint, according to the config in each one,
    or when no new one appears. Raises UserError if there is none at all, or if an expected one does not appear.
    """
    awaited, last, k = begin, end, None
    while not last or awaited <= last:
        k, content = _next_checkpoint(folder, awaited, limit, read)
        if k is None or last and k > last:
            break
        if k > awaited:
            print_message(f"checkpoints {awaited} to {k - 1} are not in {folder}: skipped")
        yield content
        awaited = k + 1
        if limit and not end:
            with contextlib.suppress(KeyError, TypeError, ZeroDivisionError):  # no such fields
                options = content["config"]["training"]
                last = last_number(options["n_iters"], options["snapshot_freq"])
    if awaited == begin or (limit and last and k is None):
        there = ", ".join(map(str, itertools.islice(numbered_checkpoints(folder), 40))) or "none; is it a run folder?"
        within = "appeared within config.eval.wait_limit" if limit else "exists"
        raise UserError(f"of the checkpoints {awaited} to {last or 'the newest'} in {folder} none {within} (found: "
                        f"{there}): choose others with config.eval.begin_ckpt and end_ckpt, or wait for training to "
                        "write them, with --config.eval.wait true")
    if end >= awaited:
        print_message(f"checkpoints {awaited} to {end} are not in {folder}: skipped")


def _next_checkpoint(folder, number, limit, read):
    """Return (k, content) of the first checkpoint k ≥ `number` once it is complete; (None, None) if none comes."""
    deadline, pause = time.monotonic() + limit, 0.05
    while True:
        error, found = None, [(k, path) for k, path in numbered_checkpoints(folder).items() if k >= number]
        try:
            if found:
                return found[0][0], read(found[0][1])
        except (UserError, FileNotFoundError) as caught:
            if not found[0][1].exists():  # training keeps only the newest ones and has just deleted it
                continue
            error = caught
        if time.monotonic() < deadline:
            time.sleep(min(pause, limit))
            pause = min(POLL, pause * 1.2)
        elif error:
            raise error
        else:
            return None, None


def git(*arguments):
    """Return what git prints about this checkout, as bytes; empty outside of one."""
    try:
        return subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return b""


def git_commit():
    """Return the commit of this checkout, with a + if tracked files differ from it; None outside git."""
    commit = git("rev-parse", "HEAD").decode().strip()
    return commit + "+" * bool(git("status", "--porcelain", "--untracked-files=no")) if commit else None


def uncommitted_changes():
    """Return (the patch of the tracked files, as bytes; the names of untracked files and folders, whose content may be
    secret or large)."""
    listed = git("ls-files", "--others", "--exclude-standard", "--directory", "-z").decode(errors="replace")
    return git("diff", "--binary", "--no-color", "--no-ext-diff", "HEAD"), listed.split("\0")[:-1]


def versions():
    """Return the versions of Python and of the packages that decide results; None for one that is not installed."""
    found = {"python": platform.python_version()} | dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
