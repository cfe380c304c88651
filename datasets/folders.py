"""Sources that are pictures in a folder or a zip: FFHQ64, class-per-folder trees, anyone's own images."""

import collections
import concurrent.futures
import os

import numpy as np

from datasets import file_trees
from datasets.picture import CorruptPicture, decode_picture
from datasets.source import Block, Contents, Source, require
from runtime.errors import UserError

BLOCK = 16  # pictures decoded by one thread at a time


def open_ffhq(root, form, skip_corrupt):
    """Return FFHQ: an EDM-style zip or a folder of PNGs, at 64×64, as 128×128 thumbnails or at any size.

    It has no classes: its sub-folders (00000, 01000, …) only keep folders small.
    """
    require(root, "FFHQ64", "ffhq-64x64.zip (as EDM's dataset_tool.py writes it), a folder of the PNGs at 64×64 or "
                            "the 128×128 thumbnails")
    return picture_source("FFHQ64", root, form, skip_corrupt, no_labels)


def open_custom(root, form, skip_corrupt):
    """Return a folder or zip of images of any size; classes by dataset.json or else by first sub-folder, if any."""
    require(root, "custom", "a folder or zip of images")
    return picture_source("custom", root, form, skip_corrupt, find_labels)


def no_labels(tree, names):
    """Return no class numbers and no class names."""
    return None, None


def find_labels(tree, names):
    """Return the class numbers (list of int) and class names of pictures, (None, None) without classes."""
    if file_trees.LABEL_FILE not in tree.names:
        return file_trees.labels_from_folders(names)
    labels = file_trees.labels_from_json(tree, names)
    return labels, labels and tuple(str(number) for number in range(max(labels) + 1))


def picture_source(name, root, form, skip_corrupt, labelling):
    """Return the `Source` of all pictures under the folder or zip `root`.

    labelling(tree, names) returns their class numbers and the class names, as `find_labels` does.
    """
    place = file_trees.find_tree(root)

    def open_contents():
        tree = file_trees.open_tree(place)
        names = file_trees.picture_names(tree)
        labels, class_names = labelling(tree, names)

        def decode_block(start):
            part = slice(start, start + BLOCK)
            return _decode_block(tree, names[part], labels and labels[part], form, skip_corrupt)

        return Contents(map_ahead(decode_block, range(0, len(names), BLOCK)), len(names), class_names)

    return Source(name, f"{name} at {place}", file_trees.tree_identity(place), form, open_contents)


def _decode_block(tree, names, labels, form, skip_corrupt):
    """Return the pictures `names`, with their labels or None, as a `Block`."""
    images, kept, skipped, notes = [], [], [], collections.Counter()
    for place, name in enumerate(names):
        try:
            pixels, conversions = decode_picture(tree.read(name), form)
        except (CorruptPicture, UserError) as error:
            if not skip_corrupt:
                raise UserError(f"corrupt image {name} in {tree.root} ({error}): remove or replace it, or skip such "
                                "files with --config.data.skip_corrupt true") from None
            skipped.append(f"{name} ({error})")
            continue
        images.append(pixels)
        kept.append(place)
        notes.update(conversions)
    stacked = np.stack(images) if images else np.empty((0, form.channels, form.size, form.size), np.uint8)
    return Block(stacked, None if labels is None else np.array(labels, np.int64)[kept], skipped, notes)


def map_ahead(function, items):
    """Yield `function(item)` in order, computed by one thread per core a little ahead of what is taken.

    Threads, since Pillow decodes and resamples outside the interpreter lock, and nothing has to be copied between
    processes. A window, since a data set's pictures would not fit in memory.
    """
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        window = collections.deque()
        for item in items:
            window.append(pool.submit(function, item))
            if len(window) > 2 * workers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
