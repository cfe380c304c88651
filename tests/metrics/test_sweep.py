"""Which checkpoints a sweep visits, and how it waits."""

import threading
import time

import pytest

from metrics import sweep as sweep_module
from metrics.sweep import checkpoint_folder, run_folder, sweep
from runtime.errors import UserError


def touch(folder, *numbers):
    folder.mkdir(exist_ok=True)
    for k in numbers:
        (folder / f"checkpoint_{k}.pth").write_bytes(b"complete")


def names(paths):
    return [int(path.stem.split("_")[1]) for path in paths]


def read(path):
    if not path.exists() or path.read_bytes() != b"complete":
        raise UserError("it is cut short")
    return path.name


def there(folder, begin, end, skipped):
    """The paths that a sweep yields which does not wait."""
    return (path for path, _ in sweep(folder, begin, end, read, lambda *gap: skipped.append(gap)))


def awaited(*arguments):
    """The numbers that a waiting sweep visits; the content goes with each path."""
    folder, begin, end, limit, last_of = arguments
    found = list(sweep(folder, begin, end, read, lambda *gap: None, limit, last_of))
    assert all(path.name == content for path, content in found)
    return names(path for path, _ in found)


def test_an_open_sweep_goes_to_the_newest_and_tells_of_gaps(tmp_path):
    touch(tmp_path, 1, 2, 4, 5)
    skipped = []
    assert names(there(tmp_path, 2, 0, skipped)) == [2, 4, 5]
    assert skipped == [(3, 3)]
    assert names(there(tmp_path, 1, 2, skipped)) == [1, 2]


def test_a_checkpoint_of_a_huge_number_is_reached_without_counting(tmp_path):
    touch(tmp_path, 1, 99999999)
    skipped = []
    assert names(there(tmp_path, 1, 0, skipped)) == [1, 99999999]
    assert names(there(tmp_path, 1, 10**9, skipped)) == [1, 99999999]
    assert skipped == [(2, 99999998), (2, 99999998), (100000000, 10**9)]


def test_a_checkpoint_that_training_deletes_during_the_sweep_is_told_of_and_left_out(tmp_path):
    touch(tmp_path, 1, 2, 3)
    skipped = []
    paths = there(tmp_path, 1, 0, skipped)
    assert names([next(paths)]) == [1]
    (tmp_path / "checkpoint_2.pth").unlink()
    assert names(paths) == [3]
    assert skipped == [(2, 2)]


def test_a_sweep_without_any_checkpoint_says_what_is_there(tmp_path):
    touch(tmp_path, 1, 2, 3)
    with pytest.raises(UserError, match="checkpoints 1 to 3 are in .*begin_ckpt 9"):
        list(there(tmp_path, 9, 26, []))
    with pytest.raises(UserError, match="no checkpoint"):
        list(there(tmp_path / "absent", 1, 0, []))


def test_the_run_folder_of_a_checkpoint_is_above_its_checkpoints_folder(tmp_path):
    assert run_folder("logs/run/checkpoints/checkpoint_1.pth").as_posix() == "logs/run"
    assert run_folder("downloads/slimflow.pth").as_posix() == "downloads"
    assert checkpoint_folder(tmp_path) == tmp_path / "checkpoints"
    touch(tmp_path, 1)
    assert checkpoint_folder(tmp_path) == tmp_path


def test_waiting_goes_on_when_the_awaited_checkpoint_is_complete(tmp_path):
    touch(tmp_path, 1)
    (tmp_path / "checkpoint_2.pth").write_bytes(b"comp")
    started = time.monotonic()
    threading.Timer(0.3, lambda: (tmp_path / "checkpoint_2.pth").write_bytes(b"complete")).start()
    threading.Timer(0.6, lambda: touch(tmp_path, 3)).start()
    assert awaited(tmp_path, 1, 3, 30, lambda content: None) == [1, 2, 3]
    assert time.monotonic() - started >= 0.6


def test_an_open_sweep_that_waits_ends_with_the_last_checkpoint_of_the_run(tmp_path):
    touch(tmp_path, 1)
    threading.Timer(0.2, lambda: touch(tmp_path, 2)).start()
    assert awaited(tmp_path, 1, 0, 30, lambda content: 2) == [1, 2]


def test_an_open_sweep_of_a_run_that_does_not_say_its_end_stops_at_the_limit(tmp_path):
    touch(tmp_path, 1, 2)
    assert awaited(tmp_path, 1, 0, 0.1, lambda content: None) == [1, 2]


def test_checkpoints_that_training_has_deleted_are_not_waited_for(tmp_path):
    touch(tmp_path, 3, 5)
    assert awaited(tmp_path, 1, 5, 0.1, lambda content: None) == [3, 5]


def test_a_checkpoint_that_is_deleted_while_it_is_looked_at_is_passed_over(tmp_path, monkeypatch):
    touch(tmp_path, 1, 2)
    listed = sweep_module.numbered_checkpoints

    def delete_after_listing(folder):
        found = listed(folder)
        (tmp_path / "checkpoint_1.pth").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(sweep_module, "numbered_checkpoints", delete_after_listing)
    assert awaited(tmp_path, 1, 2, 30, lambda content: None) == [2]


def test_a_checkpoint_that_never_comes_or_never_completes_is_named(tmp_path):
    touch(tmp_path, 1)
    with pytest.raises(UserError, match=r"checkpoint_2\.pth did not come"):
        awaited(tmp_path, 1, 2, 0.1, lambda content: None)
    (tmp_path / "checkpoint_2.pth").write_bytes(b"comp")
    with pytest.raises(UserError, match=r"checkpoint_2\.pth was there but did not become complete.*cut short"):
        awaited(tmp_path, 1, 2, 0.1, lambda content: None)
