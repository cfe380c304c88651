"""Reading an untrusted checkpoint file: nothing in it is executed, and damage is detected.

It may be a file of torch (a zip archive, or the older stream of pickles), whole or split into parts, or safetensors.
A pickle names functions to call: `torch.load(weights_only=True)` refuses all names but those of tensors and of
SAFE_GLOBALS, which maps numpy's names to two small readers. So numpy's functions are not called either, and the
scalars of the released optimizer states become plain Python numbers.
"""

import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import stat
import struct
import warnings
import zipfile

import torch

from runtime.terminal import UserError

FORMATS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I",
           "u2": "H", "u1": "B", "b1": "?"}
PART_BYTES = 16 * 2**20  # of a file that is split: every part but the last has this length
SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                     "I64": torch.int64}


def read_file(path):
    """Return (content, digest) of a checkpoint file: tensors on the CPU, numbers and text, as `torch.save` wrote them.

    digest: the first 16 hexadecimal digits of the SHA-256 of exactly the bytes that were read, even if the file is
    replaced meanwhile. An archive is checked first: its records must match their checksums and be uncompressed, so that
    memory is bounded by the size of the file. Raises UserError, one sentence that names `path`.
    """
    try:
        with _opened(path) as file:
            size = file.seek(0, os.SEEK_END)
            if not size:
                raise UserError(f"{path} is empty; name a checkpoint file")
            file.seek(0)
            start = file.read(9)
            if start.startswith(b"PK\x03\x04"):
                _check_records(file, size)
            file.seek(0)
            if start[8:] == b"{":
                content = _read_safetensors(file, size)
            else:
                with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # about the pickle's protocol; what cannot be read is an error
                    content = torch.load(file, map_location="cpu", weights_only=True)
            file.seek(0)
            return content, hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except UserError:
        raise
    except Exception as error:  # damaged pickles raise many kinds, MemoryError and AssertionError among them
        reason = "cannot be read as a checkpoint; it is cut short, damaged or another kind of file"
        if isinstance(error, OSError) and error.errno is not None:
            reason = f"cannot be opened ({error.strerror}); name a checkpoint file or hf://owner/repo/file"
        elif foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = (f"is refused: it names {foreign[1]}, which is neither a tensor nor a number and could run code; "
                      "nothing was executed")
        raise UserError(f"{path} {reason}") from error


def _opened(path):
    """Return a binary file; the parts of a file that was split (PATH, PATH.part2, PATH.part3, …) as one."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a pipe would block
        raise UserError(f"{path} is a pipe or a device, not a file; name a checkpoint file")
    if not os.path.exists(f"{path}.part2"):
        return open(path, "rb")
    names = (path if number == 1 else f"{path}.part{number}" for number in itertools.count(1))
    return io.BytesIO(b"".join(pathlib.Path(name).read_bytes() for name in itertools.takewhile(os.path.exists, names)))


def _check_records(file, size):
    """Raise ValueError unless the records of an archive are uncompressed and match their checksums.

    torch does not verify checksums, expands compressed records of any size, and old versions trust a record's length.
    """
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        compressed = any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records)
        overlap = sum(r.file_size for r in records) > size or len({r.filename for r in records}) < len(records)
        if compressed or overlap or archive.testzip() is not None:
            raise ValueError


def _read_safetensors(file, size):
    """Return the checkpoint in a safetensors file: a JSON header with names, types, shapes and offsets, then the bytes.

    Entries that are not tensors (config, step, …) are JSON under "slimflow" in its metadata, which in our files also
    has the SHA-256 of the bytes: the format has no checksum of its own.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError("a header longer than the file")
    header = json.loads(file.read(length))
    about = json.loads(header.pop("__metadata__", {}).get("slimflow", "{}"))
    content = bytearray(file.read())
    if about.pop("sha256", hashlib.sha256(content).hexdigest()) != hashlib.sha256(content).hexdigest():
        raise ValueError("bytes without their checksum")
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if not 0 <= first <= last <= len(content):
            raise ValueError("a tensor outside the file")
        kind = SAFETENSORS_TYPES[entry["dtype"]]
        data = torch.frombuffer(content[first:last], dtype=kind) if last > first else torch.empty(0, dtype=kind)
        tensors[name] = data.reshape(entry["shape"])
    return about | {"model": tensors}


def safetensors_bytes(content):
    """Return a checkpoint dict as the bytes of a safetensors file: its `model` as tensors, the rest as metadata."""
    names = {kind: name for name, kind in SAFETENSORS_TYPES.items()}
    header, end = {}, 0
    parts = [(name, tensor, tensor.contiguous().numpy().tobytes()) for name, tensor in content["model"].items()]
    for name, tensor, part in parts:
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        header[name]["data_offsets"] = [end, end := end + len(part)]
    data = b"".join(part for *_, part in parts)
    about = {key: value for key, value in content.items() if key != "model"}
    about["sha256"] = hashlib.sha256(data).hexdigest()
    text = json.dumps({"__metadata__": {"slimflow": json.dumps(about)}} | header).encode()
    text += b" " * (-len(text) % 8)  # aligns the numbers to 8 bytes
    return len(text).to_bytes(8, "little") + text + data


class ScalarType:
    """Replaces `numpy.dtype` of a number: its code, such as "f8", and its byte order."""

    def __init__(self, code, *_):
        if code not in FORMATS:
            raise ValueError(f"numpy type {code!r} is not a plain number")
        self.code, self.order = code, "<"

    def __setstate__(self, state):
        self.order = ">" if state[1] == ">" else "<"


def read_scalar(kind, data):
    """Return the number in the bytes `data`, in place of numpy's scalar constructor."""
    if not isinstance(kind, ScalarType):
        raise ValueError("a numpy scalar without a type")
    return struct.unpack(kind.order + FORMATS[kind.code], data)[0]


SAFE_GLOBALS = [
    (ScalarType, "numpy.dtype"),
    (read_scalar, "numpy.core.multiarray.scalar"),  # numpy 1
    (read_scalar, "numpy._core.multiarray.scalar"),  # numpy 2
]
