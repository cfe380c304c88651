"""Batches of images on the device: looked up by (update, place), flipped and converted to [-1, 1] there."""

import concurrent.futures
import dataclasses
import functools

import numpy as np
import torch

from runtime import seeds
from runtime.errors import UserError

RESIDENT_SHARE = 0.25  # of the free memory of a GPU, which the network needs, too
COPIED_AT_ONCE = 4096  # images, when a whole set goes to a GPU
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


def pixels_to_float(pixels, dtype=torch.float32):
    """Return uint8 pixels as floats in [-1, 1]: `v / 127.5 - 1`."""
    return pixels.to(dtype).div_(127.5).sub_(1.0)


def to_device(tensor, device):
    """Return a small CPU tensor on `device` without waiting for the copy."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class EndlessOrder:
    """Indices 0..count-1 for ever: epoch e is a permutation drawn from (seed, e), batches run across its end.

    The place of a sample in the whole sequence is `update * batch_size + place`, so any update of any run can
    be looked up directly, and processes that take disjoint places get disjoint samples.
    """

    def __init__(self, count, batch_size, seed):
        """Take the number of samples, the global batch size (over all processes) and the seed."""
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
        self.seed, self.batch_size, self.mirror, self.use_aug = seed, batch_size, mirror or use_aug, use_aug

    def __call__(self, update, low, high, *images):
        """Return each of `images`, the samples `(high - low, C, H, W)` at places [low, high), flipped alike."""
        if self.mirror:
            chosen = self._draw(update, seeds.FLIP, 0.5, images[0].device)[low:high]
            images = [torch.where(chosen, each.flip(-1), each) for each in images]
        if self.use_aug:
            chosen = self._draw(update, seeds.AUGMENT, UPSIDE_DOWN, images[0].device)[low:high]
            images = [torch.where(chosen, each.flip(-2), each) for each in images]
        return images

    def _draw(self, update, stream, probability, device):
        """Return which samples of the global batch are chosen, bool `(batch_size, 1, 1, 1)`."""
        generator = seeds.step_generator(self.seed, update, stream, device)
        return torch.rand(self.batch_size, 1, 1, 1, generator=generator, device=device) < probability


class ReadAhead:
    """`read(update, low, high)`, called by a thread one update before it is asked for."""

    def __init__(self, read, device):
        """Take the function and the device its tensors go to."""
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


class ImageBatches:
    """The batches of an image set.

    `batch(update, low, high)` holds the samples at places [low, high) of the global batch of `update`. It is a
    pure function of (seed, update, place): neither the number of processes nor the updates before it matter.
    """

    def __init__(self, image_set, batch_size, seed, device, *, on_device="auto", num_classes=0, flips=None):
        """Take an `ImageSet`, the global batch size, the seed of the order and the device.

        on_device: the config field `data.on_device`. num_classes: width of the one-hot labels, 0 for none. flips:
        `Flips`, or None.
        """
        self.image_set, self.num_classes, self.flips = image_set, num_classes, flips
        self.device = torch.device(device)
        self.order = EndlessOrder(len(image_set), batch_size, seed)
        self.resident, self.gathered = None, None
        if on_device == "false" or (on_device == "auto" and not fits(image_set.images.nbytes, self.device)):
            self.gathered = ReadAhead(self._gather, self.device)
        elif self.device.type != "cpu":  # on a CPU the memory map is read where it is
            self.resident = copy_to_device(image_set.images, self.device, on_device)

    def __len__(self):
        """Return the number of images in the set."""
        return len(self.image_set)

    @property
    def shape(self):
        """Shape (C, H, W) of an image."""
        return self.image_set.images.shape[1:]

    def batch(self, update, low, high):
        """Return the `Batch` of places [low, high) of `update`, on the device."""
        indices = self.order.indices(update, low, high)
        if self.resident is not None:
            pixels = self.resident[to_device(torch.from_numpy(indices), self.device)]
        elif self.gathered is not None:
            pixels = self.gathered(update, low, high).to(self.device, non_blocking=True)
        else:
            pixels = torch.from_numpy(self.image_set.images[indices])
        if self.flips is not None:
            [pixels] = self.flips(update, low, high, pixels)
        label = None
        if self.num_classes:
            labels = torch.from_numpy(self.image_set.labels[indices])
            label = one_hot(to_device(labels, self.device), self.num_classes)
        return Batch(z0=None, z1=pixels_to_float(pixels), label=label)

    def _gather(self, update, low, high):
        """Return the images of these places in one piece of host memory, pinned when a GPU will fetch it."""
        images, indices = self.image_set.images, self.order.indices(update, low, high)
        gathered = torch.empty((len(indices), *images.shape[1:]), dtype=torch.uint8,
                               pin_memory=self.device.type == "cuda")
        np.take(images, indices, axis=0, out=gathered.numpy(), mode="clip")  # clip: numpy's unbuffered way
        return gathered


def fits(size, device):
    """Return whether `size` bytes may stay on `device` beside the network."""
    return device.type != "cuda" or size <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]


def copy_to_device(images, device, on_device):
    """Return uint8 images `(N, C, H, W)`, usually memory-mapped, as a tensor on `device`; UserError if too large."""
    try:
        copy = torch.empty(images.shape, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        raise UserError(f"data.on_device {on_device}: {images.nbytes / 2**20:.0f} MiB of images do not fit: "
                        "stream them with data.on_device false") from None
    for start in range(0, len(images), COPIED_AT_ONCE):
        part = slice(start, start + COPIED_AT_ONCE)
        copy[part] = torch.from_numpy(np.array(images[part]))
    return copy
