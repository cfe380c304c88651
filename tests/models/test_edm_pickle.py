"""A snapshot's pickle is data: whatever it names or claims, nothing runs, and memory stays that of the file."""

import io
import os
import pickle
import pickletools
import random
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from models.checkpoint import read_checkpoint
from models.edm_pickle import Bytes, Call, Name, Reader
from runtime.terminal import UserError
from tests.helpers import same
from tests.models.edm_networks import bytes_of, emit, golden_file, legacy_storage, state_of, text

START = b"\x80\x04"
MUTATIONS = int(os.environ.get("SLIMFLOW_MUTATIONS", "40"))  # a long run: 100000
MEMORY = 2**27  # bytes that reading the small files of this module may take


def call(name, *args):
    """Return the opcodes of a call of the dotted `name` with pickled arguments."""
    return emit(Name(name)) + b"(" + b"".join(args) + b"tR"


def snapshot():
    """Return the content of a recorded file as `Reader` reads it."""
    return Reader(Bytes(memoryview(golden_file("edm_ncsnpp.pkl").read_bytes()))).load()


def read_changed(content, path):
    """Return what `read_checkpoint` reads of a changed content."""
    path.write_bytes(START + emit(content) + b".")
    return read_checkpoint(path)["model"]


def tensor_at(content):
    """Return the `Call` of a tensor whose arguments can be changed."""
    return state_of(content["ema"], "model", "map_layer0")["_parameters"].items["bias"].args[0]


def with_tensor(place, value):
    """Return a change of one argument of a tensor."""
    def change(content):
        tensor = tensor_at(content)
        tensor.args = (*tensor.args[:place], value, *tensor.args[place + 1:])

    return change


def with_storage(data):
    """Return a change of the bytes of a storage."""
    return lambda content: setattr(tensor_at(content).args[0], "args", (data,))


def nested_modules(depth):
    """Return a change that nests modules."""
    def change(content):
        modules = state_of(content["ema"])["_modules"].items
        for _ in range(depth):
            modules["model"] = Call(content["ema"].name, ({"type": "class", "version": 6, "module_src": "",
                                                           "class_name": "X", "state": {
                "_parameters": {}, "_buffers": {}, "_modules": {"model": modules["model"]}}},))
    return change


