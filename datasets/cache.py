"""Decoded data sets on disk: each source is decoded once, into arrays that are mapped into memory.

An entry is a folder `{cache_dir}/{name}-{C}x{H}x{W}-{key}/`. The key is a digest of the source's files (paths, sizes
and times, not content) and of the `ImageSpec`. An entry gets this name when it is complete.
"""

import collections
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from runtime.files import file_lock, read_json, write_json
from runtime.terminal import UserError, print_message, progress_bar

VERSION = 2  # of the decoding; older entries are not used


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Decoded images: a data set, or a part of one on its way into the cache.

    images: uint8 `(N, C, H, W)`, memory-mapped if they come from the cache. labels: int64 `(N,)` or None.
    class_names: names of classes 0, 1, …, or None. source: where they come from, for messages and reports.
    notes: {conversion: number of images}. cache: folder of the cache entry, or None. skipped: errors of corrupt images.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple | None = None
    source: str = ""
    notes: dict = dataclasses.field(default_factory=dict)
    cache: str | None = None
    skipped: tuple = ()

    def __len__(self):
        return len(self.images)

    def choose(self, indices, source):
        """Return the images `indices` as an `ImageSet` with the name `source`; UserError if there are none."""
        if not len(indices):
            raise UserError(f"{source} has no image")
        labels = None if self.labels is None else self.labels[indices]
        return dataclasses.replace(self, images=self.images[indices], labels=labels, source=source)

    def take(self, indices):
        """Return {"z1": uint8 `(n, C, H, W)`, and with labels "label": int64 `(n,)`} of `indices` `(n,)`."""
        arrays = {"z1": self.images} | ({} if self.labels is None else {"label": self.labels})
        return {name: torch.from_numpy(rows[indices]) for name, rows in arrays.items()}


class Source(NamedTuple):
    """Images on disk that can be decoded into the cache.

    name: for folder names. title: for messages. identity: digest of the files (`identify`). open: returns an iterator
    over `ImageSet`s, the largest possible number of images (None: unknown) and the class names or None.
    """

    name: str
    title: str
    identity: str
    open: Callable[[], tuple]


def open_cached(source, spec, cache_dir, progress):
    """Return the `ImageSet` of a `Source`, memory-mapped; decode it on first use. UserError if that is not possible."""
    identity = [VERSION, source.identity, spec.size, spec.channels, spec.resample]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    entry = pathlib.Path(cache_dir) / f"{source.name}-{spec.channels}x{spec.size}x{spec.size}-{key}"
    found = _open_entry(entry, spec)
    if found is None:
        try:
            with file_lock(entry.with_name(f".{entry.name}.lock"), f"decoding {source.title}"):
                found = _open_entry(entry, spec)  # the process that held the lock may have written it
                found = found or _write_entry(source, spec, entry, progress)
        except OSError as error:
            raise UserError(f"data.cache_dir {cache_dir} cannot be written ({error.strerror or error}): make room or "
                            "give write permission, or choose another folder with --config.data.cache_dir") from None
    if found.skipped and not spec.skip_corrupt:
        raise UserError(f"{source.title} was cached without {len(found.skipped)} images, the first: {found.skipped[0]};"
                        " repair them, or go on without them with --config.data.skip_corrupt true")
    return found


def _open_entry(entry, spec):
    """Return the `ImageSet` of an entry, or None when it is absent or damaged."""
    if not entry.is_dir():
        return None
    try:
        about = read_json(entry / "about.json")
        images = np.load(entry / "images.npy", mmap_mode="r")
        labels = np.load(entry / "labels.npy") if about["labelled"] else None
        shape = about["count"], spec.channels, spec.size, spec.size
        if images.shape != shape or images.dtype != np.uint8 or (labels is not None and len(labels) != len(images)):
            raise ValueError("its files do not belong together")
        return ImageSet(images, labels, about["class_names"] and tuple(about["class_names"]), about["source"],
                        dict(about["notes"]), str(entry), tuple(about["skipped"]))
    except Exception as error:  # numpy raises many kinds of error for damaged headers
        print_message(f"the cache entry {entry} is damaged ({error}): decoding again", stderr=True)
        return None


def _write_entry(source, spec, entry, progress):
    """Decode the source into `entry` and open it; what a killed process left of the hidden folder is removed."""
    partial = entry.with_name(f".{entry.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    chunks, expected, class_names = source.open()
    count, labels, skipped, notes = 0, [], [], collections.Counter()
    layout = np.dtype(("|u1", (spec.channels, spec.size, spec.size)))
    partial.mkdir()
    try:
        with (open(partial / "images.npy", "wb") as written,  # on a full disk a memory map would kill the process
              progress_bar(total=expected, desc=f"decoding {source.name}", unit="images", enabled=progress) as bar):
            written.write(npy_header(layout, 0))
            for chunk in chunks:
                written.write(np.ascontiguousarray(chunk.images))
                if chunk.labels is not None:
                    labels.append(chunk.labels)
                count += len(chunk.images)
                skipped += chunk.skipped
                notes.update(chunk.notes)
                bar.update(len(chunk.images) + len(chunk.skipped))
            written.seek(0)
            written.write(npy_header(layout, count))
        if not count:
            raise UserError(f"{source.title} has no usable image: {', '.join(skipped[:1]) or 'it is empty'}")
        if labels:
            np.save(partial / "labels.npy", np.concatenate(labels))
        write_json(partial / "about.json", {"source": source.title, "class_names": class_names, "count": count,
                                            "labelled": bool(labels), "skipped": skipped, "notes": notes})
        os.sync()  # before the entry gets its name
        shutil.rmtree(entry, ignore_errors=True)  # a damaged one
        partial.rename(entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    notes |= {f"skipped, the first: {first}": len(skipped) for first in skipped[:1]}
    print_message("\n".join([f"cached {source.title}: {count} images in {entry}",
                             *(f"  {number} images: {note}" for note, number in notes.items())]), stderr=True)
    return _open_entry(entry, spec)


def npy_header(layout, count):
    """Return the npy header of `count` rows. Its length does not depend on `count`, so it can be replaced in place."""
    buffer = io.BytesIO()
    fields = {"descr": layout.base.str, "fortran_order": False, "shape": (count, *layout.shape)}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()
