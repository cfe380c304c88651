"""Batches on the device: samples looked up by (update, place), flipped and converted to [-1, 1] there."""

import concurrent.futures
import dataclasses
import functools

import numpy as np
import torch

from runtime import seeds
from runtime.errors import UserError

RESIDENT_SHARE = 0.25  # of the free memory of a GPU, which the network needs, too
COPIED_AT_ONCE = 4096  # samples, when all go to the device
UPSIDE_DOWN = 0.06  # share of images turned upside down with data.use_aug, as in the released code


@dataclasses.dataclass(frozen=True)
class Batch:
    """The samples of one update, or one process's or accumulation step's slice of them.

    z1: images `(N, C, H, W)`, float32 in [-1, 1]. z0: the noise of stored pairs, same shape; None for images.
    label: one-hot float32 `(N, num_classes)`, or None without classes.
    """

    z0: torch.Tensor | None
    z1: torch.Tensor
    label: torch.Tensor | None = None


def one_hot(labels, num_classes):
    """Return class numbers `(N,)`, integers in [0, num_classes), as one-hot float32 `(N, num_classes)`.

    A number outside the range is an all-zero row: ranges are checked where labels are read, once, so that
    nothing here waits for the device.
    """
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()


def check_labels(labels, place, num_classes=None, first=0):
    """Raise UserError, naming `place`, unless an array `(N,)` or `(N, num_classes)` holds class numbers or is one-hot.

    num_classes: how many there are (None: any number), numbered from `first` on.
    """
    last, right = (np.inf if num_classes is None else first + num_classes - 1), np.zeros(len(labels), bool)
    if labels.ndim == 1 and labels.dtype.kind in "iuf":
        right = (labels % 1 == 0) & (labels >= first) & (labels <= last)
    elif labels.ndim == 2 and num_classes in (None, labels.shape[1]):
        right = np.isin(labels, (0, 1)).all(1) & (labels.sum(1) == 1)
    if not right.all():
        raise UserError(f"{place} has {labels.dtype} labels of shape {labels.shape}, the first wrong one "
                        f"{labels[~right][0]}; classes are numbers (N,) from {first} to {last} or one-hot (N, classes)")


def pixels_to_float(pixels, dtype=torch.float32):
    """Return uint8 pixels as floats in [-1, 1]: `v / 127.5 - 1`."""
    return pixels.to(dtype).div_(127.5).sub_(1.0)


