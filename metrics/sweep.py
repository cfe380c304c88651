"""Which checkpoints of a run are evaluated, and waiting for those that training has yet to write."""

import pathlib
import time

from metrics.statistics import raise_everywhere
from models.checkpoint import is_remote, numbered_checkpoints, read_checkpoint
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


def read_checkpoints(ckpt_dir, settings, processes):
    """Yield `read_checkpoint` of the checkpoints that --ckpt_dir and config.eval (`settings`) ask for.

    Process 0 decides which; every process reads the file itself. Raises UserError as `sweep`.
    """
    folder, content = checkpoint_folder(ckpt_dir), None

    def skipped(first, last):
        names = f"checkpoint_{first}.pth" + (" is" if first == last else f" to checkpoint_{last}.pth are")
        processes.say(f"{names} not in {folder}: passed over")

    def last_of(content):
        try:
            training = content["config"]["training"]
            return training["n_iters"] // training["snapshot_freq"]
        except (KeyError, TypeError, ZeroDivisionError):  # a released checkpoint, or a config of another program
            return None

    if is_remote(ckpt_dir) or pathlib.Path(ckpt_dir).is_file():
        found = iter([(ckpt_dir, None)])
    elif settings.wait:
        found = sweep(folder, max(1, settings.begin_ckpt), settings.end_ckpt, read_checkpoint, skipped,
                      settings.wait_limit * 3600, last_of)
    elif pathlib.Path(ckpt_dir).is_dir():
        found = sweep(folder, settings.begin_ckpt, settings.end_ckpt, read_checkpoint, skipped)
    else:
        raise UserError(f"--ckpt_dir {ckpt_dir} is neither a run folder nor a checkpoint file")

    def advance():
        nonlocal content
        path, content = next(found, (None, None))
        return path

    while (path := processes.from_main(advance)) is not None:
        checkpoint = content or read_checkpoint(path)
        replaced = checkpoint["digest"] != processes.share(checkpoint["digest"])
        raise_everywhere(UserError(f"{path} was replaced while it was read") if replaced else None)
        yield checkpoint


def sweep(folder, begin, end, read, skipped, limit=None, last_of=None):
    """Yield (path, read(path)) of the checkpoints begin ≤ k ≤ end (end 0: to the newest) in `folder`.

    `skipped(first, last)` is called with each stretch of numbers that are not there, also where training has deleted
    one in the meantime. With a `limit`, in seconds, the sweep waits so long for each checkpoint: until it is there,
    and until `read`, which raises UserError for a file that is not complete, reads it. With `end` 0 it then ends with
    the number that `last_of(content)` says training will write last (None: it does not say), or when no new one comes.
    Raises UserError if there is none at all, or an awaited one does not come or does not complete.
    """
    folder, awaited, last = pathlib.Path(folder), begin, end or None
    while last is None or awaited <= last:
        found = _next_checkpoint(folder, awaited, limit, read)
        if found is None and limit is not None and (end or last or awaited == begin):
            raise UserError(f"{folder}/checkpoint_{awaited}.pth did not come within config.eval.wait_limit; is "
                            "training still running?")
        if found is None or (last is not None and found[0] > last):
            break
        k, path, content = found
        if k > awaited:
            skipped(awaited, k - 1)
        yield path, content
        awaited = k + 1
        if last_of and not end:
            last = last_of(content)
    if awaited == begin:
        there = numbered_checkpoints(folder)
        there = f"checkpoints {min(there)} to {max(there)} are" if there else "no checkpoint_{k}.pth is"
        raise UserError(f"{there} in {folder}, none between config.eval.begin_ckpt {begin} and "
                        f"config.eval.end_ckpt {end}; choose others, or wait for training to write them "
                        "(evaluation_fid.py does, with --config.eval.wait true)")
    if end >= awaited:
        skipped(awaited, end)


def _next_checkpoint(folder, number, limit, read):
    """Return (k, path, content) of the first checkpoint k ≥ `number` once it is complete; None if there is none."""
    deadline = time.monotonic() + (limit or 0)
    pause, seen, wrong = 0.05, None, None
    while True:
        found = next(((k, path) for k, path in numbered_checkpoints(folder).items() if k >= number), None)
        try:
            if found and (state := (found, found[1].stat().st_size, found[1].stat().st_mtime_ns)) != seen:
                seen = state
                return *found, read(found[1])
        except FileNotFoundError:  # training keeps only the newest ones and has just deleted it
            continue
        except UserError as error:
            if not found[1].exists():
                continue
            if limit is None:
                raise
            wrong = UserError(f"{found[1]} was there but did not become complete within config.eval.wait_limit: "
                              f"{error}")
        if time.monotonic() >= deadline:
            break
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(POLL, pause * 1.2)
    if wrong:
        raise wrong
    return None
