"""The state of a run on disk: written beside the training thread, two generations kept, the newest good one read."""

import os
import pathlib
import threading

import torch

from models.checkpoint import numbered_checkpoints, read_checkpoint, write_checkpoint
from runtime.errors import UserError

STATE, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"


def copy_to_host(value):
    """Return a copy on the CPU of every tensor in nested dicts and lists; other values as they are."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_host(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [copy_to_host(v) for v in value]
    return value


class Writer:
    """Writes checkpoints on a thread of its own, one after the other; a failed write is raised at the next call."""

    def __init__(self):
        self._thread = None
        self._error = None

    def submit(self, state, paths, keep=None):
        """Write `state` (its tensors are copied now) to every path of `paths`; a file called STATE keeps its elder.

        keep: called after the last path is written, e.g. to delete old checkpoints. Raises what the write before
        this one failed with.
        """
        self.wait()
        state = copy_to_host(state)
        self._thread = threading.Thread(target=self._write, args=(state, paths, keep), name="checkpoint-writer")
        self._thread.start()

    def _write(self, state, paths, keep):
        try:
            for path in paths:
                if path.name == STATE and path.exists():
                    _keep_previous(path)
                write_checkpoint(path, state)
            if keep is not None:
                keep()
        except Exception as error:  # handed to the training thread, which raises it
            self._error = error

    def wait(self):
        """Wait until everything submitted is on disk; raise what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _keep_previous(path):
    """Let PREVIOUS name the state that is about to be replaced (a hard link, so both names always exist)."""
    link = path.with_name(f".{PREVIOUS}.{os.getpid()}.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        return
    os.replace(link, path.with_name(PREVIOUS))


def keep_newest(folder, count):
    """Delete all but the `count` newest checkpoint_{k}.pth of `folder` (0: delete none)."""
    if count > 0:
        for path in list(numbered_checkpoints(folder).values())[:-count]:
            path.unlink(missing_ok=True)


def read_newest_state(run, say=print):
    """Return (state, path) of the newest readable state of the run folder `run`, or (None, None) if it has none.

    Candidates: checkpoints-meta/checkpoint.pth, the one before it, then checkpoints/ from the highest number. A
    corrupt one is passed over, saying so. Raises UserError if there are files but none is readable.
    """
    run = pathlib.Path(run)
    meta = run / "checkpoints-meta"
    numbered = list(numbered_checkpoints(run / "checkpoints").values())[::-1]
    candidates = [path for path in (meta / STATE, meta / PREVIOUS, *numbered) if path.exists()]
    reasons = []
    for path in candidates:
        try:
            state = read_checkpoint(path)
        except UserError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            say(f"passed over a broken checkpoint: {reason}; continuing from {path}")
        return state, path
    if reasons:
        raise UserError(f"no checkpoint of {run} can be read: {reasons[0]}")
    return None, None
