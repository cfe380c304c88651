"""Damaged files are refused or read right, never as another one; a long form runs with SLIMFLOW_LONG_TESTS=1."""

import hashlib
import io
import json
import os
import random
import zipfile

import pytest
import torch

from models.checkpoint import read_checkpoint
from models.safe_load import read_file
from runtime.terminal import UserError
from tests.helpers import same

LONG = bool(os.environ.get("SLIMFLOW_LONG_TESTS"))


def content():
    """A checkpoint's kinds of content, small."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer{i}.weight": torch.randn(3, 5, generator=generator) for i in range(3)}
    return {"model": weights, "ema": {"decay": 0.9, "num_updates": 3, "shadow_params": list(weights.values())},
            "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}}, "step": 7}


def archive(records=None, compression=zipfile.ZIP_STORED):
    """Return the bytes of `content()` saved, its records changed by {end of the name: function of bytes}."""
    saved, written = io.BytesIO(), io.BytesIO()
    torch.save(content(), saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(written, "w", compression) as target:
        for entry in source.infolist():
            change = next((c for end, c in (records or {}).items() if entry.filename.endswith(end)), bytes)
            target.writestr(entry.filename, change(source.read(entry)))
    return written.getvalue()


def read_or_refused(path):
    """Return what a file holds, or None where it is refused in one sentence that names it."""
    try:
        return read_file(path)[0]
    except UserError as error:
        assert str(path) in str(error) and len(str(error)) < 400
        return None


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """Every bit that is not a checksummed content either changes nothing or ends in a refusal."""
    whole, path, chance = archive(), tmp_path / "bad.pth", random.Random(0)
    places = range(8 * len(whole)) if LONG else chance.sample(range(8 * len(whole)), 60)
    weights = [whole.find(w.numpy().tobytes()) for w in content()["model"].values()]
    refused = 0
    for place in [*places, *(8 * (at + 17) + 6 for at in weights)]:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        found = read_or_refused(path)
        refused += found is None
        assert found is None or same(found, content()), f"bit {place} gives another checkpoint"
        assert found is None or place // 8 - 17 not in weights
    assert refused > 10


def test_cut_and_stretched_files_are_refused(tmp_path):
    """At every kind of place: in the first record, among the weights, in the directory, at the end."""
    whole, path = archive(), tmp_path / "bad.pth"
    cuts = range(len(whole)) if LONG else [0, 1, 3, 40, 300, len(whole) // 2, len(whole) - 400, len(whole) - 23,
                                           len(whole) - 1]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        assert read_or_refused(path) is None, cut
    for cut in (100, len(whole) // 2):  # a hole, and bytes that are there twice
        for damaged in (whole[:cut] + whole[cut + 64:], whole[:cut] + whole[cut - 64:]):
            path.write_bytes(damaged)
            found = read_or_refused(path)
            assert found is None or same(found, content())


@pytest.mark.parametrize("records, compression", [
    ({"data/1": lambda data: data[:-8]}, zipfile.ZIP_STORED),
    ({"data/1": lambda data: data + data}, zipfile.ZIP_STORED),
    ({"data/1": lambda data: b""}, zipfile.ZIP_STORED), ({}, zipfile.ZIP_DEFLATED),
    ({"data/1": lambda data: bytes(10**8)}, zipfile.ZIP_DEFLATED), ({"data.pkl": lambda data: data[:-9]}, 0),
])
def test_records_of_another_length_or_compressed_are_refused(tmp_path, records, compression):
    """With right checksums: what a record holds must be as long as its tensor, and cannot grow in memory."""
    (tmp_path / "bad.pth").write_bytes(archive(records, compression))
    assert read_or_refused(tmp_path / "bad.pth") is None
    (tmp_path / "good.pth").write_bytes(archive())  # of which nothing is changed
    assert same(read_file(tmp_path / "good.pth")[0], content())


@pytest.mark.parametrize("name, phrase", [
    ("pipe", "is a pipe or a device"), ("zero", "is a pipe or a device"), ("empty", "is empty"),
    ("absent", r"cannot be opened \(No such file"), ("folder", r"cannot be opened \(Is a directory"),
])
def test_what_is_no_file_is_one_sentence(tmp_path, name, phrase):
    """A pipe without a writer would be waited for, a device read, for ever."""
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "zero.pth").symlink_to("/dev/zero")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(UserError, match=rf"{name}\.pth {phrase}"):
        read_checkpoint(tmp_path / f"{name}.pth")


def test_digest_is_that_of_the_bytes_that_were_read(tmp_path, monkeypatch):
    """A file that is replaced while it is being read is recorded as what was read."""
    path = tmp_path / "a.pth"
    torch.save(content(), path)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    load = torch.load

    def load_while_another_is_written(*args, **kwargs):
        torch.save({"model": {}}, tmp_path / "b.pth")
        os.replace(tmp_path / "b.pth", path)
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", load_while_another_is_written)
    found = read_checkpoint(path)
    assert found["digest"] == expected and found["step"] == 7


def test_a_file_cut_into_parts_is_read_as_one(tmp_path):
    """PATH, PATH.part2, PATH.part3: a missing one is noticed, whichever it is."""
    whole = archive()
    (tmp_path / "whole.pth").write_bytes(whole)
    size = len(whole) // 3 + 1
    for number, name in enumerate(("a.pth", "a.pth.part2", "a.pth.part3")):
        (tmp_path / name).write_bytes(whole[number * size : (number + 1) * size])
    found, digest = read_file(tmp_path / "a.pth")
    assert same(found, content()) and digest == read_file(tmp_path / "whole.pth")[1]
    for missing in ("a.pth.part3", "a.pth.part2"):
        (tmp_path / missing).unlink()
        assert read_or_refused(tmp_path / "a.pth") is None


def safetensors(change=lambda header, data: (header, data)):
    """Return the bytes of a safetensors file of `content()`'s weights, written after the format's description."""
    data, header = b"", {}
    for name, tensor in content()["model"].items():
        added = tensor.numpy().tobytes()
        places = [len(data), len(data) + len(added)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": places}
        data += added
    about = {"step": 7, "sha256": hashlib.sha256(data).hexdigest()}
    header, data = change({"__metadata__": {"slimflow": json.dumps(about)}} | header, data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("change", [
    lambda header, data: (header, data[:-1]), lambda header, data: (header, data[:20] + b"x" + data[21:]),
    lambda header, data: (header | {"a": {"dtype": "F32", "shape": [9], "data_offsets": [150, 186]}}, data),
    lambda header, data: (header | {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]}}, data),
    lambda header, data: (header | {"a": {"dtype": "F77", "shape": [1], "data_offsets": [0, 4]}}, data),
    lambda header, data: (header | {"a": 3}, data), lambda header, data: ([header], data),
])
def test_safetensors_are_read_and_damaged_ones_refused(tmp_path, change):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors())
    assert same(read_file(path)[0], {"step": 7, "model": content()["model"]})
    path.write_bytes(safetensors(change))
    assert read_or_refused(path) is None
