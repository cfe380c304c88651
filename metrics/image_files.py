"""Images in files, to be measured: npy, npz, a folder or a zip."""

import dataclasses
import io
import os
import pathlib
import zipfile
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from metrics.features import check_finite, quantise
from runtime.errors import UserError

EXTENSIONS = {".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
LARGEST_FLOAT = 20.0  # samples leave [-1, 1] a little; what goes beyond this was meant for 0 to 255


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Images that are read a batch at a time: read(low, high) → uint8 tensor (high - low, C, H, W)."""

    path: pathlib.Path
    name: str
    count: int
    shape: tuple
    read: Callable

    def __len__(self):
        return self.count


def array_source(images, name):
    """Return the source of an array (N, C, H, W): uint8 as it is, floats in [-1, 1] quantised by truncation.

    Raises UserError for another shape or type, and, on reading, for NaN (naming the sample).
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(f"{name} has shape {tuple(images.shape)}; images are (N, C, H, W) with 1 or 3 channels")
    if len(images) == 0:
        raise UserError(f"{name} holds no images")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"{name} holds {images.dtype}; images are uint8, or floats in [-1, 1]")

    def read(low, high):
        part = torch.from_numpy(np.array(images[low:high]))
        if part.dtype == torch.uint8:
            return part
        check_finite(part, range(low, high), name, "make it again")
        if part.abs().max() > LARGEST_FLOAT:
            raise UserError(f"{name} holds values up to {part.abs().max():.0f}; images as floats are in [-1, 1]")
        return quantise(part.float())

    return ImageSource(pathlib.Path(name), str(name), len(images), tuple(images.shape[1:]), read)


def open_images(path, num_channels=3):
    """Return the `ImageSource` of an npy (NCHW in [-1, 1], or uint8), an npz of images, a folder or a zip.

    `num_channels` 1 reads files as grey, 3 as RGB. Raises UserError if there is nothing to read, or images
    differ in size.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return _folder_source(path, num_channels)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.suffix == ".npy":
        return array_source(_load(path, mmap_mode="r"), path)
    if path.suffix == ".npz":
        return _npz_source(path)
    if path.suffix == ".zip":
        return _zip_source(path, num_channels)
    raise UserError(f"{path} is not an npy, npz, folder or zip of images")


def _load(path, **options):
    try:
        return np.load(path, allow_pickle=False, **options)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _npz_source(path):
    """Images of an npz under `images` or `arr_0`; uint8 in the order NHWC, as others' samplers write them, too."""
    with _load(path) as arrays:
        name = next((name for name in ("images", "samples", "arr_0") if name in arrays.files), None)
        if name is None:
            raise UserError(f"{path} holds {', '.join(arrays.files)}, but no array images, samples or arr_0")
        images = arrays[name]
    if images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    return array_source(images, path)


def _folder_source(path, num_channels):
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))
    return _file_source(path, [str(p.relative_to(path)) for p in files], lambda name: path / name, num_channels)


def _zip_source(path, num_channels):
    try:
        archive = zipfile.ZipFile(path)  # opened once: reading its list of files for every image would take for ever
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    names = sorted(n for n in archive.namelist() if os.path.splitext(n)[1].lower() in EXTENSIONS)
    return _file_source(path, names, lambda name: io.BytesIO(archive.read(name)), num_channels)


def _file_source(path, names, content, num_channels):
    """Return the source of image files; `content(name)` is a path or an open file."""
    if not names:
        raise UserError(f"{path} holds no images ({', '.join(sorted(EXTENSIONS))})")
    mode = "L" if num_channels == 1 else "RGB"

    def decode(name):
        try:
            with Image.open(content(name)) as opened:
                return np.asarray(opened.convert(mode)).reshape(opened.height, opened.width, -1).transpose(2, 0, 1)
        except (UnidentifiedImageError, OSError, SyntaxError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: {name} is not a readable image ({error})") from None

    shape = decode(names[0]).shape

    def read(low, high):
        images = [decode(name) for name in names[low:high]]
        for name, image in zip(names[low:high], images, strict=True):
            if image.shape != shape:
                raise UserError(f"{path} holds images of different sizes: {names[0]} is {shape[1]}×{shape[2]}, "
                                f"{name} is {image.shape[1]}×{image.shape[2]}; bring them to one size")
        return torch.from_numpy(np.stack(images))

    return ImageSource(path, str(path), len(names), shape, read)
