"""Locks between processes, so that what several start together is done once."""

import contextlib
import fcntl
import pathlib
import sys


@contextlib.contextmanager
def file_lock(path, doing):
    """Hold the lock file `path` inside the `with` block and yield its descriptor; wait while another process holds it.

    `doing` says what the other process is doing, for the line that a waiting user reads. The system frees the
    lock when its process ends, however it ends; children that get the descriptor hold it, too. The empty file stays:
    removing it would let two in.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that is {doing} ({path})", file=sys.stderr, flush=True)
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield opened.fileno()
