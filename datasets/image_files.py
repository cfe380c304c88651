"""Image files in folders and zip archives: one lister and one decoder, for training and for measuring."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import stat
import warnings
import zipfile

import numpy as np
from PIL import Image, ImageOps

from runtime.errors import UserError

# What Pillow may open. Others stay shut: an EPS file named x.png would start Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
LABEL_FILE = "dataset.json"
LARGEST_CLASS = 99_999  # a class number beyond it is a mistake
LARGEST_FILE = 2**28  # bytes of one image file, also when unpacked from an archive
LARGE_IMAGE = 2**24  # pixels; larger images are decoded by one thread, or each of many would keep their memory
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX}

GREY_TO_COLOUR = "grey, repeated into three channels"
COLOUR_TO_GREY = "colour, converted to grey (ITU-R 601 luma)"
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
_large_images = concurrent.futures.ThreadPoolExecutor(1, "decode large images")
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice its size is an error


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """What images are brought to: `channels` 1 (grey) or 3 (RGB), square with `size` pixels (None: as they are).

    resample: "lanczos" or "area", the filter where the size changes. skip_corrupt: leave out unreadable files, count
    them, and go on.
    """

    size: int | None
    channels: int
    resample: str = "lanczos"
    skip_corrupt: bool = False


class FileTree:
    """The image files of a folder (recursively, links followed) or a zip archive, by their paths inside it.

    A folder with one archive and nothing else stands for the archive. Hidden files and folders, and what macOS adds,
    are left out. Archives are never unpacked to disk; several threads may read.
    """

    def __init__(self, root):
        """Find the folder or archive `root`. Raises UserError for what is neither, and for a folder of archives."""
        self.root = pathlib.Path(root)
        archives = sorted(self.root.glob("*.zip"))
        if archives and not any(p.is_dir() or p.name.lower().endswith(SUFFIXES) for p in self.root.iterdir()):
            if len(archives) > 1:
                raise UserError(f"{root} holds {len(archives)} zip archives ({', '.join(p.name for p in archives)}): "
                                "name one")
            self.root = archives[0]
        if not self.root.is_dir() and not self.root.is_file():
            raise UserError(f"{root} is neither a folder nor a zip archive of images")

    @functools.cached_property
    def archive(self):
        """The open zip archive, None for a folder."""
        try:
            return None if self.root.is_dir() else zipfile.ZipFile(self.root)
        except Exception as error:  # a damaged archive raises many kinds
            raise UserError(f"{self.root} is no readable zip archive ({error})") from None

    @functools.cached_property
    def files(self):
        """The paths of all files, sorted, with forward slashes. Raises UserError for a folder that cannot be listed."""
        names = self.archive.namelist() if self.archive else _walk(self.root)
        return sorted(name for name in names if not _is_hidden(name))

    @functools.cached_property
    def names(self):
        """The paths of the image files. Raises UserError if there are none."""
        names = [name for name in self.files if name.lower().endswith(SUFFIXES)]
        if not names:
            raise UserError(f"{self.root} holds no images ({', '.join(SUFFIXES)}): put images there or name another "
                            "folder or zip archive")
        return names

    def read(self, name):
        """Return the bytes of a file. Raises UserError if it is no regular file, damaged, encrypted or too large."""
        if self.archive is None:
            return read_file(self.root / name, LARGEST_FILE)
        size = self.archive.getinfo(name).file_size
        if size > LARGEST_FILE:
            raise UserError(f"{self.root}: {name} would unpack to {size} bytes; that is no image")
        try:
            return self.archive.read(name)
        except Exception as error:  # zipfile and the decompressors raise many kinds for damaged and encrypted members
            raise UserError(f"{self.root}: {name} cannot be unpacked: {error}") from None

    def identity(self):
        """Return a digest that changes when an image or label file is written, added or removed."""
        if not self.root.is_dir():  # an archive need not be opened
            return identify([self.root])
        labels = [name for name in self.files if name.endswith(LABEL_FILE)]
        return identify([*self.names, *labels], self.root)


def find_labels(tree):
    """Return the class numbers (list of int) and class names of a `FileTree`'s images, (None, None) without classes.

    Both are looked for below the innermost folder that holds all images, dataset.json also above it.
    """
    folders = [name.split("/")[:-1] for name in tree.names]
    common, files = os.path.commonprefix(folders), set(tree.files)
    for depth in range(len(common) + 1):
        above = "".join(f"{folder}/" for folder in common[:depth])
        if above + LABEL_FILE in files:
            return _labels_from_json(tree, above)
    if common in folders:  # images lie in it directly: it is the one class, unless it is the root
        return ([0] * len(folders), (common[-1],)) if common else (None, None)
    found = [folder[len(common)] for folder in folders]
    class_names = tuple(sorted(set(found)))
    numbers = {name: number for number, name in enumerate(class_names)}
    return [numbers[name] for name in found], class_names


def _labels_from_json(tree, above):
    """Return what `find_labels` does, from dataset.json in the folder `above` ("" or "x/"), which names lie below.

    Its form is `{"labels": [["00000/img00000000.png", 6], …]}`, or `"labels": null` for none. Raises `UserError` for
    another form, and for an image with no label or two.
    """
    place, labels = f"{tree.root}: {above}{LABEL_FILE}", {}
    try:
        for name, label in json.loads(tree.read(above + LABEL_FILE))["labels"] or ():
            if labels.setdefault(name, label) != label:
                raise UserError(f"{place} gives {name} the labels {labels[name]} and {label}: remove one")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f'{place} is not of the form {{"labels": [["name", class], …]}} ({error})') from None
    if not labels:
        return None, None
    names = [name.removeprefix(above) for name in tree.names]
    for name in names:
        label = labels.get(name)
        if name not in labels:
            raise UserError(f"{place} has no label for {name}: add it, or remove {LABEL_FILE} to go without labels")
        if type(label) is not int or not 0 <= label <= LARGEST_CLASS:
            raise UserError(f"{place} gives {name} the label {label!r}: a label is a class number from 0 to "
                            f"{LARGEST_CLASS}")
    found = [labels[name] for name in names]
    return found, tuple(map(str, range(max(found) + 1)))


def identify(names, root="."):
    """Return a digest of the paths (from `root`), sizes and times of files, not of their content.

    Both times count, of the content and of the last change on disk, so that a file written anew with its old time and
    size is another one.
    """
    digest = hashlib.sha256(os.fsencode(os.path.realpath(root)))
    for name in names:
        digest.update(os.fsencode(name))
        with contextlib.suppress(OSError):  # a dead link: reading it will name it
            status = os.stat(os.path.join(root, name))
            digest.update(f"\0{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\0".encode())
    return digest.hexdigest()


def read_file(path, largest=None):
    """Return a file's bytes. Raises UserError, naming it, for what cannot be read, is no regular file or too large."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is no regular file")  # a pipe would block, a device never end
        if largest is not None and status.st_size > largest:
            raise UserError(f"{path} has {status.st_size} bytes; that is no image")
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def decode_image(data, spec):
    """Return the pixels of an encoded image, uint8 `(C, H, W)`, and a list of notes on what was converted.

    The image is turned upright (EXIF), laid on white where it is transparent, reduced to 8 bits and brought to `spec`;
    of several frames the first counts. Raises UserError for bytes that are no image of `FORMATS`, for damaged
    ones and for decompression bombs (more than twice Pillow's limit of 89 million pixels).
    """
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
        if opened.width * opened.height <= LARGE_IMAGE:
            return _decode(opened, spec)
        return _large_images.submit(_decode, opened, spec).result()
    except Exception as error:  # Pillow's plugins raise many kinds for damaged files
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError("not an image" if text.startswith("cannot identify") else text) from None