class EndlessOrder:
    """Indices 0..count-1 for ever: epoch e is a permutation drawn from (seed, e), batches run across its end.

    The place of a sample in the whole sequence is `update * batch_size + place`, so any update of any run can
    be looked up directly, and processes that take disjoint places get disjoint samples.
    """

    def __init__(self, count, batch_size, seed):
        """Take the number of samples, the global batch size and the seed."""
        self.count, self.batch_size, self.seed = count, batch_size, seed

    def indices(self, update, low, high):
        """Return the samples at places [low, high) of the batch of `update`: int64 array `(high - low,)`.

        The cost does not depend on `update`: at most the permutations of the epochs it touches are drawn.
        """
        first = update * self.batch_size
        epochs, places = np.divmod(np.arange(first + low, first + high), self.count)
        indices = np.empty(len(places), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = _permutation(self.count, self.seed, int(epoch))[places[here]]
        return indices


@functools.lru_cache(maxsize=4)  # the epoch in use and the next, of two data sets
def _permutation(count, seed, epoch):
    """Return epoch's permutation of 0..count-1, int64 `(count,)`.

    Sorting raw Philox words: numpy promises that these stay the same in later versions, which it does not
    promise of `permutation`, and a run must resume after an upgrade.
    """
    words = seeds.index_generator(seed, epoch, seeds.ORDER).bit_generator.random_raw(count)
    return np.argsort(words, kind="stable")


class Flips:
    """Random flips of the samples of each batch: a pure function of (seed, update, place)."""

    def __init__(self, seed, batch_size, mirror=False, use_aug=False):
        """Take the seed and the global batch size.

        mirror: flip left-right with probability 1/2. use_aug: that, and upside down with probability 0.06.
        """
        self.seed, self.batch_size = seed, batch_size
        self.kinds = [(seeds.FLIP, 0.5, -1)] if mirror or use_aug else []  # stream, probability, axis
        self.kinds += [(seeds.AUGMENT, UPSIDE_DOWN, -2)] if use_aug else []

    def __call__(self, update, low, high, *images):
        """Return each of `images`, the samples `(high - low, C, H, W)` at places [low, high), flipped alike."""
        for stream, probability, axis in self.kinds:
            device = images[0].device
            generator = seeds.step_generator(self.seed, update, stream, device)
            draws = torch.rand(self.batch_size, 1, 1, 1, generator=generator, device=device)[low:high]
            images = [torch.where(draws < probability, each.flip(axis), each) for each in images]
        return images


class ReadAhead:
    """`read(update, low, high)`, called by a thread one update before it is asked for."""

    def __init__(self, read, device):
        self.read = read
        # The thread must choose its GPU, or pinning memory would open a context on the first one in every process.
        choose = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self.thread = concurrent.futures.ThreadPoolExecutor(1, "read ahead", *choose)
        self.waiting = {}  # (update, low, high) -> future

    def __call__(self, update, low, high):
        """Return `read(update, low, high)` and start on the same places of the next update.

        The parts of one update (accumulation steps) are asked for in turn, so what is not fetched yet of this update
        is kept, and what belongs to others is dropped.
        """
        future = self.waiting.pop((update, low, high), None)
        found = future.result() if future else self.read(update, low, high)
        self.waiting = {key: f for key, f in self.waiting.items() if key[0] in (update, update + 1)}
        self.waiting[update + 1, low, high] = self.thread.submit(self.read, update + 1, low, high)
        return found


class Batches:
    """The batches of a set of samples.

    `batch(update, low, high)` holds the samples at places [low, high) of the global batch of `update`. It is a
    pure function of (seed, update, place): neither the number of processes nor the updates before it matter.
    """

    def __init__(self, samples, order, flips, device, on_device="auto", num_classes=0):
        """Take the samples, their order (`count` and `indices`, as of `EndlessOrder`), `Flips` and the device.

        samples: an `ImageSet`, or another with `shape`, `nbytes` and `take(indices)`. on_device: the config field
        `data.on_device`; what does not stay on a GPU is read one update ahead. num_classes: width of the one-hot
        labels, 0 for none. Raises UserError for samples that shall stay on the device and do not fit.
        """
        self.samples, self.order, self.flips, self.num_classes = samples, order, flips, num_classes
        self.device, self.resident = torch.device(device), None
        ahead = on_device == "false" or self.device.type == "cuda"
        self.read = ReadAhead(self._read, self.device) if ahead else self._read
        if on_device == "true" or (on_device == "auto" and ahead and fits(samples.nbytes, self.device)):
            try:
                self.resident = copy_to_device(samples, self.device)
            except torch.OutOfMemoryError:
                raise UserError(f"data.on_device {on_device}: {samples.nbytes / 2**20:.0f} MiB do not fit: read them "
                                "from disk with data.on_device false") from None

    def __len__(self):
        """Return the number of samples, real pairs that are mixed in not counted."""
        return self.order.count

    @property
    def shape(self):
        """Shape (C, H, W) of an image."""
        return self.samples.shape

    def batch(self, update, low, high):
        """Return the `Batch` of places [low, high) of `update`, on the device."""
        if self.resident:
            places = self._pin(torch.from_numpy(self.order.indices(update, low, high)))
            places = places.to(self.device, non_blocking=True)
            found = {name: rows[places] for name, rows in self.resident.items()}
        else:
            found = self.read(update, low, high)
            found = {name: rows.to(self.device, non_blocking=True) for name, rows in found.items()}
        label = found.pop("label", None)
        if label is not None and label.ndim == 1:
            label = one_hot(label, self.num_classes) if self.num_classes else None
        images = dict(zip(found, self.flips(update, low, high, *found.values()), strict=True))
        z1 = images["z1"]
        return Batch(images.get("z0"), pixels_to_float(z1) if z1.dtype == torch.uint8 else z1, label)

    def _read(self, update, low, high):
        """Return the samples of these places in host memory, pinned when a GPU will fetch them."""
        taken = self.samples.take(self.order.indices(update, low, high))
        return {name: self._pin(rows) for name, rows in taken.items()}

    def _pin(self, tensor):
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


def fits(size, device):
    """Return whether `size` bytes may stay on a GPU beside the network."""
    return size <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]


def copy_to_device(samples, device):
    """Return what `samples.take` gives of all samples, as tensors on `device`."""
    whole = {}
    for first in range(0, len(samples), COPIED_AT_ONCE):
        part = samples.take(np.arange(first, min(first + COPIED_AT_ONCE, len(samples))))
        for name, rows in part.items():
            if first == 0:
                whole[name] = torch.empty(len(samples), *rows.shape[1:], dtype=rows.dtype, device=device)
            whole[name][first:first + len(rows)] = rows
    return whole
