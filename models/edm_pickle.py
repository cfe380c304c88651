"""Reading a snapshot of EDM's training (`edm-*.pkl`) without running or importing anything that it names.

The published loader executes source code in the file, and calls what the pickle names. Here the pickle is read as a
description: names become `Name`, calls become `Call` and are never made, and only the names and opcodes of EDM's files
are accepted. The network's arguments and tensors are then looked up in the description. Memory and time are bounded by
the file's size: a size that the file merely claims is not allocated.
"""

import collections
import dataclasses
import math
import mmap
import pickle
import re
import struct

import numpy as np
import torch

from runtime.terminal import UserError

MAGIC = (b"\x80\x04", b"\x80\x05")  # protocols 4 and 5; torch's own files are zips, or begin with protocol 2
MODULE = "torch_utils.persistence._reconstruct_persistent_obj"
DICTS = ("collections.OrderedDict", "dnnlib.util.EasyDict")
SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # numpy 1, numpy 2
NAMES = {MODULE, *DICTS, *SCALARS, "torch.nn.modules.container.ModuleDict", "torch._utils._rebuild_parameter",
         "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes", "numpy.dtype"}
OPCODES = ("PROTO FRAME STOP MARK POP POP_MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL NONE "
           "NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES "
           "BINBYTES8 EMPTY_DICT EMPTY_LIST EMPTY_SET EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS")
STORAGE = "torch.FloatStorage"
STREAM = (0x1950A86A20F9469CFC6C, 1001)  # magic and version of torch.save's first format


@dataclasses.dataclass(frozen=True, eq=False)
class Name:
    """The dotted name of an object that a pickle refers to."""

    text: str


@dataclasses.dataclass(eq=False)
class Call:
    """A call in a pickle, with the state and items that the pickle sets on its result."""

    name: str
    args: tuple
    state: object = None
    items: dict = dataclasses.field(default_factory=dict)


# A network of a snapshot: class, arguments and attributes of the outer module, {name: float32 tensor} of all.
Snapshot = collections.namedtuple("Snapshot", "class_name arguments attributes tensors")


def is_snapshot(path):
    """Return whether the file at `path` begins like a pickle of EDM's training loop."""
    with open(path, "rb") as opened:
        return opened.read(2) in MAGIC


def read_snapshot(file, path):
    """Return the `Snapshot` under "ema" of `file`; its tensors are views of the mapped file.

    Raises UserError, naming `path`, for a file that is damaged or holds anything but a network of EDM.
    """
    with open(file, "rb") as opened:
        content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        network, tensors = entries(Reader(Bytes(content)).load())["ema"], {}
        class_name, state = module_state(network)
        if class_name is None or state.get("_init_args", ()) != ():
            raise ValueError
        arguments = {name: plain_value(value) for name, value in entries(state["_init_kwargs"]).items()}
        attributes = {name: plain_value(value) for name, value in state.items()
                      if type(value) in (bool, int, float, str) or (type(value) is Call and value.name in SCALARS)}
        collect_tensors(network, "", tensors, set())
        claimed = 4 * sum(tensor.numel() for tensor in tensors.values())
        if claimed > max(2**26, 4 * len(content)):  # tensors may overlap, so the size of the file is not a bound
            raise UserError(f"its tensors claim {claimed:,} bytes, the file has {len(content):,}")
        return Snapshot(class_name, arguments, attributes, tensors)
    except UserError as error:
        raise UserError(f"{path} is refused as a snapshot of EDM: {error}; nothing in it was executed") from None
    except Exception as error:  # damaged files make Python and torch raise many kinds of error
        raise UserError(f"{path} cannot be read: it is cut short, damaged or not a snapshot of EDM; nothing in it was "
                        "executed") from error


class Bytes:
    """The stream for an unpickler: reads `content`, long parts as views; raises EOFError at its end."""

    def __init__(self, content):
        self.content, self.place = memoryview(content), 0

    def read(self, count):
        part = self.content[self.place : self.place + count]
        if len(part) < count:
            raise EOFError
        self.place += count
        return part if count > 1024 else bytes(part)

    def readline(self):
        return self.read(bytes(self.content[self.place : self.place + 256]).find(b"\n") + 1)


