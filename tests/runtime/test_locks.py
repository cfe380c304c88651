"""Locks between processes."""

import multiprocessing
import time

from runtime.files import file_lock

FORKED = multiprocessing.get_context("fork")


def hold(path, log):
    """Note when the lock was taken and given back."""
    with file_lock(path, "testing"):
        log.put("in")
        time.sleep(0.05)
        log.put("out")


def test_only_one_process_is_inside_and_the_others_say_that_they_wait(tmp_path, capfd):
    log = FORKED.Queue()
    processes = [FORKED.Process(target=hold, args=(tmp_path / "new" / "lock", log)) for _ in range(3)]
    for process in processes:
        process.start()
    events = [log.get(timeout=30) for _ in range(6)]
    for process in processes:
        process.join()
    assert events == ["in", "out"] * 3
    assert "waiting for another process that is testing" in capfd.readouterr().err


def test_an_error_inside_frees_the_lock(tmp_path):
    for _ in range(2):
        try:
            with file_lock(tmp_path / "lock", "testing"):
                raise KeyError
        except KeyError:
            pass
