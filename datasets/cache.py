"""Decoded data sets on disk: each source once, as arrays that are mapped into memory.

An entry is a folder `{cache_dir}/{name}-{C}x{H}x{W}-{key}/` with `images.npy`, `labels.npy` and `about.json`. The key
is a digest of the source's files (path, size, time) and of the form that they are brought to. An entry is written
as a hidden folder beside its place and renamed when it is complete, so an entry that exists is whole.
"""

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import sys
import time

import numpy as np

from runtime.errors import UserError
from runtime.files import file_lock
from runtime.progress import progress_bar

VERSION = 1  # of what decoding does; a change makes old entries unused


def open_cached(source, cache_dir, progress):
    """Return the decoded source as `(images, labels, about)`, decoding it on first use.

    images: uint8 `(N, C, H, W)`, mapped read-only. labels: int64 `(N,)` or None. about: dict of `about.json`:
    source, count, shape, class_names, skipped, notes, folder. progress: config field `training.progress`.
    """
    entry = entry_folder(source, cache_dir)
    found = _open_entry(entry)
    if found is None:
        lock = entry.with_name(f".{entry.name}.lock")
        with _explain_failures(cache_dir), file_lock(lock, f"decoding {source.title}"):
            found = _open_entry(entry)  # the process that held the lock may have made it
            if found is None:
                _write_entry(source, entry, progress)
                found = _open_entry(entry)
    return found


def entry_folder(source, cache_dir):
    """Return the folder of the source's entry."""
    form = source.form
    words = [VERSION, source.identity, form.size, form.channels, form.resample]
    key = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]
    return pathlib.Path(cache_dir) / f"{source.name}-{form.channels}x{form.size}x{form.size}-{key}"


def _open_entry(entry):
    """Return `(images, labels, about)` of an entry, or None when it is absent or damaged."""
    if not entry.is_dir():
        return None
    try:
        about = json.loads((entry / "about.json").read_text())
        images = np.load(entry / "images.npy", mmap_mode="r")
        labels = np.load(entry / "labels.npy") if about["labelled"] else None
        if images.shape != (about["count"], *about["shape"]) or (about["labelled"] and len(labels) != about["count"]):
            raise ValueError("its parts do not fit together")
    except (OSError, ValueError, KeyError, EOFError) as error:
        print(f"the cache entry {entry} is damaged ({error}): decoding again", file=sys.stderr, flush=True)
        return None
    return images, labels, about | {"folder": str(entry)}


def _write_entry(source, entry, progress):
    """Decode the source into `entry`; whatever stops it leaves only a hidden folder that the next one removes."""
    partial = entry.with_name(f".{entry.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    form, contents = source.form, source.open()
    if contents.count is not None:
        needed, free = contents.count * form.channels * form.size**2, shutil.disk_usage(entry.parent).free
        if needed > free:
            raise UserError(f"data.cache_dir {entry.parent}: {source.title} needs {_megabytes(needed)} there, "
                            f"{_megabytes(free)} are free: free some or choose another folder")
    partial.mkdir()
    try:
        about = _decode(source, contents, partial, progress)
        (partial / "about.json").write_text(json.dumps(about, indent=2) + "\n")
        for path in [*partial.iterdir(), partial]:
            _flush(path)
        shutil.rmtree(entry, ignore_errors=True)  # a damaged one
        partial.rename(entry)
        _flush(entry.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _report(about, entry)


def _decode(source, contents, folder, progress):
    """Write `images.npy` and `labels.npy` block by block; return what `about.json` says of them.

    Plain writes, since a memory map ends the process when the disk is full.
    """
    form, count, labels, skipped, notes = source.form, 0, [], [], collections.Counter()
    shape = (form.channels, form.size, form.size)
    bar = progress_bar(total=contents.count, desc=f"decoding {source.name}", unit="images", enabled=progress)
    with bar, open(folder / "images.npy", "wb") as written:
        _write_header(written, (0, *shape))
        for block in contents.blocks:
            written.write(np.ascontiguousarray(block.images))
            if block.labels is not None:
                labels.append(block.labels)
            count += len(block.images)
            skipped += block.skipped
            notes += block.notes
            bar.update(len(block.images) + len(block.skipped))
        written.seek(0)
        _write_header(written, (count, *shape))
    if count == 0:
        raise UserError(f"{source.title} has no usable image" + (f": {skipped[0]}" if skipped else ""))
    if labels:
        np.save(folder / "labels.npy", np.concatenate(labels))
    return {"source": source.title, "count": count, "shape": shape, "labelled": bool(labels),
            "class_names": contents.class_names, "skipped": skipped, "notes": notes,
            "decoded": time.strftime("%Y-%m-%d %H:%M:%S")}


def _write_header(written, shape):
    """Write the header of a uint8 npy file; numpy pads it, so that it has one length whatever the count is."""
    np.lib.format.write_array_header_1_0(written, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _report(about, entry):
    """Tell the user what was cached, and where, and what was done to the images."""
    size = (entry / "images.npy").stat().st_size
    lines = [f"cached {about['source']}: {about['count']} images in {entry} ({_megabytes(size)})"]
    lines += [f"  {count} images: {note}" for note, count in about["notes"].items()]
    if about["skipped"]:
        lines.append(f"  {len(about['skipped'])} corrupt images skipped, the first {about['skipped'][0]}; all are "
                     f"listed in {entry / 'about.json'}")
    print("\n".join(lines), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _explain_failures(cache_dir):
    """Turn a full disk or a folder that cannot be written into one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"data.cache_dir {cache_dir} cannot be written ({error.strerror or error}): make room or give "
                        "write permission, or choose another folder with --config.data.cache_dir") from None


def _flush(path):
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _megabytes(size):
    """Return a number of bytes as text."""
    return f"{size / 2**20:.1f} MiB"
