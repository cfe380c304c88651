"""EDM's recorded networks, three in tests/data/edm, others in ../shared/golden/edm where that is; their pickles."""

import json
import pathlib
import pickle
import struct

import numpy as np
import pytest
import torch

from models.edm_pickle import Call, Name

ROOT = pathlib.Path(__file__).parent.parent.parent
FOLDERS = (ROOT / "tests/data/edm", ROOT.parent / "shared/golden/edm")
OWN = ("edm_ddpmpp_cond", "edm_ncsnpp", "edm_adm_cond")
READABLE = (*OWN, "edm_ddpmpp", "edm_ddpmpp_defaults", "edm_adm_heads", "baseline_ddpmpp", "baseline_ncsnpp")


def golden_file(name):
    """Return the path of a recorded file; skip the test where it is not there."""
    for folder in FOLDERS:
        if (folder / name).is_file():
            return folder / name
    return pytest.skip(f"{name} is not on this machine")


def golden_numbers(name):
    """Return (what NAME.json says, {name: tensor} of NAME.npz)."""
    with np.load(golden_file(f"{name}.npz")) as numbers:
        return json.loads(golden_file(f"{name}.json").read_text()), {
            key: torch.from_numpy(value) for key, value in numbers.items()}


def text(value):
    """Return the opcode of text."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def bytes_of(value):
    """Return the opcode of bytes."""
    return b"B" + struct.pack("<I", len(value)) + value


def emit(value):
    """Return the opcodes of a value of `Reader`: what it read can be written again, changed."""
    if type(value) is Name:
        module, _, name = value.text.rpartition(".")
        return b"c" + f"{module}\n{name}\n".encode()
    if type(value) is Call:
        if not value.name:
            return emit(value.args[0]) + b"Q"
        items = b"(" + b"".join(emit(k) + emit(v) for k, v in value.items.items()) + b"u" if value.items else b""
        state = b"" if value.state is None else emit(value.state) + b"b"
        return emit(Name(value.name)) + emit(value.args) + b"R" + items + state
    if type(value) is dict:
        return b"}(" + b"".join(emit(k) + emit(v) for k, v in value.items()) + b"u"
    if type(value) in (list, tuple):
        inner = b"(" + b"".join(map(emit, value))
        return b"]" + inner + b"e" if type(value) is list else inner + b"t"
    if type(value) is str:
        return text(value)
    if type(value) in (bytes, memoryview):
        return bytes_of(bytes(value))
    if type(value) is set:
        return b"\x8f"
    return pickle.dumps(value, 2)[2:-1]  # numbers, None


def state_of(network, *names):
    """Return the state dict of a network, or of a module in it."""
    for name in names:
        network = (state_of(network)["_modules"].items)[name]
    return network.state if network.state is not None else network.args[0]["state"]


def legacy_storage(count=64, stated=None, numbers=64, about=b"}", kind="FloatStorage"):
    """Return a storage in torch.save's first format, with what it claims."""
    reference = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text("0") + text("cpu") + emit(count)
    pickles = (pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), b"\x80\x02" + about + b".",
               b"\x80\x02" + reference + b"NtQ.", pickle.dumps(["0"], 2))
    return b"".join(pickles) + struct.pack("<q", count if stated is None else stated) + bytes(4 * numbers)
