"""Pickled batches are read without running the code that a pickle may hold."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.sources import load_arrays
from runtime.terminal import UserError


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Read bytes as the file of a batch."""
    path = tmp_path_factory.mktemp("pickles") / "batch_1"

    def write_and_load(data):
        path.write_bytes(data)
        return load_arrays(path)

    return write_and_load


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_containers_come_through_every_protocol(load, protocol):
    content = {"data": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": [1, 2, 3], "mean": np.float64(0.5),
               "name": "training batch", "pair": (None, True, b"\xff\0")}
    found = load(pickle.dumps(content, protocol))
    np.testing.assert_array_equal(found.pop("data"), content.pop("data"))
    assert found == content


def test_a_batch_that_python_2_pickled_has_text_keys(load):
    """Protocol 2 of Python 2: byte strings for texts and for the array's memory, numpy's old module names."""
    data = (b"\x80\x02}(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            b"(K\x01K\x02K\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
            b"K\x00tb\x89U\x06\x01\x02\x03\x04\x05\xfftbU\x06labels](K\x07K\x08eu.")
    found = load(data)
    assert found["labels"] == [7, 8] and found["data"].tolist() == [[1, 2, 3], [4, 5, 255]]


class Attack:
    """Calls a function when a plain unpickler reads it."""

    def __init__(self, function, *words):
        self.call = function, words

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, print, getattr, np.load, np.frombuffer])
def test_no_function_is_called(load, tmp_path, function):
    mark = tmp_path / "was here"
    for protocol in (0, 2, 4):
        data = pickle.dumps({"data": Attack(function, f"touch '{mark}'")}, protocol)
        with pytest.raises(UserError, match="batch_1 is no readable npz or pickle of arrays .it names"):
            load(data)
    assert not mark.exists()


def test_bytes_in_another_codec_are_refused(load):
    with pytest.raises(UserError, match="rot13"):
        load(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.")


@given(st.binary(max_size=60), st.integers(0, 200))
def test_damaged_pickles_end_in_one_sentence(load, noise, cut):
    good = pickle.dumps({"data": np.zeros((2, 3), np.uint8), "labels": [0, 1]}, 2)
    for data in (noise, good[:cut] + noise):
        try:
            load(data)
        except UserError as error:
            assert "batch_1" in str(error)


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(UserError, match="data_batch_9 is no readable .*No such file"):
        load_arrays(tmp_path / "data_batch_9")
