"""Which checkpoints an evaluation sweeps over, and waiting for those that training has yet to write."""

import pathlib
import re
import time

from models.checkpoint import numbered_checkpoints
from runtime.errors import UserError

POLL = 5.0  # seconds between looks at the folder, after a while of quicker ones


def run_folder(path):
    """Return the run that a checkpoint file belongs to: the folder above `checkpoints`, or else its own folder."""
    parent = pathlib.Path(path).parent
    return parent.parent if parent.name in ("checkpoints", "checkpoints-meta") else parent


def checkpoint_folder(ckpt_dir):
    """Return the folder with the numbered checkpoints of a run folder (or of a folder that holds them itself)."""
    ckpt_dir = pathlib.Path(ckpt_dir)
    inner = ckpt_dir / "checkpoints"
    return ckpt_dir if not inner.is_dir() and numbered_checkpoints(ckpt_dir) else inner


def sweep(folder, begin, end, skipped):
    """Yield the paths of the checkpoints begin ≤ k ≤ end (end 0: to the newest) that are there now.

    `skipped(k)` is told of each missing number in between, also of one that training has deleted in the meantime.
    Raises UserError if there is none at all.
    """
    found = numbered_checkpoints(folder)
    chosen = [k for k in found if k >= begin and (end == 0 or k <= end)]
    if not chosen:
        there = f"checkpoints {min(found)} to {max(found)} are" if found else "no checkpoint_{k}.pth is"
        raise UserError(f"{there} in {folder}, none between config.eval.begin_ckpt {begin} and "
                        f"config.eval.end_ckpt {end}; choose others, or wait for training to write them "
                        "(evaluation_fid.py does, with --config.eval.wait true)")
    for k in range(begin, (end or chosen[-1]) + 1):
        if k in found and found[k].exists():
            yield found[k]
        else:
            skipped(k)


def sweep_and_wait(folder, begin, end, limit, why_incomplete, last_of):
    """Yield the paths of the checkpoints from `begin` to `end`, waiting at most `limit` seconds for each.

    `why_incomplete(path)` returns None, or a sentence that says what is wrong with the file; it is asked again when
    the file has changed. With `end` 0, `last_of(path)` says which number training will write last (None: it does
    not say; then the sweep ends when no new one comes within the limit). A number that was passed over, because
    newer ones are there and it is not (training keeps only some), is left out.
    Raises UserError, naming the file, when an awaited checkpoint does not come or does not complete.
    """
    k, open_end = begin, end == 0
    while not end or k <= end:
        path = _wait_for(pathlib.Path(folder) / f"checkpoint_{k}.pth", limit, why_incomplete)
        if path is None and open_end and not end and k > begin:
            return
        if path is None:
            raise UserError(f"{folder}/checkpoint_{k}.pth did not come within config.eval.wait_limit; is training "
                            "still running?")
        k = int(re.search(r"(\d+)\.pth$", path.name)[1]) + 1
        if open_end:
            end = last_of(path) or 0
        yield path


def _wait_for(path, limit, why_incomplete):
    """Return `path`, or the next newer checkpoint if `path` was passed over, once it is complete; None: none came."""
    started = time.monotonic()
    seen, why = None, None
    number = int(re.search(r"(\d+)\.pth$", path.name)[1])
    while True:
        newer = [k for k in numbered_checkpoints(path.parent) if k >= number]
        if newer:
            path = path.with_name(f"checkpoint_{newer[0]}.pth")
            try:
                state = path.stat()
            except FileNotFoundError:  # training keeps only the newest ones and has just deleted it
                continue
            if (path, state.st_size, state.st_mtime_ns) != seen:
                seen, why = (path, state.st_size, state.st_mtime_ns), why_incomplete(path)
            if why is None:
                return path
        if time.monotonic() >= started + limit:
            break
        waited = time.monotonic() - started
        time.sleep(min(POLL, 0.05 + waited / 10, max(0.0, started + limit - time.monotonic())))
    if why is not None:
        raise UserError(f"{path} was there but did not become complete within config.eval.wait_limit: {why}")
    return None
