"""Pickled data batches (CIFAR-10, downsampled ImageNet) read without running the code that a pickle may hold."""

import pickle

import numpy as np

from runtime.errors import UserError

# The functions by which numpy's own pickles make arrays and numbers, asked of numpy itself; they lie in numpy.core,
# which numpy 2 renamed.
_MAKERS = {
    "core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
    "core.multiarray.scalar": np.float64(0).__reduce__()[0],
    "core.numeric._frombuffer": np.empty(1).__reduce_ex__(5)[0],
}


def _latin1_bytes(text, encoding="latin1"):
    """Stand in for `_codecs.encode`, with which protocol 2 writes bytes, for the one encoding that it uses."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")


def _allowed(module, name):
    """Return the object that a pickle of numpy arrays and plain containers may name, or None."""
    if module.startswith(("numpy.core.", "numpy._core.")):
        return _MAKERS.get(f"core.{module.rpartition('.')[2]}.{name}")
    if module == "numpy" and name in ("ndarray", "dtype"):
        return getattr(np, name)
    if module == "_codecs" and name == "encode":
        return _latin1_bytes
    return None


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that knows numpy arrays; numbers, texts, lists, tuples and dicts need no names."""

    def find_class(self, module, name):
        found = _allowed(module, name)
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return found


def load_arrays(opened, path):
    """Return what the open binary file holds: numpy arrays, numbers and texts in plain containers.

    Texts of Python 2 become str. Raises `UserError`, naming `path`, for a file that is no pickle or names anything
    else, which could run code.
    """
    try:
        return _ArrayUnpickler(opened, encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise nearly any error
        raise UserError(f"{path} is no pickle of plain arrays ({_first_line(error)}): fetch the file again from "
                        "the data set's own page") from None


def load_array_file(path):
    """Return what the file at `path` holds, as `load_arrays` does."""
    try:
        with open(path, "rb") as opened:
            return load_arrays(opened, path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]
