"""What every source of images offers to the cache, and what the sources share."""

import collections
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from runtime.errors import UserError

GREY_TO_COLOUR = "grey, repeated into three channels"
COLOUR_TO_GREY = "colour, turned grey (ITU-R 601 luma)"
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX}


@dataclasses.dataclass(frozen=True)
class Form:
    """The form that a source's images are brought to: square, `size` pixels, 1 (grey) or 3 (RGB) channels.

    resample: "lanczos" or "area", the filter of pictures that have another size.
    """

    size: int
    channels: int
    resample: str = "lanczos"


@dataclasses.dataclass
class Block:
    """Some decoded images in their final form, in the order of the source.

    images: uint8 `(n, C, H, W)`. labels: int64 `(n,)` or None. skipped: what was left out, a text each.
    notes: how many images were converted how.
    """

    images: np.ndarray
    labels: np.ndarray | None
    skipped: list = dataclasses.field(default_factory=list)
    notes: collections.Counter = dataclasses.field(default_factory=collections.Counter)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What an opened source holds.

    blocks: yields its `Block`s, once. count: how many images there are at most, None if only reading tells.
    class_names: names of classes 0, 1, … or None.
    """

    blocks: Iterator[Block]
    count: int | None
    class_names: tuple | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """Images on disk that can be decoded.

    name: short, for folder names. title: for messages, with the path. identity: digest of path, size and time of
    every file. form: what the images become. open: returns the `Contents`; called only when they are not cached.
    """

    name: str
    title: str
    identity: str
    form: Form
    open: Callable[[], Contents]


def require(root, dataset, wanted):
    """Raise `UserError` unless the path `root` exists; `wanted` says what belongs there."""
    if not root.exists():
        raise UserError(f"{dataset}: there is nothing at {root}: put {wanted} there, or set --config.data.data_root "
                        "to where it is")


def identify(paths, root="."):
    """Return a digest of the paths (taken from `root`), sizes and modification times of files."""
    digest = hashlib.sha256(os.fsencode(pathlib.Path(root).resolve()))
    for path in paths:
        digest.update(os.fsencode(path))
        try:
            status = os.stat(os.path.join(root, path))
        except OSError:  # a dead link: reading it will name it
            continue
        digest.update(f"\0{status.st_size} {status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def read_file(path):
    """Return a file's bytes; a `UserError` names a file that cannot be read."""
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def check_labels(labels, place, lowest, highest):
    """Return labels as int64 array. Raises `UserError` unless all are whole numbers from `lowest` to `highest`."""
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise UserError(f"{place}: its labels are no list of whole numbers")
    if len(labels) and (labels.min() < lowest or labels.max() > highest):
        raise UserError(f"{place} has labels from {labels.min()} to {labels.max()}; they must lie in "
                        f"{lowest}..{highest}")
    return labels.astype(np.int64)


def fit_block(images, labels, form):
    """Return native uint8 images `(n, C, H, W)`, square, with their labels as a `Block` in `form`."""
    notes = collections.Counter()
    images = np.ascontiguousarray(images)
    if images.shape[2] != form.size:
        notes[f"resized from {images.shape[2]}×{images.shape[2]} with the {form.resample} filter"] = len(images)
        images = np.stack([[_resize(plane, form) for plane in image] for image in images])
    if images.shape[1] == 1 and form.channels == 3:
        notes[GREY_TO_COLOUR] = len(images)
        images = images.repeat(3, axis=1)
    elif images.shape[1] == 3 and form.channels == 1:
        notes[COLOUR_TO_GREY] = len(images)
        images = np.stack([np.asarray(Image.fromarray(i.transpose(1, 2, 0)).convert("L")) for i in images])[:, None]
    return Block(images, labels, notes=notes)


def _resize(plane, form):
    """Return one channel `(H, W)` as `(size, size)`."""
    return np.asarray(Image.fromarray(plane).resize((form.size, form.size), FILTERS[form.resample]))
