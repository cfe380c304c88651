"""MNIST and Fashion-MNIST as distributed: IDX files (LeCun et al. 1998), gzipped or not."""

import gzip
import zlib

import numpy as np

from datasets.source import Contents, Source, check_labels, fit_block, identify, read_file, require
from runtime.errors import UserError

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
BLOCK = 10_000  # images resized and written at a time
CLASS_NAMES = {
    "MNIST": tuple("0123456789"),
    "FashionMNIST": ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                     "Ankle boot"),
}


def open_mnist(root, form, skip_corrupt):
    """Return MNIST's 60,000 training images."""
    return _open_source("MNIST", root, form)


def open_fashion_mnist(root, form, skip_corrupt):
    """Return Fashion-MNIST's 60,000 training images."""
    return _open_source("FashionMNIST", root, form)


def _open_source(name, root, form):
    """Return the `Source` of the training files in `root`, `root`/raw or `root`/{name}/raw (torchvision's place)."""
    wanted = f"{IMAGES} and {LABELS} (.gz or unpacked)"
    require(root, name, wanted)
    folders = (root, root / "raw", root / name / "raw")
    files = [next((path for folder in folders for path in _spellings(folder, file) if path.is_file()), None)
             for file in (IMAGES, LABELS)]
    if None in files:
        raise UserError(f"{name}: {root} lacks {' and '.join((IMAGES, LABELS)[i] for i in (0, 1) if files[i] is None)}"
                        f": put {wanted} there, or set --config.data.data_root to where they are")

    def open_contents():
        images, labels = read_idx(files[0], 3), read_idx(files[1], 1)
        if images.shape[1] != images.shape[2]:
            raise UserError(f"{files[0]} holds images of {images.shape[1]}×{images.shape[2]}; square ones are needed")
        if len(images) != len(labels):
            raise UserError(f"{files[0]} has {len(images)} images, {files[1]} {len(labels)} labels: fetch both again")
        labels = check_labels(labels, files[1], 0, 9)
        blocks = (fit_block(images[start : start + BLOCK, None], labels[start : start + BLOCK], form)
                  for start in range(0, len(images), BLOCK))
        return Contents(blocks, len(images), CLASS_NAMES[name])

    return Source(name, f"{name} at {files[0].parent}", identify(files), form, open_contents)


def _spellings(folder, file):
    """Return the paths at which a file may lie: with a dot or a hyphen before idx, gzipped or not."""
    return [folder / (name + ending) for name in (file, file.replace("-idx", ".idx")) for ending in ("", ".gz")]


def read_idx(path, dimensions):
    """Return the uint8 array of an IDX file with that many dimensions. Raises `UserError` for any other content.

    The format: two zero bytes, the type (8: unsigned byte), the number of dimensions, each dimension as a big-endian
    32-bit number, then the values.
    """
    data = read_file(path)
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is a damaged gzip file ({error}): fetch it again") from None
    head = 4 + 4 * dimensions
    if len(data) < head or data[:4] != bytes([0, 0, 8, dimensions]):
        raise UserError(f"{path} is no IDX file of unsigned bytes with {dimensions} dimensions: fetch it again")
    shape = np.frombuffer(data, ">u4", dimensions, offset=4).astype(int)
    if len(data) - head != shape.prod():
        raise UserError(f"{path} should hold {shape.prod()} values and holds {len(data) - head}: fetch it again")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)
