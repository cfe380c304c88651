"""CIFAR-10's training set (Krizhevsky 2009): 50,000 colour images of 32×32 in five pickled batches."""

import contextlib
import os
import tarfile
import tempfile

import numpy as np

from datasets.pickles import load_array_file, load_arrays
from datasets.source import Contents, Source, check_labels, fit_block, identify
from runtime.errors import UserError
from runtime.files import file_lock

ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def open_source(root, form, skip_corrupt):
    """Return CIFAR-10: the python batches, unpacked or as the distributed archive, at or under `root`.

    When neither is there, the archive is downloaded to `root`. Raises `UserError` when that fails.
    """
    place = _find(root) or _download(root)
    if place.is_file():
        return Source("CIFAR10", f"CIFAR10 at {place}", identify([place]), form,
                      lambda: _contents(_archived_batches(place), form))
    missing = [name for name in BATCHES if not (place / name).is_file()]
    if missing:
        raise UserError(f"CIFAR10: {place} lacks {', '.join(missing)}: unpack {ARCHIVE} again")
    return Source("CIFAR10", f"CIFAR10 at {place}", identify(BATCHES, place), form,
                  lambda: _contents(_unpacked_batches(place), form))


def _find(root):
    """Return the folder of the batches or the archive, at or in `root`, or None."""
    if root.is_file():
        return root
    for folder in (root, root / FOLDER):
        if any((folder / name).exists() for name in BATCHES):
            return folder
    return root / ARCHIVE if (root / ARCHIVE).is_file() else None


def _download(root):
    """Fetch the archive to `root`, once for all processes, and return its path."""
    from torchvision.datasets import CIFAR10  # here, since importing it takes seconds
    from torchvision.datasets.utils import download_url

    lock = root / ".download.lock"
    try:
        with file_lock(lock, "downloading CIFAR10"):
            if _find(root) is None:
                with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as unfinished:
                    download_url(CIFAR10.url, unfinished, ARCHIVE, CIFAR10.tgz_md5)
                    os.replace(os.path.join(unfinished, ARCHIVE), root / ARCHIVE)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; RuntimeError: the wrong digest
        with contextlib.suppress(OSError):  # leaves no empty folder where the user mistyped a path
            lock.unlink()
            root.rmdir()
        raise UserError(f"CIFAR10: there is nothing at {root} and {CIFAR10.url} could not be downloaded "
                        f"({getattr(error, 'reason', error)}): put {ARCHIVE} or {FOLDER}/ there, or set "
                        "--config.data.data_root to where it is") from None
    return root / ARCHIVE


def _unpacked_batches(folder):
    """Yield (path, content) of the five batches in a folder."""
    for name in BATCHES:
        yield folder / name, load_array_file(folder / name)


def _archived_batches(archive):
    """Yield (path, content) of the five batches in the distributed archive, which stays packed."""
    try:
        with tarfile.open(archive) as members:
            for name in BATCHES:
                place = f"{archive}: {FOLDER}/{name}"
                yield place, load_arrays(members.extractfile(f"{FOLDER}/{name}"), place)
    except (tarfile.TarError, OSError, EOFError, KeyError) as error:
        raise UserError(f"{archive} is no complete CIFAR-10 archive ({error}): download it again") from None


def _contents(batches, form):
    def blocks():
        for place, batch in batches:
            images, labels = _check(batch, place)
            yield fit_block(images, labels, form)

    return Contents(blocks(), None, CLASS_NAMES)


def _check(batch, place):
    """Return a batch's images `(n, 3, 32, 32)` uint8 and labels `(n,)` int64; `UserError` when it has none."""
    data, labels = (batch.get("data"), batch.get("labels")) if isinstance(batch, dict) else (None, None)
    right = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072
    if not right or not isinstance(labels, list) or len(labels) != len(data):
        raise UserError(f"{place} is no CIFAR-10 batch (a dict of data, N×3072 uint8, and N labels): download it again")
    return data.reshape(-1, 3, 32, 32), check_labels(labels, place, 0, 9)
