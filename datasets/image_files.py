"""Image files in folders and zip archives: listing and decoding, for training and for evaluation."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import stat
import warnings
import zipfile

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime.files import is_hidden, walk_files
from runtime.terminal import UserError

# The formats that Pillow may open; others can be unsafe: an EPS file named x.png would start Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
LABEL_FILE = "dataset.json"
LARGEST_CLASS = 99_999  # a larger class number is taken for a mistake
LARGEST_FILE = 2**28  # bytes of one image file, unpacked
LARGE_IMAGE = 2**24  # pixels; larger images are decoded one at a time, to bound the memory
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX}

GREY_TO_COLOUR = "grey, repeated into three channels"
COLOUR_TO_GREY = "colour, converted to grey (ITU-R 601 luma)"
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
_one_thread = concurrent.futures.ThreadPoolExecutor(1, "large images")
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow refuses images of twice that size


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """What images are converted to: `channels` 1 (grey) or 3 (RGB), `size`×`size` pixels (None: as they are).

    resample: the filter for resizing, "lanczos" or "area". skip_corrupt: skip and count unreadable files.
    """

    size: int | None
    channels: int
    resample: str = "lanczos"
    skip_corrupt: bool = False


class FileTree:
    """The image files of a folder (recursively, links followed) or a zip archive, by their paths inside it.

    A folder that holds an archive and no images is read as that archive. Archives are not unpacked to disk. Hidden
    files, and those that macOS adds, are left out. Several threads may read. Raises UserError for any other `root`.
    """

    def __init__(self, root):
        self.root = pathlib.Path(root)
        archives = sorted(self.root.glob("*.zip"))
        if archives and not any(p.is_dir() or p.name.lower().endswith(SUFFIXES) for p in self.root.iterdir()):
            if len(archives) > 1:
                raise UserError(f"{root}: {len(archives)} archives ({', '.join(p.name for p in archives)}): name one")
            self.root = archives[0]
        if not self.root.is_dir() and not self.root.is_file():
            raise UserError(f"{root} is neither a folder nor a zip archive of images")

    @functools.cached_property
    def archive(self):
        """The open zip archive, None for a folder."""
        try:
            return None if self.root.is_dir() else zipfile.ZipFile(self.root)
        except Exception as error:  # a damaged archive raises many kinds of error
            raise UserError(f"{self.root} is not a readable zip archive ({error})") from None

    @functools.cached_property
    def files(self):
        """The paths of all files, sorted, with forward slashes. Raises UserError for a folder that cannot be listed."""
        names = self.archive.namelist() if self.archive else walk_files(self.root)
        return sorted({name for name in names if not is_hidden(name)})  # an archive may hold a name twice

    @functools.cached_property
    def names(self):
        """The paths of the image files. Raises UserError if there are none."""
        names = [name for name in self.files if name.lower().endswith(SUFFIXES)]
        if not names:
            raise UserError(f"{self.root} holds no images ({', '.join(SUFFIXES)}): name another folder or archive")
        return names

    def read(self, name):
        """Return the bytes of a file; raise one of many kinds of error if it is damaged or not a regular file."""
        if not self.archive:
            return read_file(self.root / name, LARGEST_FILE)
        if (size := self.archive.getinfo(name).file_size) > LARGEST_FILE:
            raise UserError(f"{size} bytes are too many")
        return self.archive.read(name)

    def decode(self, name, spec):
        """Return an image file as `fit_image` does. Raises UserError, naming it, if it is corrupt."""
        try:
            image = Image.open(io.BytesIO(self.read(name)), formats=FORMATS)
            if image.width * image.height > LARGE_IMAGE:
                return _one_thread.submit(fit_image, image, spec).result()
            return fit_image(image, spec)
        except Exception as error:  # zipfile, its decompressors and Pillow's plugins raise many kinds of error
            text = (str(error).splitlines() or [type(error).__name__])[0]
            text = "not an image" if isinstance(error, UnidentifiedImageError) else text
            raise UserError(f"corrupt image {name} in {self.root} ({text})") from None

    def identity(self):
        """Return a digest that changes when an image or label file is written, added or removed."""
        if not self.root.is_dir():  # an archive need not be opened
            return identify([self.root])
        return identify([name for name in self.files if name.lower().endswith((*SUFFIXES, LABEL_FILE))], self.root)


def find_labels(tree):
    """Return the class numbers (list of int) and class names of a `FileTree`'s images, (None, None) without classes.

    dataset.json may be in any common folder of the images; without it the sub-folders of the innermost are the classes.
    """
    folders = [name.split("/")[:-1] for name in tree.names]
    common = os.path.commonprefix(folders)
    for depth in range(len(common) + 1):
        above = "".join(f"{folder}/" for folder in common[:depth])
        if above + LABEL_FILE in tree.files:
            return _labels_from_json(tree, above)
    if common in folders:  # images lie in it directly: it is the only class, unless it is the root
        return ([0] * len(folders), (common[-1],)) if common else (None, None)
    class_names, numbers = np.unique([folder[len(common)] for folder in folders], return_inverse=True)
    return numbers.tolist(), tuple(class_names.tolist())


def _labels_from_json(tree, above):
    """Return what `find_labels` does, from dataset.json in the folder `above` ("" or "x/")."""
    place = f"{tree.root}: {above}{LABEL_FILE}"
    try:
        pairs = [(name, label) for name, label in json.loads(tree.read(above + LABEL_FILE))["labels"] or ()]
        labels = dict(pairs)
    except Exception as error:  # a damaged archive, no JSON, or JSON of another form
        raise UserError(f'{place} is not of the form {{"labels": [["name", class], …]}} ({error})') from None
    if not labels:
        return None, None
    for name, label in pairs:
        if labels[name] != label:
            raise UserError(f"{place} gives {name} the labels {label} and {labels[name]}: remove one of them")
    found = [labels.get(name.removeprefix(above)) for name in tree.names]
    for name, label in zip(tree.names, found, strict=True):
        if type(label) is not int or not 0 <= label <= LARGEST_CLASS:
            raise UserError(f"{place} gives {name} the label {label!r}: give it a class number from 0 to "
                            f"{LARGEST_CLASS}, or remove {LABEL_FILE} to do without labels")
    return found, tuple(map(str, range(max(found) + 1)))


def identify(names, root="."):
    """Return a digest of the paths (from `root`), sizes and times (of content and metadata) of files."""
    digest = hashlib.sha256(os.fsencode(os.path.realpath(root)))
    for name in names:
        digest.update(os.fsencode(name))
        with contextlib.suppress(OSError):  # a broken link: the error when it is read names it
            status = os.stat(os.path.join(root, name))
            digest.update(f"\0{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\0".encode())
    return digest.hexdigest()


def read_file(path, largest=math.inf):
    """Return a file's bytes. Raises UserError if it cannot be read, is not a regular file or has too many bytes."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a regular file")  # reading a pipe may block, a device may never end
        if status.st_size > largest:
            raise UserError(f"{status.st_size} bytes are too many")
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def fit_image(image, spec):
    """Return the pixels of a Pillow image converted to `spec`, uint8 `(C, H, W)`, and a list of notes on conversions.

    The image is rotated upright (EXIF), composited on white where it is transparent, and reduced to 8 bits; only the
    first frame is used. Raises any kind of error for a damaged file or a decompression bomb (over 179 million pixels).
    """
    ImageOps.exif_transpose(image, in_place=True)  # a copy of a large image is hundreds of megabytes
    image, notes = _to_channels(image, spec.channels)
    if spec.size is not None:
        side = min(image.size)
        if image.width != image.height:
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
            notes.append("cropped to the central square")
        if side != spec.size:
            image = image.resize((spec.size, spec.size), FILTERS[spec.resample])
            notes.append(f"resampled to {spec.size}×{spec.size} with the {spec.resample} filter")
    pixels = np.asarray(image)
    return (pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)), notes


