"""Which checkpoints an evaluation sweeps over, and waiting for those that training has yet to write."""

import pathlib
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

    `skipped(first, last)` is called with each stretch of missing numbers in between, also of one that training has
    deleted in the meantime. Raises UserError if there is none at all.
    """
    found = numbered_checkpoints(folder)
    chosen = [k for k in found if k >= begin and (end == 0 or k <= end)]
    if not chosen:
        there = f"checkpoints {min(found)} to {max(found)} are" if found else "no checkpoint_{k}.pth is"
        raise UserError(f"{there} in {folder}, none between config.eval.begin_ckpt {begin} and "
                        f"config.eval.end_ckpt {end}; choose others, or wait for training to write them "
                        "(evaluation_fid.py does, with --config.eval.wait true)")
    awaited = begin
    for k in chosen:
        if not found[k].exists():
            continue
        if k > awaited:
            skipped(awaited, k - 1)
        awaited = k + 1
        yield found[k]
    if end >= awaited:
        skipped(awaited, end)


def sweep_and_wait(folder, begin, end, limit, read, last_of):
    """Yield (path, read(path)) of the checkpoints from `begin` to `end`, waiting at most `limit` seconds for each.

    `read(path)` raises UserError for a file that is not complete; it is called again when the file has changed. With
    `end` 0, `last_of(content)` says which number training will write last (None: it does not say; then the sweep ends
    when no new one comes within the limit). A number that was passed over, because newer ones are there and it is
    not (training keeps only some), is left out.
    Raises UserError, naming the file, when an awaited checkpoint does not come or does not complete.
    """
    k, open_end = begin, end == 0
    while not end or k <= end:
        found = _wait_for(pathlib.Path(folder), k, limit, read)
        if found is None and open_end and not end and k > begin:
            return
        if found is None:
            raise UserError(f"{folder}/checkpoint_{k}.pth did not come within config.eval.wait_limit; is training "
                            "still running?")
        k, path, content = found
        k += 1
        if open_end:
            end = last_of(content) or 0
        yield path, content


def _wait_for(folder, number, limit, read):
    """Return (k, path, content) of checkpoint `number`, or the next newer one, once it is complete; None: none came."""
    deadline = time.monotonic() + limit
    pause, seen, wrong = 0.05, None, None
    while True:
        newer = [(k, path) for k, path in numbered_checkpoints(folder).items() if k >= number]
        if newer:
            k, path = newer[0]
            try:
                state = path.stat()
                if (path, state.st_size, state.st_mtime_ns) != seen:
                    seen = path, state.st_size, state.st_mtime_ns
                    return k, path, read(path)
            except FileNotFoundError:  # training keeps only the newest ones and has just deleted it
                continue
            except UserError as error:
                wrong = f"{path} was there but did not become complete within config.eval.wait_limit: {error}"
        if time.monotonic() >= deadline:
            break
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(POLL, pause * 1.2)
    if wrong is not None:
        raise UserError(wrong)
    return None
