"""Rows of a large npy file, read where they lie on disk: memory stays small however long the file is."""

import io
import os
import pathlib
import weakref

import numpy as np

from runtime.errors import UserError


class NpyRows:
    """An npy array `(N, ...)` read row by row with `pread`.

    A memory map would do the same work, but its pages count as the process's own memory until the kernel wants
    them back; what `pread` leaves in the page cache does not. Safe to use from several threads.
    """

    def __init__(self, path):
        """Open the file at `path`; raises UserError if it is no npy file of numbers in C order or is cut short."""
        self.path = pathlib.Path(path)
        self.count, self.shape, self.dtype, self.offset = read_header(self.path)
        self.row_bytes = self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))
        needed, found = self.offset + self.count * self.row_bytes, self.path.stat().st_size
        if found < needed:
            raise UserError(f"{self.path} is cut short: its header promises {self.count} rows, {needed} bytes, but "
                            f"it has {found}; copy or make it again")
        self.file = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.file, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead past shuffled rows

    def __len__(self):
        """Return the number of rows N."""
        return self.count

    def rows(self, indices):
        """Return the rows at integers `indices` `(n,)` in [0, N): an array `(n, ...)` of the file's type."""
        out = np.empty((len(indices), *self.shape), self.dtype)
        self.read_into(out, range(len(indices)), indices)
        return out

    def read_into(self, out, places, indices):
        """Read row `indices[k]` into `out[places[k]]` for every k; `out` is an array of such rows in C order."""
        content, size, indices = memoryview(out.reshape(-1).view(np.uint8)), self.row_bytes, [int(i) for i in indices]
        if hasattr(os, "posix_fadvise"):  # all at once, so that a disk can work on them together: 2 to 3 times faster
            for index in indices:
                os.posix_fadvise(self.file, self.offset + index * size, size, os.POSIX_FADV_WILLNEED)
        for place, index in zip(places, indices, strict=True):
            self._read(content[place * size:(place + 1) * size], index)

    def slice(self, low, high):
        """Return rows [low, high), one read for all: an array `(high - low, ...)` of the file's type."""
        out = np.empty((high - low, *self.shape), self.dtype)
        content = memoryview(out.reshape(-1).view(np.uint8))
        for start in range(0, len(content), 1 << 30):  # one read call moves at most 2 GiB
            self._read(content[start:start + (1 << 30)], low, start)
        return out

    def _read(self, buffer, index, start=0):
        """Fill `buffer`, a memoryview of bytes, from byte `start` of row `index` on."""
        if _read_at(self.file, buffer, self.offset + index * self.row_bytes + start) != len(buffer):
            raise UserError(f"{self.path}: row {index} cannot be read; the file became shorter, or the row is none "
                            f"of its {self.count}")


def _read_at(file, buffer, offset):
    """Fill `buffer` from place `offset` of an open file; return the number of bytes that there were."""
    if hasattr(os, "preadv"):
        return os.preadv(file, [buffer], offset)
    content = os.pread(file, len(buffer), offset)  # macOS has no preadv
    buffer[:len(content)] = content
    return len(content)


def read_header(path):
    """Return (rows, shape of a row, dtype, bytes before the first row) of the npy file at `path`.

    Raises UserError if it is missing or is not an npy array of numbers in C order.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        with open(path, "rb") as opened:
            version = np.lib.format.read_magic(opened)
            readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran_order, dtype = readers[version](opened)
            offset = opened.tell()
    except (ValueError, KeyError, EOFError):
        raise UserError(f"{path} is not an npy file that numpy wrote with np.save") from None
    if not shape or fortran_order or dtype.kind not in "fiub":
        raise UserError(f"{path} holds {dtype} of shape {shape}{', in Fortran order' * fortran_order}; an array of "
                        "numbers (N, ...) in C order is needed")
    return shape[0], tuple(shape[1:]), dtype, offset


def header_bytes(count, shape, dtype):
    """Return the npy header of an array `(count, *shape)`: its length does not depend on `count`.

    numpy leaves room for the first dimension to grow, so that a header can be replaced where it stands.
    """
    buffer = io.BytesIO()
    values = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (int(count), *map(int, shape))}
    np.lib.format.write_array_header_1_0(buffer, values)
    return buffer.getvalue()
