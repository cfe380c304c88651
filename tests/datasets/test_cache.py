"""Decoded data sets on disk: made once, trusted only when whole."""

import json
import os
import pathlib
import resource
import shutil
import signal
import time

import numpy as np
import pytest

from datasets import cache
from datasets.cache import ImageSet, Source
from datasets.image_files import ImageSpec
from runtime.terminal import UserError
from tests.datasets.image_files import random_images
from tests.processes import SERVER

IMAGES, LABELS = random_images(10, 3, 8), np.arange(10)
SPEC = ImageSpec(8, 3, skip_corrupt=True)


def chunks_of_two():
    for start in range(0, 10, 2):
        part = slice(start, start + 2)
        yield ImageSet(IMAGES[part], LABELS[part], notes={"turned": 1}, skipped=(f"bad{start}",))


def make_source(chunks=chunks_of_two, identity="one", count=15):
    return Source("tiny", "tiny at somewhere", identity, lambda: (chunks(), count, tuple("abcdefghij")))


def open_cached(source, folder):
    return cache.open_cached(source, SPEC, folder, "false")


def unopened():
    raise AssertionError("decoded again")
    yield


def entries(folder):
    """Return the names of entries in the cache, hidden ones too, locks left out."""
    return sorted(path.name for path in pathlib.Path(folder).iterdir() if path.is_dir())


def test_first_use_decodes_and_tells_where_it_is_cached_and_later_ones_map_the_same_pixels(tmp_path, capsys):
    open_cached(make_source(), tmp_path)
    found = open_cached(make_source(unopened), tmp_path)
    np.testing.assert_array_equal(found.images, IMAGES)
    np.testing.assert_array_equal(found.labels, LABELS)
    assert isinstance(found.images, np.memmap) and found.labels.dtype == np.int64
    assert found.class_names == tuple("abcdefghij")
    assert found.skipped[1] == "bad2" and found.notes == {"turned": 5}
    said = capsys.readouterr().err
    assert said.count("cached tiny at somewhere: 10 images in") == 1 and found.cache in said
    assert "5 images: turned" in said and "5 images: skipped, the first: bad0" in said
    written = json.loads((pathlib.Path(found.cache) / "about.json").read_text())
    assert written["source"] == "tiny at somewhere" and written["count"] == 10


def test_another_source_or_spec_is_another_entry(tmp_path):
    entries = set()
    for identity, spec in (("one", SPEC), ("two", SPEC), ("one", ImageSpec(8, 3, "area")), ("one", ImageSpec(9, 3)),
                           ("one", ImageSpec(8, 1))):
        images = random_images(2, spec.channels, spec.size)
        source = make_source(lambda images=images: iter([ImageSet(images)]), identity)
        found = cache.open_cached(source, spec, tmp_path, "false")
        np.testing.assert_array_equal(found.images, images)
        entries.add(found.cache)
    assert len(entries) == 5


@pytest.mark.parametrize("error", [UserError("corrupt image"), KeyboardInterrupt()])
@pytest.mark.parametrize("last_moment", [False, True])
def test_a_failed_or_interrupted_decode_leaves_nothing(tmp_path, monkeypatch, error, last_moment):
    def failing():
        yield from list(chunks_of_two())[:2]
        raise error

    def rename(self, target):
        assert {path.name for path in self.iterdir()} == {"images.npy", "labels.npy", "about.json"}
        raise error

    with monkeypatch.context() as patched, pytest.raises(type(error)):
        if last_moment:
            patched.setattr(pathlib.Path, "rename", rename)
        open_cached(make_source() if last_moment else make_source(failing), tmp_path)
    assert entries(tmp_path) == []
    assert len(open_cached(make_source(), tmp_path)) == 10


def decode_slowly(folder, marks):
    """Decode with a pause after the first chunk; leave a mark for each decode that began."""
    def chunks():
        (marks / str(os.getpid())).touch()
        for number, chunk in enumerate(chunks_of_two()):
            yield chunk
            time.sleep(60 if number == 0 and not (marks / "go").exists() else 0.02)

    open_cached(make_source(chunks), folder)


@pytest.fixture
def marks(tmp_path):
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


def test_a_killed_decode_is_not_trusted_and_its_lock_is_free(tmp_path, marks):
    process = SERVER.Process(target=decode_slowly, args=(tmp_path / "cache", marks))
    process.start()
    while process.is_alive() and not list(marks.iterdir()):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert entries(tmp_path / "cache")[0].endswith(".partial")  # what the killed process left
    np.testing.assert_array_equal(open_cached(make_source(), tmp_path / "cache").images, IMAGES)
    assert len(entries(tmp_path / "cache")) == 1  # and that is gone


def test_processes_that_start_together_decode_once(tmp_path, marks):
    (marks / "go").touch()
    processes = [SERVER.Process(target=decode_slowly, args=(tmp_path / "cache", marks)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(list(marks.iterdir())) == 2  # "go" and one decoder
    np.testing.assert_array_equal(open_cached(make_source(unopened), tmp_path / "cache").images, IMAGES)


@pytest.mark.parametrize("damage", [
    lambda entry: os.truncate(entry / "images.npy", 1000), lambda entry: os.remove(entry / "labels.npy"),
    lambda entry: (entry / "about.json").write_text("{"),
    lambda entry: (entry / "about.json").write_text('{"count": 10, "labelled": true}'),
    lambda entry: np.save(entry / "labels.npy", LABELS[:3]),
    lambda entry: shutil.rmtree(entry) or entry.mkdir(),
])
def test_a_damaged_entry_is_decoded_again(tmp_path, damage, capsys):
    damage(pathlib.Path(open_cached(make_source(), tmp_path).cache))
    found = open_cached(make_source(), tmp_path)
    np.testing.assert_array_equal(found.images, IMAGES)
    np.testing.assert_array_equal(found.labels, LABELS)
    assert "is damaged" in capsys.readouterr().err


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(tmp_path):
    """The file size limit stands for the full disk: both make a write fail half-way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match="data.cache_dir .* cannot be written .File too large.*cache_dir"):
            open_cached(make_source(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert entries(tmp_path) == []


@pytest.mark.parametrize("place", ["a file/cache", "/proc/cache"])
def test_a_cache_folder_that_cannot_be_written_is_one_sentence(tmp_path, place):
    (tmp_path / "a file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        open_cached(make_source(), tmp_path / place)


def test_a_cache_that_is_read_only_serves_what_it_has(tmp_path, monkeypatch):
    open_cached(make_source(), tmp_path)

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache, "file_lock", refuse)
    assert len(open_cached(make_source(unopened), tmp_path)) == 10
    with pytest.raises(UserError, match="Permission denied"):
        open_cached(make_source(identity="other"), tmp_path)


def test_a_source_of_unknown_count_without_labels_is_cached(tmp_path):
    found = open_cached(make_source(lambda: iter([ImageSet(IMAGES[:7])]), count=None), tmp_path)
    assert found.images.shape == (7, 3, 8, 8) and found.labels is None
