"""Image data sets in their one in-memory form: a uint8 array `(N, C, H, W)`, class numbers and class names."""

import dataclasses

import numpy as np

from datasets import digits
from runtime import seeds
from runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Decoded images.

    images: uint8 `(N, C, H, W)`, memory-mapped where they come from the cache. labels: int64 `(N,)` or None.
    class_names: names of classes 0, 1, …, or None. source: where they come from, for messages and reports.
    """

    images: np.ndarray
    labels: np.ndarray | None
    class_names: tuple | None
    source: str

    def __len__(self):
        """Return the number of images."""
        return len(self.images)


def load_images(config):
    """Return the `ImageSet` of `config.data`.

    Raises `UserError` for a missing or unusable source, naming it and what belongs there.
    """
    images, labels, class_names = digits.read()
    return ImageSet(images, labels, class_names, "scikit-learn's digits")


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
