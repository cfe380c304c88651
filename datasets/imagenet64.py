"""ImageNet at 64×64 with its 1,000 classes: the downsampled release, an EDM-style zip, or a tree of JPEGs."""

import re
import zipfile

import numpy as np

from datasets.folders import find_labels, picture_source
from datasets.pickles import load_array_file
from datasets.source import Contents, Source, check_labels, fit_block, identify, require
from runtime.errors import UserError

CLASSES = 1000
BLOCK = 10_000  # images written at a time
_BATCH = re.compile(r"train_data_batch_(\d+)(\.npz)?")


def open_source(root, form, skip_corrupt):
    """Return ImageNet64 from what lies at `root`.

    The downsampled release (Chrabaszcz et al. 2017): `train_data_batch_1` … `10`, pickled or npz, with classes in
    the release's own order. A zip with `dataset.json`, as EDM's dataset_tool.py writes it. A tree with one folder
    per class (or its parent, with `train` in it), classes in the order of the folders' names.
    """
    require(root, "ImageNet64", "train_data_batch_1 … 10 of the 64×64 release (pickled or npz), imagenet-64x64.zip "
                                "(as EDM's dataset_tool.py writes it) or a folder per class of JPEGs")
    batches = _find_batches(root)
    if batches:
        return Source("ImageNet64", f"ImageNet64 at {root}", identify(batches), form,
                      lambda: Contents(_read_batches(batches, form), None, tuple(map(str, range(CLASSES)))))
    tree = root / "train" if (root / "train").is_dir() else root
    return picture_source("ImageNet64", tree, form, skip_corrupt, find_labels)


def _find_batches(root):
    """Return the paths of the release's batches 1, 2, … in `root` or its Imagenet64_… folders, in order."""
    found = {}
    for path in sorted([*root.glob("train_data_batch_*"), *root.glob("Imagenet64*/train_data_batch_*")]):
        matched = _BATCH.fullmatch(path.name)
        if matched:
            found.setdefault(int(matched[1]), path)
    missing = set(range(1, max(found, default=0) + 1)) - set(found)
    if missing:
        raise UserError(f"ImageNet64: {root} lacks train_data_batch_{min(missing)}: add it (there are 10)")
    return [found[number] for number in sorted(found)]


def _read_batches(paths, form):
    """Yield the `Block`s of the release's batches, one batch in memory at a time."""
    for path in paths:
        images, labels = _check(_load(path), path)
        for start in range(0, len(images), BLOCK):
            yield fit_block(images[start : start + BLOCK], labels[start : start + BLOCK], form)


def _load(path):
    """Return a batch's dict of arrays."""
    if path.suffix != ".npz":
        return load_array_file(path)
    try:
        with np.load(path) as batch:
            return {name: batch[name] for name in ("data", "labels") if name in batch}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no readable npz file ({error}): fetch it again") from None


def _check(batch, path):
    """Return images `(n, 3, 64, 64)` uint8 and labels `(n,)` int64 from 0 (the files count from 1)."""
    data = batch.get("data") if isinstance(batch, dict) else None
    labels = batch.get("labels") if isinstance(batch, dict) else None
    right = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 12288
    if not right or labels is None or len(labels) != len(data):
        raise UserError(f"{path} is no batch of the 64×64 release (data, N×12288 uint8, and N labels): "
                        "fetch it again")
    return data.reshape(-1, 3, 64, 64), check_labels(labels, path, 1, CLASSES) - 1
