"""Where pairs start: noise, images of a data set or rows of an npy file, each a function of the pair's index alone."""

import dataclasses
import hashlib
import mmap

import numpy as np
import torch

from datasets.batches import one_hot, pixels_to_float
from datasets.npy_rows import NpyRows
from datasets.sources import load_images
from runtime import seeds
from runtime.errors import UserError
from runtime.files import file_digest

FIRST_NOISES = 16  # how many noises the digest covers


class NoiseStarts:
    """z0 drawn from N(0, scale²): the noise of pair i under a seed is the same on every machine."""

    available = None  # as many as anyone wants

    def __init__(self, seed, shape, scale=1.0):
        """Take the seed, the shape (C, H, W) and the standard deviation."""
        self.seed, self.shape, self.scale = seed, shape, scale

    def take(self, indices):
        """Return z0 of the pairs `indices`: float32 `(n, C, H, W)`."""
        noise = seeds.index_noise(self.seed, indices, self.shape)
        return noise if self.scale == 1 else noise.mul_(self.scale)

    def identity(self):
        """Return what tells these starts from others, {name: value}."""
        return {"noise": noise_digest(self.seed, self.shape)}


class FileStarts:
    """Rows of an npy file: pair i starts at row i."""

    def __init__(self, path, shape, flag):
        """Take the file at `path` that `flag` named and the shape (C, H, W) its rows must have, else UserError."""
        self.rows, self.flag, self.digest = NpyRows(path), flag, file_digest(path)
        self.available = len(self.rows)
        if self.rows.shape != tuple(shape) or self.rows.dtype.kind != "f":
            raise UserError(f"{path} holds {self.rows.dtype} rows of shape {self.rows.shape}; the config asks for "
                            f"floating-point rows of shape {tuple(shape)} (channels, height, width)")

    def take(self, indices):
        """Return the rows `indices`, a range, as float32 `(n, C, H, W)`."""
        return torch.from_numpy(self.rows.slice(indices.start, indices.stop).astype(np.float32))

    def identity(self):
        """Return what tells these starts from others, {name: value}."""
        return {self.flag: self.digest}


class ImageStarts:
    """Images of a data set in its own order, from the start again after the last: pair i has image i mod N.

    With flips, image k is mirrored with probability 1/2, and the next time round the other way: no two of the
    first 2N pairs start alike.
    """

    def __init__(self, image_set, seed, random_flip, repeats):
        """Take an `ImageSet`; `repeats`: pairs may go round the images for ever, as with fresh noise they may."""
        self.images, self.labels, self.source = image_set.images, image_set.labels, image_set.source
        self.seed, self.random_flip = seed, random_flip
        self.available = None if repeats else len(self.images) * (2 if random_flip else 1)

    def take(self, indices):
        """Return z1 of the pairs `indices`, a range: float32 `(n, C, H, W)` in [-1, 1]."""
        rounds, numbers = np.divmod(np.arange(indices.start, indices.stop), len(self.images))
        images = pixels_to_float(torch.from_numpy(self.images[numbers]))
        forget_pages(self.images)
        if not self.random_flip:
            return images
        draws = [seeds.index_generator(self.seed, int(k), seeds.FLIP).random() < 0.5 for k in numbers]
        flipped = torch.from_numpy(np.array(draws) ^ (rounds % 2 == 1))
        return torch.where(flipped[:, None, None, None], images.flip(-1), images)

    def classes(self, indices):
        """Return the class numbers of the pairs `indices`, int64 `(n,)`."""
        return torch.from_numpy(self.labels[np.arange(indices.start, indices.stop) % len(self.images)])

    def identity(self):
        """Return what tells these starts from others, {name: value}."""
        return {"images": images_digest(self.images, self.labels), "sampling.random_flip": self.random_flip}


class FileLabels:
    """Rows of an npy file, class numbers `(N,)` or one-hot `(N, num_classes)`: pair i has row i."""

    def __init__(self, path, num_classes):
        """Take the file at `path` and the number of classes; UserError if they do not fit."""
        self.rows, self.num_classes, self.digest = NpyRows(path), num_classes, file_digest(path)
        self.available = len(self.rows)
        numbers = self.rows.shape == () and self.rows.dtype.kind in "iu"
        if not numbers and self.rows.shape != (num_classes,):
            raise UserError(f"{path} holds {self.rows.dtype} labels of shape {self.rows.shape}; class numbers (N,) or "
                            f"one-hot rows (N, {num_classes}) are needed")
        if numbers:
            require_classes(self.rows.slice(0, len(self.rows)), num_classes, path)

    def take(self, indices):
        """Return the labels of the pairs `indices`, a range, one-hot float32 `(n, num_classes)`."""
        label = torch.from_numpy(self.rows.slice(indices.start, indices.stop))
        return label.float() if label.ndim == 2 else one_hot(label, self.num_classes)

    def identity(self):
        """Return what tells these labels from others, {name: value}."""
        return {"label_path": self.digest}


class EndlessLabels:
    """Labels for any number of pairs, known from the config and the other starting points."""

    available = None

    def identity(self):
        """Return nothing that is not told elsewhere."""
        return {}


class DrawnLabels(EndlessLabels):
    """Classes drawn uniformly, the class of pair i under a seed always the same."""

    def __init__(self, seed, num_classes):
        self.seed, self.num_classes = seed, num_classes

    def take(self, indices):
        """Return the labels of the pairs `indices`, one-hot float32 `(n, num_classes)`."""
        return one_hot(seeds.index_labels(self.seed, indices, self.num_classes), self.num_classes)


