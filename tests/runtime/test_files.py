"""Telling whether files changed without reading them."""

import os

import pytest

from runtime.files import state_digest


def write(path, text, time):
    """Write a file with the modification time `time`, in nanoseconds."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    os.utime(path, ns=(time, time))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "images" / "a.png", "one", 10)
    write(tmp_path / "images" / "inner" / "b.png", "two", 10)
    return tmp_path / "images"


@pytest.mark.parametrize("change", [
    lambda folder: write(folder / "inner" / "b.png", "six", 11),
    lambda folder: write(folder / "inner" / "b.png", "longer", 10),
    lambda folder: write(folder / "c.png", "", 10),
    lambda folder: (folder / "a.png").unlink(),
    lambda folder: (folder / "a.png").rename(folder / "z.png"),
], ids=["rewritten", "longer", "added", "removed", "renamed"])
def test_the_state_of_a_folder_changes_with_any_file_in_it(folder, change):
    before = state_digest(folder)
    assert state_digest(folder) == before
    change(folder)
    assert state_digest(folder) != before


def test_the_state_of_a_file_is_its_size_and_time(folder):
    before = state_digest(folder / "a.png")
    assert state_digest(folder / "a.png") == before
    write(folder / "a.png", "two", 11)
    assert state_digest(folder / "a.png") != before
