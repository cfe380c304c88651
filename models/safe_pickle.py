"""What a checkpoint file may name besides tensors: numpy scalars, which the released optimiser states hold.

A pickle names functions to call. `torch.load(weights_only=True)` refuses every name but those of tensors and of the
list below, and the list maps numpy's names to the two small readers here: no function of numpy is called either,
and the scalars arrive as plain Python numbers.
"""

import struct

FORMATS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I",
           "u2": "H", "u1": "B", "b1": "?"}


class ScalarType:
    """Stands for `numpy.dtype` of a number: its code, such as "f8", and its byte order."""

    def __init__(self, code, *_):
        if code not in FORMATS:
            raise ValueError(f"numpy type {code!r} is not a plain number")
        self.code = code
        self.order = "<"

    def __setstate__(self, state):
        self.order = ">" if state[1] == ">" else "<"


def read_scalar(kind, data):
    """Stands for numpy's scalar constructor: return the number that the bytes `data` hold."""
    if not isinstance(kind, ScalarType):
        raise ValueError("a numpy scalar without a type")
    return struct.unpack(kind.order + FORMATS[kind.code], data)[0]


SAFE_GLOBALS = [
    (ScalarType, "numpy.dtype"),
    (read_scalar, "numpy.core.multiarray.scalar"),  # numpy 1
    (read_scalar, "numpy._core.multiarray.scalar"),  # numpy 2
]
