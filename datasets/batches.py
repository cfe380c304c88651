"""Batches on the device: samples looked up by (update, index in the batch), flipped and converted to [-1, 1]."""

import dataclasses
import functools

import numpy as np
import torch

from runtime import seeds
from runtime.terminal import UserError

RESIDENT_SHARE = 0.25  # of the free memory of a GPU, since the network needs memory, too
COPIED_AT_ONCE = 4096  # samples, when the whole data set is copied to the device
UPSIDE_DOWN = 0.06  # share of images turned upside down with data.use_aug, as in the released code


@dataclasses.dataclass(frozen=True)
class Batch:
    """The samples of one update, or the slice of one process or accumulation step.

    z1: images `(N, C, H, W)`, float32 in [-1, 1]. z0: the noise of stored pairs, same shape; None for images.
    label: one-hot float32 `(N, num_classes)`, or None without classes.
    """

    z0: torch.Tensor | None
    z1: torch.Tensor
    label: torch.Tensor | None = None


def one_hot(labels, num_classes):
    """Return class numbers `(N,)`, integers in [0, num_classes), as one-hot float32 `(N, num_classes)`; unchecked."""
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()


def some_of(count, most):
    """Return at most `most` indices out of 0..count-1, int64, evenly spaced from the first to the last."""
    return np.unique(np.linspace(0, count - 1, most).round().astype(np.int64))


def check_finite(values, numbers, name, advice):
    """Raise UserError, naming the first by `name` and number, if rows of a tensor `values` (N, …) are not finite."""
    nonfinite = (~values.flatten(1).isfinite().all(1)).nonzero()
    if len(nonfinite):
        raise UserError(f"{name} {numbers[int(nonfinite[0])]} is not finite: {advice}")


def check_labels(labels, place, num_classes=None, first=0):
    """Raise UserError, naming `place`, unless an array holds class numbers `(N,)` or is one-hot `(N, num_classes)`.

    num_classes: the number of classes (None: any), numbered from `first` on.
    """
    last, valid = (np.inf if num_classes is None else first + num_classes - 1), np.zeros(len(labels), bool)
    if labels.ndim == 1 and labels.dtype.kind in "iuf":
        valid = (labels % 1 == 0) & (labels >= first) & (labels <= last)
    elif labels.ndim == 2 and num_classes in (None, labels.shape[1]):
        valid = np.isin(labels, (0, 1)).all(1) & (labels.sum(1) == 1)
    if not valid.all():
        raise UserError(f"{place} has {labels.dtype} labels of shape {labels.shape}, the first wrong one "
                        f"{labels[~valid][0]}; classes are numbers (N,) from {first} to {last} or one-hot (N, classes)")


def pixels_to_float(pixels, dtype=torch.float32):
    """Return uint8 pixels as floats in [-1, 1]: `v / 127.5 - 1`."""
    return pixels.to(dtype).div_(127.5).sub_(1.0)


class EndlessOrder:
    """An endless sequence of the indices 0..count-1: epoch e is a permutation drawn from (seed, e)."""

    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def at(self, positions):
        """Return the indices at `positions` of the sequence, both int64 arrays `(n,)`."""
        epochs, places = np.divmod(positions, self.count)
        indices = np.empty(len(places), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = _permutation(self.count, self.seed, int(epoch))[places[here]]
        return indices


@functools.lru_cache(maxsize=4)  # the epoch in use and the next, of two data sets
def _permutation(count, seed, epoch):
    """Return the permutation of 0..count-1 of an epoch, int64 `(count,)`; later numpy versions give the same one."""
    words = seeds.index_generator(seed, epoch, seeds.ORDER).bit_generator.random_raw(count)  # guaranteed by numpy
    return np.argsort(words, kind="stable")


class Batches:
    """Batches of an `ImageSet` or `PairSet`: `batch(update, low, high)` depends on its arguments and the seed alone.

    Sample k of the global batch of an update is at position `update * batch_size + k` of `order`: batches cross the
    ends of epochs, and processes that take disjoint places get disjoint samples.
    mirror: flip left-right with probability 1/2; data.use_aug: that, and upside down with probability 0.06. Raises
    UserError if data.on_device is true and the samples do not fit the device.
    """

    def __init__(self, samples, order, config, device, mirror=False):
        self.samples, self.order, self.device = samples, order, torch.device(device)
        first = samples.take(np.array([0]))
        self.shape, size = tuple(first["z1"].shape[1:]), len(samples) * sum(rows.nbytes for rows in first.values())
        self.seed, self.batch_size, self.num_classes = config.seed, config.training.batch_size, config.data.num_classes
        use_aug, on_device, self.resident = config.data.use_aug, config.data.on_device, None
        self.flips = [(seeds.FLIP, 0.5, -1)] * (mirror or use_aug) + [(seeds.AUGMENT, UPSIDE_DOWN, -2)] * use_aug
        if on_device == "true" or (on_device == "auto" and self.device.type == "cuda"
                                   and size <= RESIDENT_SHARE * torch.cuda.mem_get_info(self.device)[0]):
            try:
                self.resident = copy_to_device(samples, self.device)
            except torch.OutOfMemoryError:
                raise UserError(f"data.on_device {on_device}: {size >> 20} MiB do not fit: set it false") from None

    def __len__(self):
        """Return the number of samples, without the real pairs of flow.real_data_share."""
        return self.order.count

    def batch(self, update, low, high):
        """Return the samples [low, high) of the batch of `update`, on the device, without waiting for the copy."""
        indices = self.order.at(update * self.batch_size + np.arange(low, high))
        if self.resident:
            places = self._send(torch.from_numpy(indices))
            found = {name: rows[places] for name, rows in self.resident.items()}
        else:
            found = {name: self._send(rows) for name, rows in self.samples.take(indices).items()}
        label = found.pop("label", None)
        if label is not None and label.ndim == 1:
            label = one_hot(label, self.num_classes) if self.num_classes else None
        for stream, probability, axis in self.flips:  # z0 and z1 of a pair together
            generator = seeds.step_generator(self.seed, update, stream, self.device)
            draws = torch.rand(self.batch_size, 1, 1, 1, generator=generator, device=self.device)[low:high]
            found = {name: torch.where(draws < probability, rows.flip(axis), rows) for name, rows in found.items()}
        z1 = found["z1"]
        return Batch(found.get("z0"), pixels_to_float(z1) if z1.dtype == torch.uint8 else z1, label)

    def _send(self, tensor):
        tensor = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return tensor.to(self.device, non_blocking=True)


def copy_to_device(samples, device):
    """Return what `samples.take` returns for all samples, on `device`."""
    copied = {name: torch.empty(len(samples), *rows.shape[1:], dtype=rows.dtype, device=device)
              for name, rows in samples.take(np.array([0])).items()}
    for part in np.array_split(np.arange(len(samples)), -(-len(samples) // COPIED_AT_ONCE)):
        for name, rows in samples.take(part).items():
            copied[name][part[0] : part[-1] + 1] = rows
    return copied
