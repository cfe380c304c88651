"""Images to be measured, read a batch at a time from npy, npz, a folder or a zip, as training decodes them."""

import collections
import pathlib
import sys

import numpy as np
import torch

from datasets.batches import check_finite, some_of
from datasets.image_files import FileTree, ImageSpec, fit_images
from datasets.pairs import open_rows
from datasets.sources import DATASETS, load_arrays
from runtime.terminal import UserError

LARGEST_FLOAT = 20.0  # samples leave [-1, 1] a little; what goes beyond this was meant for 0 to 255
LOSSY = "JPEG or WebP: distances to images that were not compressed so include the compression"


def quantise(images):
    """Return float images in [-1, 1] as uint8, by truncation of 255·clip((x + 1)/2, 0, 1) as in the literature."""
    return (255 * ((images + 1) / 2).clamp(0, 1)).to(torch.uint8)


class ImageSource:
    """Images that are read a batch at a time.

    path: where they are. name: of them, in results. shape: (C, H, W) of each. notes: {conversion, or what else a reader
    must know: number of the images read so far}.
    """

    def __init__(self, path, count):
        self.path, self.name, self.count = pathlib.Path(path), str(path), count
        self.shape, self.notes = None, collections.Counter()
        self.shape = tuple(self._load([0])[0].shape[1:])

    def __len__(self):
        return self.count

    def read(self, places):
        """Return the images at `places`, uint8 tensor (len(places), C, H, W). Raises UserError, naming bad ones."""
        images, notes = self._load(places)
        self.notes.update(notes)
        return torch.from_numpy(images)


class ArrayImages(ImageSource):
    """Images of an array (N, C, H, W), uint8, or floats in [-1, 1], which are quantised; UserError for others."""

    def __init__(self, images, name, spec=None):
        floats = np.issubdtype(images.dtype, np.floating)
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not (len(images) and (floats or images.dtype == "u1")):
            raise UserError(f"{name} holds {images.dtype} of shape {images.shape}; images are (N, C, H, W) with 1 or 3 "
                            "channels, uint8, or floats in [-1, 1]")
        self.images, self.spec = images, spec or ImageSpec(None, images.shape[1])
        super().__init__(name, len(images))
        some = images[some_of(len(images), 64)]
        if floats and some.min() >= 0 and some.max() <= 1:
            print(f"{name}: its values lie in [{some.min():.3g}, {some.max():.3g}], but floats are read as pixels in "
                  "[-1, 1]: bring them there if they were meant for [0, 1]", file=sys.stderr, flush=True)

    def _load(self, places):
        part = np.array(self.images[np.array(places)])
        if part.dtype != np.uint8:
            part = torch.from_numpy(part.astype(np.float32))
            check_finite(part, places, f"{self.name}: sample", "make it again")
            if (most := part.abs().max()) > LARGEST_FLOAT:
                raise UserError(f"{self.name} holds values up to {most:.0f}; images as floats are in [-1, 1]")
            part = quantise(part).numpy()
        return fit_images(part, self.spec)


class FileImages(ImageSource):
    """Image files of one size in a folder or zip."""

    def __init__(self, path, spec):
        self.tree, self.spec = FileTree(path), spec
        super().__init__(path, len(self.tree.names))

    def _load(self, places):
        images, notes = [], collections.Counter()
        for name in (self.tree.names[place] for place in places):
            image, conversions = self.tree.decode(name, self.spec)
            if image.shape != (shape := self.shape or image.shape):
                raise UserError(f"{self.path} holds images of different sizes, {self.tree.names[0]} of {shape}, {name} "
                                f"of {image.shape} (C, H, W): bring them to one")
            images.append(image)
            notes.update(conversions + [LOSSY] * name.lower().endswith((".jpg", ".jpeg", ".webp")))
        return np.stack(images), notes


def open_images(path, config):
    """Return the `ImageSource` of an npy (NCHW in [-1, 1], or uint8), an npz of images, a folder or a zip.

    They get config.data.num_channels, and for the extractor `pixels` config.data.image_size, as in training. Raises
    UserError if there is nothing to read.
    """
    path, data = pathlib.Path(path), config.data
    spec = ImageSpec(data.image_size if config.eval.feature_extractor == "pixels" else None, data.num_channels,
                     DATASETS[data.dataset].resample)
    if path.is_dir() or (path.is_file() and path.suffix == ".zip"):
        return FileImages(path, spec)
    if path.is_file() and path.suffix in (".npy", ".npz"):  # a named pipe would never end
        return ArrayImages(_load_array(path), path, spec)
    raise UserError(f"{path} {'is no npy, npz, folder or zip of images' if path.exists() else 'does not exist'}")


def _load_array(path):
    """Return the array in an npy, or in an npz under `images`, `samples` or `arr_0`; (N, H, W, C) is turned."""
    if path.suffix == ".npz":
        arrays = load_arrays(path)
        names = [name for name in ("images", "samples", "arr_0") if name in arrays]
        if not names:
            raise UserError(f"{path} holds {', '.join(arrays)}, but no array images, samples or arr_0")
        images = arrays[names[0]]
    else:
        images = open_rows(path)
    if images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    return images
