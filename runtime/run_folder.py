"""The folder of a run, {work_dir}/{expr}: the names of its files, its checkpoints, and those still to be written."""

import contextlib
import itertools
import pathlib
import re
import time

from runtime.terminal import UserError

CONFIG, LOG, SAMPLES, CHECKPOINTS = "config.json", "log.jsonl", "samples", "checkpoints"
STATE = "checkpoints-meta/checkpoint.pth"  # from which a stopped run goes on
RESULTS, GRIDS = "eval/results.jsonl", "eval_sample"  # of evaluation_fid.py and image_sampling.py
POLL = 5.0  # seconds between looks at the folder, after a while of quicker ones


def run_path(config):
    """Return the folder of the run, {work_dir}/{expr}."""
    return pathlib.Path(config.work_dir) / config.expr


def run_folder(path):
    """Return the run of a checkpoint file: the folder above `checkpoints`, or else its own; of a folder itself."""
    if pathlib.Path(path).is_dir():
        return pathlib.Path(path)
    parent = pathlib.Path(path).parent
    return parent.parent if parent.name in (CHECKPOINTS, pathlib.Path(STATE).parent.name) else parent


def numbered_checkpoints(folder):
    """Return {k: path} of the files checkpoint_{k}.pth in `folder`, in the order of k."""
    found = ((re.fullmatch(r"checkpoint_(0|[1-9][0-9]*)\.pth", path.name), path)
             for path in pathlib.Path(folder).glob("*.pth") if path.is_file())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def checkpoint_folder(ckpt_dir):
    """Return the folder with the numbered checkpoints of a run folder (or of a folder that holds them itself)."""
    ckpt_dir = pathlib.Path(ckpt_dir)
    inner = ckpt_dir / CHECKPOINTS
    return ckpt_dir if not inner.is_dir() and numbered_checkpoints(ckpt_dir) else inner


def sweep(folder, begin, end, limit, read):
    """Yield `read(path)` of the checkpoints begin ≤ k ≤ end (end 0: to the newest) in `folder`.

    A line tells of numbers that are not there, also where training has deleted one in the meantime. With a `limit`, in
    seconds, the sweep waits so long for each checkpoint to be there and to be complete: `read` raises UserError for one
    that is not. With `end` 0 it then ends with the last one that the checkpoint's config says training will write, or
    when no new one comes. Raises UserError if there is none at all, or an awaited one does not come or complete.
    """
    awaited, last, k = begin, end, None
    while not last or awaited <= last:
        k, content = _next_checkpoint(folder, awaited, limit, read)
        if k is None or last and k > last:
            break
        if k > awaited:
            print(f"checkpoints {awaited} to {k - 1} are not in {folder}: passed over", flush=True)
        yield content
        awaited = k + 1
        if limit and not end:
            with contextlib.suppress(KeyError, TypeError, ZeroDivisionError):  # its config does not tell
                last = content["config"]["training"]["n_iters"] // content["config"]["training"]["snapshot_freq"]
    if awaited == begin or (limit and last and k is None):
        there = ", ".join(map(str, itertools.islice(numbered_checkpoints(folder), 40))) or "none; is it a run folder?"
        within = "came within config.eval.wait_limit" if limit else "is there"
        raise UserError(f"of the checkpoints {awaited} to {last or 'the newest'} in {folder} none {within} (there: "
                        f"{there}): choose others with config.eval.begin_ckpt and end_ckpt, or let training write them "
                        "and wait, with --config.eval.wait true")
    if end >= awaited:
        print(f"checkpoints {awaited} to {end} are not in {folder}: passed over", flush=True)


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
