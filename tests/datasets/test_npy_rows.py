"""Rows read from npy files must be those that numpy wrote, and a damaged file must be named."""

import numpy as np
import pytest

from datasets.npy_rows import NpyRows, header_bytes
from runtime.errors import UserError


@pytest.fixture
def array():
    return np.random.default_rng(0).normal(size=(50, 3, 4, 4)).astype(np.float32)


def save(folder, array):
    np.save(folder / "rows.npy", array)
    return folder / "rows.npy"


def test_rows_are_those_that_numpy_saved(tmp_path, array):
    rows = NpyRows(save(tmp_path, array))
    indices = np.array([49, 0, 7, 7])
    assert len(rows) == 50 and rows.shape == (3, 4, 4)
    np.testing.assert_array_equal(rows.rows(indices), array[indices])
    np.testing.assert_array_equal(rows.slice(10, 20), array[10:20])
    assert rows.rows(np.array([], dtype=np.int64)).shape == (0, 3, 4, 4)


def test_rows_are_read_alike_where_the_system_has_fewer_calls(tmp_path, array, monkeypatch):
    monkeypatch.delattr("os.preadv")
    monkeypatch.delattr("os.posix_fadvise")
    rows = NpyRows(save(tmp_path, array))
    np.testing.assert_array_equal(rows.rows([49, 0, 7]), array[[49, 0, 7]])
    np.testing.assert_array_equal(rows.slice(10, 20), array[10:20])


def test_rows_of_plain_numbers_are_read_too(tmp_path):
    rows = NpyRows(save(tmp_path, np.arange(9)))
    np.testing.assert_array_equal(rows.rows(np.array([8, 3])), [8, 3])


def test_a_header_can_be_replaced_where_it_stands(tmp_path, array):
    path = save(tmp_path, array)
    short, long = header_bytes(20, (3, 4, 4), "<f4"), header_bytes(10**12, (3, 4, 4), "<f4")
    assert len(short) == len(long) == path.stat().st_size - array.nbytes
    with open(path, "r+b") as opened:
        opened.write(short)
    np.testing.assert_array_equal(np.load(path), array[:20])
    np.testing.assert_array_equal(np.load(path, mmap_mode="r"), array[:20])


def test_a_file_that_is_cut_short_is_named(tmp_path, array):
    path = save(tmp_path, array)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="rows.npy is cut short: its header promises 50 rows"):
        NpyRows(path)


@pytest.mark.parametrize("content", [b"", b"not an npy file", b"\x93NUMPY\x01\x00\xff\xff{'descr'"])
def test_what_is_no_npy_file_is_named(tmp_path, content):
    (tmp_path / "rows.npy").write_bytes(content)
    with pytest.raises(UserError, match="rows.npy is not an npy file"):
        NpyRows(tmp_path / "rows.npy")


@pytest.mark.parametrize("array", [np.array(["a"]), np.array(1.0), np.asfortranarray(np.ones((2, 3))),
                                   np.array([{}], dtype=object)])
def test_arrays_without_rows_of_numbers_are_refused(tmp_path, array):
    with pytest.raises(UserError, match="an array of numbers"):
        NpyRows(save(tmp_path, array))
