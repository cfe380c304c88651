"""Image data sets in their one in-memory form: a uint8 array `(N, C, H, W)`, class numbers and class names."""

import dataclasses
import pathlib

import numpy as np

from datasets import cifar10, digits, folders, idx, imagenet64
from datasets.cache import open_cached
from datasets.source import Form
from runtime import seeds
from runtime.errors import UserError

OPENERS = {
    "CIFAR10": cifar10.open_source,
    "FFHQ64": folders.open_ffhq,
    "ImageNet64": imagenet64.open_source,
    "MNIST": idx.open_mnist,
    "FashionMNIST": idx.open_fashion_mnist,
    "custom": folders.open_custom,
}


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Decoded images.

    images: uint8 `(N, C, H, W)`, memory-mapped where they come from the cache. labels: int64 `(N,)` or None.
    class_names: names of classes 0, 1, …, or None. source: where they come from, for messages and reports.
    notes: how many images were converted how. cache: folder of the cache entry, or None. skipped: corrupt images.
    """

    images: np.ndarray
    labels: np.ndarray | None
    class_names: tuple | None
    source: str
    notes: dict = dataclasses.field(default_factory=dict)
    cache: str | None = None
    skipped: tuple = ()

    def __len__(self):
        """Return the number of images."""
        return len(self.images)


def load_images(config):
    """Return the `ImageSet` of `config.data`: from the cache, where it is decoded to on first use.

    Raises `UserError` for a missing or unusable source, naming it and what belongs there, and for labels that do
    not fit `data.num_classes`.
    """
    data = config.data
    if data.num_channels not in (1, 3):
        raise UserError(f"data.num_channels {data.num_channels}: images have 1 (grey) or 3 (colour) channels")
    form = Form(data.image_size, data.num_channels, "area" if data.dataset == "ImageNet64" else "lanczos")
    if data.dataset == "digits":
        image_set = _load_digits(form)
    else:
        source = OPENERS[data.dataset](data_root(config), form, data.skip_corrupt)
        image_set = _load_cached(source, data.cache_dir, config.training.progress, data.skip_corrupt)
    if data.num_classes:
        _check_classes(image_set, data.num_classes)
    return image_set


def data_root(config):
    """Return the path of the data set's files: data.data_root, by its older name, or data/{dataset}."""
    data = config.data
    return pathlib.Path(data.data_root or data.custom_data_root or f"data/{data.dataset}").expanduser()


def _load_digits(form):
    block, class_names = digits.read(form)
    return ImageSet(block.images, block.labels, class_names, "digits of scikit-learn", dict(block.notes))


def _load_cached(source, cache_dir, progress, skip_corrupt):
    images, labels, about = open_cached(source, cache_dir, progress)
    skipped = about["skipped"]
    if skipped and not skip_corrupt:
        raise UserError(f"{source.title} was cached without {len(skipped)} corrupt images, the first {skipped[0]}: "
                        "repair them, or go on without them with --config.data.skip_corrupt true")
    class_names = about["class_names"] and tuple(about["class_names"])
    return ImageSet(images, labels, class_names, source.title, about["notes"], about["folder"], tuple(skipped))


def _check_classes(image_set, num_classes):
    """Raise `UserError` unless every image has a label below `num_classes`."""
    if image_set.labels is None:
        raise UserError(f"data.num_classes {num_classes}: {image_set.source} has no labels; set data.num_classes 0, or "
                        "give labels by sub-folders or dataset.json")
    highest = int(image_set.labels.max())
    if highest >= num_classes:
        raise UserError(f"data.num_classes {num_classes}: {image_set.source} has labels up to {highest}; set "
                        f"data.num_classes {highest + 1}")


def subset(image_set, name, seed):
    """Return the part of `image_set` that `sampling.train_subset` names.

    name: "all"; "random_N", N images drawn without replacement by `seed`; or a class name of the data set.
    Raises `UserError` for any other name and for N outside 1..len(image_set).
    """
    if name == "all":
        return image_set
    if name.startswith("random_"):
        number = name.removeprefix("random_")
        if not (number.isdecimal() and 1 <= int(number) <= len(image_set)):
            raise UserError(f"sampling.train_subset {name}: the number after random_ must be from 1 to "
                            f"{len(image_set)}, the images of {image_set.source}")
        chosen = seeds.index_generator(seed, 0, seeds.SUBSET).choice(len(image_set), int(number), replace=False)
    else:
        names = image_set.class_names or ()
        if image_set.labels is None or name not in names:
            raise UserError(f"sampling.train_subset {name}: {image_set.source} has no such class; choose all, "
                            f"random_N or one of {_list_names(names)}")
        chosen = np.flatnonzero(image_set.labels == names.index(name))
        if not len(chosen):
            raise UserError(f"sampling.train_subset {name}: {image_set.source} has no image of this class")
    chosen = np.sort(chosen)  # reads a memory map from front to back
    labels = None if image_set.labels is None else image_set.labels[chosen]
    return dataclasses.replace(image_set, images=image_set.images[chosen], labels=labels)


def _list_names(names):
    """Return class names as text, shortened when there are many."""
    if not names:
        return "its classes (it has none)"
    return ", ".join(names[:20]) + (f", … ({len(names)} classes)" if len(names) > 20 else "")
