"""Images in files, to be measured: npy, npz, a folder or a zip, read as training reads them."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable

import numpy as np
import torch

from datasets.image_files import CorruptImage, FileTree, ImageSpec, decode_image, find_tree, fit_images
from metrics.features import check_finite, quantise
from runtime.errors import UserError

LARGEST_FLOAT = 20.0  # samples leave [-1, 1] a little; what goes beyond this was meant for 0 to 255
LOOKED_AT = 64  # images of an array of floats whose range is looked at


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Images that are read a batch at a time: read(low, high) → uint8 tensor (high - low, C, H, W).

    notes: how many of the images read so far were converted how.
    """

    path: pathlib.Path
    name: str
    count: int
    shape: tuple
    read: Callable
    notes: dict = dataclasses.field(default_factory=dict)

    def __len__(self):
        return self.count


def open_images(path, num_channels=3):
    """Return the `ImageSource` of an npy (NCHW in [-1, 1], or uint8), an npz of images, a folder or a zip.

    Images become grey with `num_channels` 1 and RGB with 3. Raises UserError if there is nothing to read, or images
    differ in size.
    """
    path = pathlib.Path(path)
    if path.suffix in (".npy", ".npz") and not path.is_dir():
        return array_source(_load_array(path), path, num_channels)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_file() and path.suffix != ".zip":
        raise UserError(f"{path} is not an npy, npz, folder or zip of images")
    return _file_source(path, num_channels)


def array_source(images, name, num_channels=None):
    """Return the source of an array (N, C, H, W): uint8 as it is, floats in [-1, 1] quantised by truncation.

    Raises UserError for another shape or type, and, on reading, for NaN (naming the sample).
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(f"{name} has shape {tuple(images.shape)}; images are (N, C, H, W) with 1 or 3 channels")
    if len(images) == 0:
        raise UserError(f"{name} holds no images")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"{name} holds {images.dtype}; images are uint8, or floats in [-1, 1]")
    spec, notes = ImageSpec(None, num_channels or images.shape[1]), {}
    if images.dtype != np.uint8:
        some = images[np.unique(np.linspace(0, len(images) - 1, LOOKED_AT).astype(int))]
        if some.min() >= 0 and some.max() <= 1:
            print(f"{name}: its values lie in [{some.min():.3g}, {some.max():.3g}], but floats are read as pixels in "
                  "[-1, 1]: bring them there if they were meant for [0, 1]", file=sys.stderr, flush=True)

    def read(low, high):
        part = np.array(images[low:high])
        if part.dtype != np.uint8:
            part = torch.from_numpy(part.astype(np.float32))
            check_finite(part, range(low, high), name, "make it again")
            if part.abs().max() > LARGEST_FLOAT:
                raise UserError(f"{name} holds values up to {part.abs().max():.0f}; images as floats are in [-1, 1]")
            part = quantise(part).numpy()
        fitted, conversions = fit_images(part, spec)
        count_notes(notes, conversions)
        return torch.from_numpy(fitted)

    return ImageSource(pathlib.Path(name), str(name), len(images), (spec.channels, *images.shape[2:]), read, notes)


def _load_array(path):
    """Return the array in an npy, or in an npz under `images`, `samples` or `arr_0`, as (N, C, H, W).

    uint8 in the order NHWC, as others' samplers write them, is turned.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        images = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix == ".npy" else None)
        if path.suffix == ".npz":
            with images as arrays:
                name = next((name for name in ("images", "samples", "arr_0") if name in arrays.files), None)
                if name is None:
                    raise UserError(f"{path} holds {', '.join(arrays.files)}, but no array images, samples or arr_0")
                images = arrays[name]
    except UserError:
        raise
    except Exception as error:  # numpy, zipfile and zlib raise many kinds for damaged files
        raise UserError(f"{path} cannot be read: {error}") from None
    if images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    return images


def _file_source(path, num_channels):
    """Return the source of the image files in a folder or zip, which must have one size."""
    tree, spec, notes = FileTree(find_tree(path)), ImageSpec(None, num_channels), {}

    def decode(name):
        try:
            return decode_image(tree.read(name), spec)
        except CorruptImage as error:
            raise UserError(f"{path}: {name} is not a readable image ({error})") from None

    shape = decode(tree.names[0])[0].shape

    def read(low, high):
        images = []
        for name in tree.names[low:high]:
            image, conversions = decode(name)
            if image.shape != shape:
                raise UserError(f"{path} holds images of different sizes: {tree.names[0]} is {shape[1]}×{shape[2]}, "
                                f"{name} is {image.shape[1]}×{image.shape[2]}; bring them to one size")
            images.append(image)
            count_notes(notes, dict.fromkeys(conversions, 1))
        return torch.from_numpy(np.stack(images))

    return ImageSource(path, str(path), len(tree.names), shape, read, notes)


def count_notes(notes, more):
    """Add the counts of `more` to those of `notes`."""
    for note, count in more.items():
        notes[note] = notes.get(note, 0) + count