class FixedLabel(EndlessLabels):
    """The same class for every pair."""

    def __init__(self, class_label, num_classes):
        self.class_label, self.num_classes = class_label, num_classes

    def take(self, indices):
        """Return the labels of the pairs `indices`, one-hot float32 `(n, num_classes)`."""
        return one_hot(torch.full((len(indices),), self.class_label), self.num_classes)


class ImageLabels(EndlessLabels):
    """The classes of the images that pairs start at."""

    def __init__(self, starts, num_classes):
        self.starts, self.num_classes = starts, num_classes

    def take(self, indices):
        """Return the labels of the pairs `indices`, one-hot float32 `(n, num_classes)`."""
        return one_hot(self.starts.classes(indices), self.num_classes)


def noise_digest(seed, shape):
    """Return the digest of the first noises of `seed`: another numpy that draws others would show here."""
    noise = seeds.index_noise(seed, range(FIRST_NOISES), shape).numpy()
    return hashlib.sha256(noise.astype("<f4").tobytes()).hexdigest()[:16]


def images_digest(images, labels):
    """Return a digest of a data set: its shape, 512 images all over it and all its labels."""
    digest = hashlib.sha256(repr(images.shape).encode())
    some = images[np.unique(np.linspace(0, len(images) - 1, 512).round().astype(np.int64))]
    for part in (some, np.empty(0) if labels is None else labels):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]


def forget_pages(array):
    """Give the pages that a memory map has read back to the kernel: they would count as this process's memory."""
    while array is not None and not isinstance(array, mmap.mmap):
        array = getattr(array, "base", None)
    if array is not None:
        array.madvise(mmap.MADV_DONTNEED)


def require_classes(labels, num_classes, source):
    """Raise UserError if `labels` (numbers) of `source` are not all in [0, num_classes)."""
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        raise UserError(f"{source} has classes {labels.min()} to {labels.max()}, but config.data.num_classes is "
                        f"{num_classes}")


@dataclasses.dataclass(frozen=True)
class Starts:
    """The starting points of pairs by number; a part that the direction does not use is None."""

    noise: NoiseStarts | FileStarts | None
    images: ImageStarts | FileStarts | None
    labels: FileLabels | DrawnLabels | FixedLabel | ImageLabels | None

    def z0(self, indices):
        """Return the noise of the pairs `indices`, a range: float32 `(n, C, H, W)`."""
        return self.noise.take(indices)

    def z1(self, indices):
        """Return the images of the pairs `indices`, a range: float32 `(n, C, H, W)`."""
        return self.images.take(indices)

    def label(self, indices):
        """Return the labels of the pairs `indices`, one-hot float32 `(n, num_classes)`, or None without classes."""
        return self.labels.take(indices) if self.labels else None

    @property
    def available(self):
        """The largest number of pairs, None if there is no limit."""
        limits = [part.available for part in self._parts() if part.available is not None]
        return min(limits, default=None)

    def identity(self):
        """Return what tells these starts from others, {name: value}."""
        return {name: value for part in self._parts() for name, value in part.identity().items()}

    def _parts(self):
        return [part for part in (self.noise, self.images, self.labels) if part is not None]


def create_starts(config, z0_path="", z1_path="", label_path=""):
    """Return the `Starts` of `config.sampling.direction`: drawn noise and data-set images, or rows of npy files.

    Raises UserError for files and classes that do not fit the config.
    """
    direction, shape = config.sampling.direction, image_shape(config)
    check_class(config)
    noise = images = None
    if direction != "from_z1":
        noise = FileStarts(z0_path, shape, "z0_path") if z0_path else NoiseStarts(
            config.seed, shape, config.sampling.init_noise_scale if direction != "gt_v_from_z1" else 1.0)
    if direction in ("from_z1", "gt_v_from_z1", "random_paired"):
        images = FileStarts(z1_path, shape, "z1_path") if z1_path else ImageStarts(
            chosen_images(config), config.seed, config.sampling.random_flip, repeats=direction != "from_z1")
    return Starts(noise, images, _create_labels(config, images, label_path))


def image_shape(config):
    """Return the shape (C, H, W) of the config's images."""
    return config.data.num_channels, config.data.image_size, config.data.image_size


def check_class(config):
    """Raise UserError if `sampling.class_label` is no class, or if the closed form is asked for drawn classes."""
    chosen, classes = config.sampling.class_label, config.data.num_classes
    if chosen >= 0 and chosen >= classes:
        raise UserError(f"config.sampling.class_label is {chosen}, but config.data.num_classes is {classes}")
    if config.sampling.direction == "gt_v_from_z0" and classes and chosen < 0:
        raise UserError("the closed-form velocity of all images knows no classes: choose one with "
                        "config.sampling.class_label, or set config.data.num_classes 0")


def chosen_images(config):
    """Return the `ImageSet` of the config, and only the class `sampling.class_label` if one is set."""
    check_class(config)
    image_set = load_images(config)
    if config.sampling.class_label < 0:
        return image_set
    chosen = np.flatnonzero(image_set.labels == config.sampling.class_label)
    if not len(chosen):
        raise UserError(f"config.sampling.class_label {config.sampling.class_label}: {image_set.source} has no image "
                        "of this class")
    return dataclasses.replace(image_set, images=image_set.images[chosen], labels=image_set.labels[chosen])


def _create_labels(config, images, label_path):
    """Return what gives the pairs' labels, None without classes."""
    chosen, classes = config.sampling.class_label, config.data.num_classes
    if not classes:
        return None
    if label_path:
        return FileLabels(label_path, classes)
    if chosen >= 0:
        return FixedLabel(chosen, classes)
    if images is None:
        return DrawnLabels(config.seed, classes)
    if isinstance(images, ImageStarts):
        return ImageLabels(images, classes)
    raise UserError("--z1_path holds images without their classes: give --label_path, or choose one class with "
                    "config.sampling.class_label")
