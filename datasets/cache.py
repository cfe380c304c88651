"""Decoded data sets on disk: each source once, as arrays that are mapped into memory.

An entry is a folder `{cache_dir}/{name}-{C}x{H}x{W}-{key}/`. The key is a digest of the source's files (paths, sizes
and times, not content) and of the `ImageSpec`. An entry is renamed when it is complete: what exists is whole.
"""

import collections
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from runtime.files import file_lock
from runtime.terminal import UserError, progress_bar

VERSION = 2  # of what decoding does; a change makes old entries unused


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Decoded images: a data set, or a part of one on its way into the cache.

    images: uint8 `(N, C, H, W)`, memory-mapped where they come from the cache. labels: int64 `(N,)` or None.
    class_names: names of classes 0, 1, …, or None. source: where they come from, for messages and reports.
    notes: how many images were converted how. cache: folder of the cache entry, or None. skipped: corrupt images.
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
        """Return the images `indices` as an `ImageSet` that is called `source`; UserError for none."""
        if not len(indices):
            raise UserError(f"{source} has no image")
        labels = None if self.labels is None else self.labels[indices]
        return dataclasses.replace(self, images=self.images[indices], labels=labels, source=source)

    def take(self, indices):
        """Return {"z1": uint8 `(n, C, H, W)`, "label": int64 `(n,)`} of `indices` `(n,)`; no label without labels."""
        arrays = {"z1": self.images} | ({} if self.labels is None else {"label": self.labels})
        return {name: torch.from_numpy(rows[indices]) for name, rows in arrays.items()}


class Source(NamedTuple):
    """Images on disk that can be decoded into the cache.

    name: for folder names. title: for messages. identity: digest of the files (`identify`). open: returns an iterator
    over `ImageSet`s, how many images there are at most (None: only reading tells) and the class names or None.
    """

    name: str
    title: str
    identity: str
    open: Callable[[], tuple]


def open_cached(source, spec, cache_dir, progress):
    """Return the `ImageSet` of a `Source`, mapped into memory read-only; decode it into `cache_dir` on first use.

    Raises UserError for images that cannot be decoded or written, or are corrupt, unless `spec` skips them.
    """
    entry = entry_folder(source, spec, cache_dir)
    found = _open_entry(entry, spec)
    if found is None:
        try:
            with file_lock(entry.with_name(f".{entry.name}.lock"), f"decoding {source.title}"):
                found = _open_entry(entry, spec)  # the process that held the lock may have made it
                if found is None:
                    _write_entry(source, spec, entry, progress)
                    found = _open_entry(entry, spec)
        except OSError as error:
            raise UserError(f"data.cache_dir {cache_dir} cannot be written ({error.strerror or error}): make room or "
                            "give write permission, or choose another folder with --config.data.cache_dir") from None
    if found.skipped and not spec.skip_corrupt:
        raise UserError(f"{source.title} was cached without {len(found.skipped)} images, the first: {found.skipped[0]};"
                        " repair them, or go on without them with --config.data.skip_corrupt true")
    return found


def entry_folder(source, spec, cache_dir):
    identity = [VERSION, source.identity, spec.size, spec.channels, spec.resample]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return pathlib.Path(cache_dir) / f"{source.name}-{spec.channels}x{spec.size}x{spec.size}-{key}"


def _open_entry(entry, spec):
    """Return the `ImageSet` of an entry, or None when it is absent or damaged."""
    if not entry.is_dir():
        return None
    try:
        about = json.loads((entry / "about.json").read_text())
        images = np.load(entry / "images.npy", mmap_mode="r")
        labels = np.load(entry / "labels.npy") if about["labelled"] else None
        shape = about["count"], spec.channels, spec.size, spec.size
        if images.shape != shape or images.dtype != np.uint8 or (labels is not None and len(labels) != len(images)):
            raise ValueError("its parts do not fit together")
        return ImageSet(images, labels, about["class_names"] and tuple(about["class_names"]), about["source"],
                        dict(about["notes"]), str(entry), tuple(about["skipped"]))
    except Exception as error:  # numpy raises many kinds for damaged headers
        print(f"the cache entry {entry} is damaged ({error}): decoding again", file=sys.stderr, flush=True)
        return None


def _write_entry(source, spec, entry, progress):
    """Decode the source into `entry`; whatever stops it leaves only a hidden folder that the next one removes."""
    partial = entry.with_name(f".{entry.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    chunks, expected, class_names = source.open()
    partial.mkdir()
    try:
        with progress_bar(total=expected, desc=f"decoding {source.name}", unit="images", enabled=progress) as bar:
            about = {"source": source.title, "class_names": class_names} | _write_arrays(chunks, spec, partial, bar)
        if not about["count"]:
            raise UserError(f"{source.title} has no usable image: {', '.join(about['skipped'][:1]) or 'it is empty'}")
        (partial / "about.json").write_text(json.dumps(about, indent=2) + "\n")
        os.sync()  # what has its name is on disk
        shutil.rmtree(entry, ignore_errors=True)  # a damaged one
        partial.rename(entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    notes = about["notes"] | {f"skipped, the first: {first}": len(about["skipped"]) for first in about["skipped"][:1]}
    print(f"cached {source.title}: {about['count']} images in {entry}",
          *(f"  {count} images: {note}" for note, count in notes.items()), sep="\n", file=sys.stderr, flush=True)


def _write_arrays(chunks, spec, folder, bar):
    """Write `images.npy` and `labels.npy` chunk by chunk; return what `about.json` says of them."""
    count, labels, skipped, notes = 0, [], [], collections.Counter()
    layout = np.dtype(("|u1", (spec.channels, spec.size, spec.size)))
    with open(folder / "images.npy", "wb") as written:  # a memory map would end the process when the disk is full
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
    if labels:
        np.save(folder / "labels.npy", np.concatenate(labels))
    return {"count": count, "labelled": bool(labels), "skipped": skipped, "notes": notes}


def npy_header(layout, count):
    """Return the npy header of `count` rows. Its length does not depend on `count`, so it can be replaced in place."""
    buffer = io.BytesIO()
    fields = {"descr": layout.base.str, "fortran_order": False, "shape": (count, *layout.shape)}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()