def zipped(content):
    """Return the bytes of a zip as torch.save writes it, its pickle replaced by `content`."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return written.getvalue()


RUN = "CANARY"  # a shell command, replaced by one that writes the canary's file
CODE = "PYTHON"  # the same in Python
ATTACK = call("os.system", text(RUN))
DEEP = 200_000

HOSTILE = {
    "GLOBAL and REDUCE": START + ATTACK + b".",
    "STACK_GLOBAL and REDUCE": START + text("os") + text("system") + b"\x93" + text(RUN) + b"\x85R.",
    "INST": START + b"(" + text(RUN) + b"ios\nsystem\n.",
    "OBJ": START + b"(cos\nsystem\n" + text(RUN) + b"o.",
    "NEWOBJ": START + b"csubprocess\nPopen\n" + text(RUN) + b"\x85\x81.",
    "NEWOBJ_EX": START + b"csubprocess\nPopen\n" + text(RUN) + b"\x85}\x92.",
    "EXT1": START + b"\x82\x01.",
    "EXT2": START + b"\x83\x01\x00.",
    "EXT4": START + b"\x84\x01\x00\x00\x00.",
    "eval": START + call("builtins.eval", text(CODE)) + b".",
    "exec": START + call("builtins.exec", text(CODE)) + b".",
    "import": START + call("builtins.__import__", text("canary_module")) + b".",
    "name of a module that is not imported": START + b"ccanary_module\nf\n.",
    "getattr": START + call("builtins.getattr", b"cos\npath\n", text("os")) + b".",
    "subprocess": START + call("subprocess.getoutput", text(RUN)) + b".",
    "pickle in a pickle": START + call("pickle.loads", bytes_of(START + ATTACK + b".")) + b".",
    "torch.load": START + call("torch.load", text("owned.pth")) + b".",
    "torch.hub.load": START + call("torch.hub.load", text("x/y"), text("z")) + b".",
    "copyreg": START + call("copyreg._reconstructor", b"csubprocess\nPopen\n", b"cbuiltins\nobject\n", b"N") + b".",
    "functools.partial": START + call("functools.partial", b"cos\nsystem\n", text(RUN)) + b".",
    "attrgetter": START + call("operator.attrgetter", text("system")) + b".",
    "dotted name": START + text("collections") + text("OrderedDict.fromkeys.__self__") + b"\x93.",
    "dotted name of torch": START + text("torch") + text("serialization.os.system") + b"\x93" + text(RUN) + b"\x85R.",
    "name that is no text": START + b"K\x01K\x02\x93.",
    "PERSID": START + b"Pos.system\n.",
    "BINPERSID": START + b"}" + text("ema") + text("os.system") + b"Qs.",
    "BUILD on a name": START + b"ccollections\nOrderedDict\n}" + text("__init__") + text("x") + b"sb.",
    "BUILD on a dict": START + b"}}" + text("x") + text("y") + b"sb.",
    "BUILD with slots": START + b"}" + text("ema") + b"ctorch.nn.modules.container\nModuleDict\n)\x81}}" + text("args")
        + b")s\x86bs.",
    "REDUCE on a call": START + ATTACK.replace(b"cos\nsystem\n", call("collections.OrderedDict")) + b".",
    "code in storage bytes as zip": with_storage(zipped(b"\x80\x02" + ATTACK + b".")),
    "code in storage bytes as legacy file": with_storage(legacy_storage(about=ATTACK)),
    "code in storage bytes as plain pickle": with_storage(b"\x80\x02" + ATTACK + b"."),
    "storage of another type": with_storage(legacy_storage(kind="DoubleStorage", numbers=128)),
    "storage whose bytes are text": with_storage("x"),
    "storage that claims 40 TB": with_storage(legacy_storage(count=10**13)),
    "storage of negative count": with_storage(legacy_storage(count=-64)),
    "storage whose counts differ": with_storage(legacy_storage(stated=65)),
    "storage that is cut": with_storage(legacy_storage(numbers=63)),
    "size out of bounds": with_tensor(2, (65,)),
    "size of no entries": with_tensor(2, (0,)),
    "size of 40 TB": lambda content: setattr(
        tensor_at(content), "args", (*tensor_at(content).args[:2], (10**12, 10), (0, 0))),
    "negative size": with_tensor(2, (-64,)),
    "stride out of bounds": with_tensor(3, (2,)),
    "negative stride": with_tensor(3, (-1,)),
    "offset out of bounds": with_tensor(1, 1),
    "negative offset": with_tensor(1, -1),
    "size that is a bool": with_tensor(2, (True,)),
    "more sizes than strides": with_tensor(2, (8, 8)),
    "numpy object as an attribute": lambda content: state_of(content["ema"]).update(
        sigma_data=Call("numpy.core.multiarray.scalar", (Call("numpy.dtype", ("O8", False, True)), b"x" * 8))),
    "frame of 40 TB": START + b"\x95" + struct.pack("<Q", 40 * 10**12) + b"}.",
    "bytes of 40 TB": START + b"\x8e" + struct.pack("<Q", 40 * 10**12) + b".",
    "bytes of 2 GB": START + b"B" + struct.pack("<I", 2**31) + b".",
    "text of 40 TB": START + b"\x8d" + struct.pack("<Q", 40 * 10**12) + b".",
    "bytearray of 40 TB": START + b"\x96" + struct.pack("<Q", 40 * 10**12) + b".",
    "number of 2 GB": START + b"\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "number of negative length": START + b"\x8b" + struct.pack("<i", -1) + b".",
    "memo of 32 GB": START + b"}r\xff\xff\xff\x7f.",
    "buffer out of band": b"\x80\x05\x97.",
    "self-containing dict": START + b"}\x94" + text("ema") + b"h\x00s.",
    "self-containing list": START + b"]\x94h\x00a.",
    "self-containing module": START + b"}" + text("ema") + b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
        + b"}\x94(" + text("type") + text("class") + text("class_name") + text("EDMPrecond") + text("state")
        + b"}\x94(" + text("_init_kwargs") + b"}" + text("_parameters") + b"}" + text("_buffers") + b"}"
        + text("_modules") + b"}" + text("model") + b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
        + b"h\x00\x85Rsuu\x85Rs.",
    "200,000 tuples deep": START + b")" + b"\x85" * DEEP + b".",
    "200,000 lists deep": START + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "200,000 dicts deep": START + (b"}" + text("a")) * DEEP + b"N" + b"s" * DEEP + b".",
    "200,000 calls deep": START + b"ccollections\nOrderedDict\n\x940" + b"h\x00" * DEEP
        + b")R" + b"\x85R" * (DEEP - 1) + b".",
    "key of 200,000 tuples": START + b"})" + b"\x85" * DEEP + b"Ns.",
    "60 modules deep": nested_modules(60),
    "text that is no UTF-8": START + b"X\x02\x00\x00\x00\xff\xff.",
    "empty stack": START + b"0.",
    "no mark": START + b"t.",
    "memo entry that is not there": START + b"h\x07.",
    "no end": START + b"}",
    "nothing else": START,
    "no network in it": START + b"}" + text("ema") + text("network") + b"s.",
    "a number": START + b"K\x01.",
}


def canaries(folder):
    """Return (shell command, Python code) that write the file `owned` in a folder."""
    owned = folder / "owned"
    return f"touch {owned}", f"open({str(owned)!r}, 'w')"


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """The file that must not appear; importing `canary_module` would write it, too."""
    _, code = canaries(tmp_path)
    (tmp_path / "canary_module.py").write_text(f"{code}\ndef f(*_): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "owned"


def armed(content, folder):
    """Return a file of `HOSTILE`, or a recorded one changed by it, with the commands that write the canary."""
    if callable(content):
        changed = snapshot()
        content(changed)
        content = START + emit(changed) + b"."
    for mark, command in zip((RUN, CODE), canaries(folder), strict=True):
        content = content.replace(text(mark), text(command))
    return content


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_file_is_one_sentence_and_runs_nothing(kind, tmp_path, canary):
    """No call, no import, no name looked up; and what a file claims is not allocated."""
    path = tmp_path / "x.pkl"
    path.write_bytes(armed(HOSTILE[kind], tmp_path))
    if claims := kind.endswith(("TB", "GB")):
        tracemalloc.start()
    try:
        with pytest.raises(UserError) as refused:
            read_checkpoint(path)
        assert not claims or tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert not canary.exists()


def test_attack_of_these_tests_would_work_elsewhere(tmp_path, canary):
    """The canary does appear where the plain unpickler reads the file: the tests above can fail."""
    pickle.loads(armed(HOSTILE["GLOBAL and REDUCE"], tmp_path))
    assert canary.exists()


def test_source_in_the_file_is_not_executed(tmp_path, canary):
    """`module_src`, which the original loader executes, is passed over: the network loads all the same."""
    content = snapshot()
    for module in (content["ema"], state_of(content["ema"])["_modules"].items["model"]):
        module.args[0]["module_src"] = canaries(tmp_path)[1]
    written = read_changed(content, tmp_path / "x.pkl")
    assert not canary.exists()
    assert same(written, read_checkpoint(golden_file("edm_ncsnpp.pkl"))["model"])


def test_tensors_that_claim_more_than_the_file_explains_are_refused(tmp_path):
    """Overlapping views let a small file describe gigabytes, which the network would then have to hold."""
    content = snapshot()
    for name in ("weight", "bias"):
        tensor = state_of(content["ema"], "model", "map_layer0")["_parameters"].items[name].args[0]
        tensor.args = (*tensor.args[:2], (2**20, 2**10), (0, 0), *tensor.args[4:])
    with pytest.raises(UserError, match="its tensors claim"):
        read_changed(content, tmp_path / "x.pkl")


def test_views_with_stride_and_offset_are_those_of_the_storage(tmp_path):
    """A transposed view of a part of a storage, as torch pickles it, comes back as that view."""
    content = snapshot()
    storage = legacy_storage(count=4100, numbers=0) + np.arange(4100, dtype="<f4").tobytes()
    tensor = state_of(content["ema"], "model", "map_layer1")["_parameters"].items["weight"].args[0]
    tensor.args = (Call("torch.storage._load_from_bytes", (storage,)), 4, (64, 64), (1, 64), False)
    weight = read_changed(content, tmp_path / "x.pkl")["net.time_embedding.linear1.weight"]
    assert torch.equal(weight, torch.arange(4, 4100.0).view(64, 64).t())


def test_random_damage_is_a_sentence_or_a_network(tmp_path, canary):
    """Bytes changed, removed, repeated or put in, anywhere but in the weights: never another error, nor a run."""
    content = START + emit(snapshot()) + b"."
    places = []
    for opcode, argument, place in pickletools.genops(content):
        length = len(argument) if opcode.name == "BINBYTES" else 0
        places += [place, place + 1, place + 5] + ([place + 5 + length // 2] if length and len(places) % 7 == 0 else [])
    for number in range(MUTATIONS):
        draw, damaged = random.Random(number), bytearray(content)
        for _ in range(draw.randint(1, 4)):
            place, length = min(draw.choice(places), len(damaged) - 1), draw.randint(1, 8)
            match draw.randrange(4):
                case 0:
                    damaged[place] = draw.randrange(256)
                case 1:
                    del damaged[place : place + length]
                case 2:
                    damaged[place:place] = damaged[place : place + length]
                case 3:
                    damaged[place:place] = draw.choice([b"R", b"b", b"Q", b"0", b"2", b"}", b"]", b"(", b"t", b"u",
                                                        b"cos\nsystem\n", text("ema"), b"\x94", b"h\x00"])
        path = tmp_path / "x.pkl"
        path.write_bytes(START + damaged[2:])
        try:
            read_checkpoint(path)
        except UserError as error:
            assert "\n" not in str(error), number
        assert not canary.exists(), number