def _decode(opened, spec):
    with opened:
        ImageOps.exif_transpose(opened, in_place=True)  # a copy of a large image is hundreds of megabytes
        return _fit_image(opened, spec)


def fit_images(images, spec):
    """Return uint8 images `(N, C, H, W)`, C 1 or 3, brought to `spec`, and a Counter of notes on conversions."""
    notes = collections.Counter()
    if spec.channels == images.shape[1] and (spec.size is None or images.shape[2:] == (spec.size, spec.size)):
        return np.ascontiguousarray(images), notes
    fitted = []
    for image in images:
        image = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
        pixels, conversions = _fit_image(image, spec)
        fitted.append(pixels)
        notes.update(conversions)
    return np.stack(fitted), notes


def _fit_image(image, spec):
    """Return the pixels of a Pillow image brought to `spec`, uint8 `(C, H, W)`, and a list of notes."""
    image, notes = _to_channels(image, spec.channels)
    if spec.size is not None and image.width != image.height:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        notes.append("cropped to the central square")
    if spec.size is not None and image.width != spec.size:
        notes.append(f"resampled to {spec.size}×{spec.size} with the {spec.resample} filter")
        image = image.resize((spec.size, spec.size), FILTERS[spec.resample])
    pixels = np.asarray(image)
    return (pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)), notes


def _to_channels(image, channels):
    """Return the image in mode L (one channel) or RGB (three), 8 bits and opaque, and notes."""
    notes = []
    grey = image.mode in _GREY_MODES
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UserError("its pixels have more than 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # round(v / 257); Pillow would clip
        notes.append("16-bit grey, divided by 257")
    elif image.mode == "F":
        raise UserError("its pixels are floating-point numbers of unknown range")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        if rgba.getchannel("A").getextrema()[0] < 255:
            notes.append("transparent, laid on white")
    if image.mode != "RGB" and (channels == 3 or not grey):  # CMYK has no direct way to grey
        image = image.convert("RGB")
    if channels == 3:
        return image, notes + [GREY_TO_COLOUR] * grey
    return image.convert("L"), notes + [COLOUR_TO_GREY] * (not grey)


def _walk(root):
    """Yield the paths of the files under `root`, from it, with forward slashes; each folder once, links or not."""
    visited = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_refuse):
        subfolders[:] = [name for name in subfolders if not _is_hidden(name)]
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        inner = os.path.relpath(folder, root).replace(os.sep, "/")
        yield from files if inner == "." else (f"{inner}/{name}" for name in files)


def _refuse(error):
    """Stop at a folder that cannot be listed: without it the classes after it would get other numbers."""
    raise UserError(f"{error.filename} cannot be listed: {error.strerror}")


def _is_hidden(name):
    """Return whether a path is hidden, or what macOS adds to archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
