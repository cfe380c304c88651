"""Small files in the exact formats of the data sets, for the tests of the sources."""

import gzip
import io
import json
import pickle
import struct
import zipfile

import numpy as np
from PIL import Image

from tests.helpers import config_of


def random_images(count, channels, size, seed=0):
    """Return uint8 images `(count, channels, size, size)`."""
    return np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def png(image):
    """Return uint8 `(C, H, W)` as the bytes of a PNG."""
    return encode(Image.fromarray(image.squeeze(0) if len(image) == 1 else image.transpose(1, 2, 0)), "PNG")


def encode(image, kind, **options):
    """Return a Pillow image as the bytes of a file."""
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


def write_folder(folder, files):
    """Write a dict of relative names and bytes."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_zip(path, files):
    """Write a dict of names and bytes as a zip archive."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def label_file(labels):
    """Return a dataset.json of a dict of names and class numbers, or of None."""
    return json.dumps({"labels": labels if labels is None else [[n, k] for n, k in labels.items()]}).encode()


def write_cifar(folder, images, labels):
    """Write images and labels as CIFAR-10's python batches, as Python 2 pickled them (protocol 2)."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = zip(np.array_split(images, 5), np.array_split(labels, 5), strict=True)
    for number, (part, part_labels) in enumerate(parts, 1):
        content = {"data": part.reshape(len(part), -1), "labels": part_labels.tolist(),
                   "batch_label": f"training batch {number} of 5", "filenames": ["a.png"] * len(part)}
        (folder / f"data_batch_{number}").write_bytes(pickle.dumps(content, protocol=2))


def idx_bytes(values):
    """Return a uint8 array as an IDX file."""
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_mnist(folder, images, labels, packed):
    """Write grey images `(N, 1, H, W)` and labels as MNIST's training files, gzipped or not."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("train-images-idx3-ubyte", images[:, 0]), ("train-labels-idx1-ubyte", labels)):
        data = idx_bytes(values.astype(np.uint8))
        (folder / (name + (".gz" if packed else ""))).write_bytes(gzip.compress(data) if packed else data)


def make_config(tmp_path, dataset, root, size, channels=3, **data):
    """Return a config for a data set, its cache under `tmp_path`, without bars."""
    fields = {"dataset": dataset, "data_root": str(root), "image_size": size, "num_channels": channels,
              "cache_dir": str(tmp_path / "cache"), **data}
    return config_of(training__progress="false", **{f"data__{name}": value for name, value in fields.items()})