def fit_images(images, spec):
    """Return uint8 images `(N, C, H, W)`, C 1 or 3, converted to `spec`, and a Counter of notes on conversions."""
    if spec.channels == images.shape[1] and (spec.size is None or images.shape[2:] == (spec.size, spec.size)):
        return np.ascontiguousarray(images), collections.Counter()
    images = (image[0] if len(image) == 1 else image.transpose(1, 2, 0) for image in images)
    fitted, notes = zip(*(fit_image(Image.fromarray(image), spec) for image in images), strict=True)
    return np.stack(fitted), collections.Counter(itertools.chain(*notes))


def _to_channels(image, channels):
    """Return the image in mode L (one channel) or RGB (three), 8 bits and opaque, and a list of notes."""
    grey, notes = image.mode in _GREY_MODES, []
    if image.mode == "F":
        raise UserError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UserError("its pixels have more than 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # round(v / 257); Pillow would clip
        notes.append("16-bit grey, divided by 257")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        if rgba.getchannel("A").getextrema()[0] < 255:
            notes.append("transparent, composited on white")
    image = image.convert("RGB")  # also for grey: Pillow does not convert CMYK to it directly
    if channels == 3:
        return image, notes + [GREY_TO_COLOUR] * grey
    return image.convert("L"), notes + [COLOUR_TO_GREY] * (not grey)
