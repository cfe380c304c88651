"""Keeping the samples that were measured: one npy that all processes fill."""

import contextlib
import pathlib

import numpy as np

from runtime.files import atomic_path


@contextlib.contextmanager
def sample_store(path, count, shape, processes):
    """Yield `keep(first, images)`, which puts uint8 images at their numbers into an npy (count, C, H, W) at `path`.

    The file appears under its name when all processes are done.
    """
    if processes.world_size == 1:
        with atomic_path(path) as temporary:
            yield _keeper(np.lib.format.open_memmap(temporary, "w+", np.uint8, (count, *shape)))
        return
    shared = pathlib.Path(path).with_suffix(".partial.npy")
    if processes.is_main:
        shared.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(shared, "w+", np.uint8, (count, *shape)).flush()
    processes.barrier()
    try:
        array = np.lib.format.open_memmap(shared, "r+")
        yield _keeper(array)
        array.flush()
        processes.barrier()
        if processes.is_main:
            shared.replace(path)
    finally:
        if processes.is_main:
            shared.unlink(missing_ok=True)


def _keeper(array):
    def keep(first, images):
        array[first : first + len(images)] = images.cpu().numpy()

    return keep