class Reader(pickle._Unpickler):
    """An unpickler that makes no calls and looks up no names: it returns `Name`, `Call` and plain values only.

    Not Python's C unpickler, which a few bytes make allocate gigabytes (a large index into its memo).
    """

    def find_class(self, module, name):
        """Return the `Name` of an accepted name, or of a storage's type."""
        text = f"{module}.{name}"
        if text not in NAMES and not re.fullmatch(r"torch\.[A-Z][A-Za-z0-9]*Storage", text):
            raise UserError(f"it names {text[:80]!r}, which is not part of a network")
        return Name(text)

    def load_reduce(self):
        args, name = self.stack.pop(), self.stack.pop()
        self.append(Call(name.text, args))  # raises AttributeError if it is not a `Name`

    def load_build(self):
        state, call = self.stack.pop(), self.stack[-1]
        if type(call) is not Call:
            raise ValueError
        call.state = state

    def load_binpersid(self):
        self.append(Call("", (self.stack.pop(),)))

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self):
        self.set_items(self.pop_mark())

    def set_items(self, items):
        """Set entries of a dict, or of a `Call` that makes one; the keys are text or numbers."""
        target = self.stack[-1]
        target = target.items if type(target) is Call else target
        if type(target) is not dict or any(type(key) not in (str, int) for key in items[::2]):
            raise ValueError
        target.update(zip(items[::2], items[1::2], strict=True))

    # The opcodes of EDM's files and torch's storages; any other raises KeyError.
    dispatch = {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
                for name in OPCODES.split()}
    dispatch |= {pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_reduce, pickle.BUILD[0]: load_build,
                 pickle.BINPERSID[0]: load_binpersid, pickle.SETITEM[0]: load_setitem,
                 pickle.SETITEMS[0]: load_setitems}


def entries(value):
    """Return a dict, or the `Call` that makes one, as a dict."""
    value = value.items if type(value) is Call and value.name in DICTS else value
    if type(value) is not dict:
        raise ValueError
    return value


def module_state(value):
    """Return (class name or None, state dict) of a module: EDM's, whose source is ignored, or torch's."""
    if called(value, MODULE):
        (meta,) = value.args
        meta = entries(meta)
        if meta["type"] == "class" and type(meta["class_name"]) is str:
            return meta["class_name"], entries(meta["state"])
    if called(value, "torch.nn.modules.container.ModuleDict"):
        return None, entries(value.state)
    raise ValueError


def collect_tensors(module, prefix, tensors, seen):
    """Add the tensors of a module and its submodules to `tensors`, in the order of its state dict."""
    if id(module) in seen:
        raise UserError("its modules contain themselves")
    seen.add(id(module))
    _, state = module_state(module)
    for name, value in [*entries(state["_parameters"]).items(), *entries(state["_buffers"]).items()]:
        if value is not None:
            tensors[f"{prefix}{name}"] = tensor_of(value)
    for name, child in entries(state["_modules"]).items():
        if child is not None:
            collect_tensors(child, f"{prefix}{name}.", tensors, seen)


def tensor_of(value):
    """Return the tensor of a `Call` that rebuilds one; size, stride and offset must lie inside its storage."""
    if called(value, "torch._utils._rebuild_parameter"):
        value = value.args[0]
    if not called(value, "torch._utils._rebuild_tensor_v2"):
        raise ValueError
    storage, offset, size, stride = value.args[:4]
    numbers, last = storage_numbers(storage), sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    sensible = all(type(number) is int and 0 <= number < 2**40 for number in (offset, *size, *stride))
    if not sensible or 0 in size or len(size) > 4 or offset + last >= len(numbers):
        raise UserError("a tensor reaches beyond its storage")
    return torch.from_numpy(numbers).as_strided(size, stride, offset)


def storage_numbers(value):
    """Return the numbers of a storage, a float32 view of its bytes in torch.save's first format.

    The format is five pickles (magic, version, system information, the storage's persistent id, a list of its key), an
    int64 count and the numbers, which need not be aligned: every processor that torch supports can read them.
    """
    if not called(value, "torch.storage._load_from_bytes") or type(value.args[0]) not in (bytes, memoryview):
        raise ValueError
    stream = Bytes(value.args[0])
    magic, version, _, reference, keys = (Reader(stream).load() for _ in range(5))
    kind, storage_type, key, _, count, view = reference.args[0]
    if (magic, version, kind, view) != (*STREAM, "storage", None) or keys != [key]:
        raise ValueError
    if storage_type.text != STORAGE:
        raise UserError(f"it holds a {storage_type.text[:80]}; EDM's networks have {STORAGE}")
    (stated,) = struct.unpack("<q", stream.read(8))
    data = stream.content[stream.place :]
    if type(count) is not int or stated != count or 4 * count != len(data):
        raise UserError(f"a storage claims {stated} numbers and has {len(data) / 4:g}")
    return np.frombuffer(bytearray(data) if data.readonly else data, np.dtype("<f4"))


def called(value, name):
    return type(value) is Call and value.name == name


def plain_value(value):
    """Return an argument that is a number, text, None or a list of numbers; numpy scalars as Python's."""
    if type(value) is Call and value.name in SCALARS:
        kind, data = value.args
        if not called(kind, "numpy.dtype") or kind.args[0] not in ("f8", "f4", "i8", "i4"):
            raise ValueError
        return np.frombuffer(data, np.dtype(f"<{kind.args[0]}"), count=1)[0].item()
    if type(value) in (list, tuple) and all(type(number) in (int, float) for number in value):
        return list(value)
    if value is None or type(value) in (bool, int, str) or (type(value) is float and not math.isnan(value)):
        return value
    raise ValueError
