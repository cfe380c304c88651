"""Locks between processes."""

import contextlib
import io
import time

from runtime.files import file_lock
from tests.processes import SERVER


def hold(path, log):
    """Note when the lock was taken and given back, and what was said."""
    with contextlib.redirect_stderr(io.StringIO()) as said, file_lock(path, "testing"):
        log.put("in")
        time.sleep(0.05)
        log.put("out")
        log.put(said.getvalue())


def test_only_one_process_is_inside_and_the_others_say_that_they_wait(tmp_path):
    log = SERVER.Queue()
    processes = [SERVER.Process(target=hold, args=(tmp_path / "new" / "lock", log)) for _ in range(3)]
    with file_lock(tmp_path / "new" / "lock", "testing"):  # until all of them wait
        for process in processes:
            process.start()
        time.sleep(1)
        assert log.empty()
    events = [log.get(timeout=30) for _ in range(9)]
    for process in processes:
        process.join()
    assert [events[k::3] for k in (0, 1)] == [["in"] * 3, ["out"] * 3]
    assert any("waiting for another process that is testing" in said for said in events[2::3])


def test_an_error_inside_frees_the_lock(tmp_path):
    for _ in range(2):
        try:
            with file_lock(tmp_path / "lock", "testing"):
                raise KeyError
        except KeyError:
            pass
