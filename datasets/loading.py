"""Batches of images on the device: looked up by (update, place), flipped and converted to [-1, 1] there."""

import concurrent.futures

import numpy as np
import torch

from datasets.augment import augment, move_labels
from datasets.batch import Batch, one_hot, pixels_to_float
from datasets.order import EndlessOrder
from runtime import seeds
from runtime.errors import UserError

RESIDENT_SHARE = 0.25  # of the free memory of a GPU, which the network needs, too
COPIED_AT_ONCE = 4096  # images, when a whole set goes to a GPU


class ImageBatches:
    """The batches of an image set.

    `batch(update, low, high)` holds the samples at places [low, high) of the global batch of `update`. It is a
    pure function of (seed, update, place): neither the number of processes nor the updates before it matter.
    """

    def __init__(self, image_set, rows, batch_size, seed, num_classes=0, random_flip=False, augmentation=None):
        """Take an `ImageSet`, the global batch size and the seed.

        rows: the `HostRows`, `DeviceRows` or `StreamedRows` of the set's images, which brings them to the device.
        num_classes: width of the one-hot labels, 0 for none. random_flip: flip left-right with probability 1/2.
        augmentation: an `Augmentation`, or None.
        """
        self.image_set = image_set
        self.order = EndlessOrder(len(image_set), batch_size, seed)
        self.num_classes = num_classes
        self.random_flip = random_flip
        self.rows = rows
        self.augmentation = augmentation

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
        pixels = self.rows.take(update, indices)
        self.rows.prefetch(update + 1, self.order.indices(update + 1, low, high))
        if self.random_flip:
            pixels = flip_some(pixels, self._draw_flips(update, pixels.device)[low:high])
        label = None
        if self.num_classes:
            labels = to_device(torch.from_numpy(self.image_set.labels[indices]), pixels.device)
            label = one_hot(labels, self.num_classes)
        images = pixels_to_float(pixels)
        if self.augmentation is None:
            return Batch(z0=None, z1=images, label=label)
        moves = self.augmentation.moves(update, low, high, pixels.device)
        return Batch(z0=None, z1=augment(images, moves), label=label, augment_label=move_labels(moves))

    def _draw_flips(self, update, device):
        """Return which samples of the global batch are flipped, bool `(batch_size,)`."""
        generator = seeds.step_generator(self.order.seed, update, seeds.FLIP, device)
        return torch.rand(self.order.batch_size, generator=generator, device=device) < 0.5


def flip_some(images, flipped):
    """Return images `(N, C, H, W)` with those mirrored left-right where bool `flipped` `(N,)` is true."""
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)


class HostRows:
    """Images in the memory of a CPU that is itself the device: the memory map is read where it is."""

    def __init__(self, images):
        """Take uint8 images `(N, C, H, W)`, usually memory-mapped."""
        self.images = images

    def take(self, update, indices):
        """Return the images at int64 `indices` `(n,)`: uint8 `(n, C, H, W)`."""
        return torch.from_numpy(self.images[indices])

    def prefetch(self, update, indices):
        """Do nothing: everything is there."""


class DeviceRows:
    """Images copied to the device: a batch is an index operation there."""

    def __init__(self, images, device):
        """Take uint8 images `(N, C, H, W)` and copy them, a part at a time, to `device`."""
        self.images = torch.empty(images.shape, dtype=torch.uint8, device=device)
        for start in range(0, len(images), COPIED_AT_ONCE):
            part = slice(start, start + COPIED_AT_ONCE)
            self.images[part] = torch.from_numpy(np.array(images[part]))

    def take(self, update, indices):
        """Return the images at int64 `indices` `(n,)`: uint8 `(n, C, H, W)` on the device."""
        return self.images[to_device(torch.from_numpy(indices), self.images.device)]

    def prefetch(self, update, indices):
        """Do nothing: everything is there."""


class StreamedRows:
    """Images that stay on disk or in host memory: a thread gathers each batch while the one before trains."""

    def __init__(self, images, device):
        """Take uint8 images `(N, C, H, W)`, usually memory-mapped."""
        self.images = images
        self.device = device
        # The thread must choose its GPU, or pinning memory would open a context on the first one in every process.
        choose = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self.thread = concurrent.futures.ThreadPoolExecutor(1, "gather images", *choose)
        self.gathered = {}  # (update, indices as bytes) -> future of the gathered images

    def take(self, update, indices):
        """Return the images at int64 `indices` `(n,)`: uint8 `(n, C, H, W)` on the device."""
        waiting = self.gathered.pop((update, indices.tobytes()), None)
        images = waiting.result() if waiting else self._gather(indices)
        return images.to(self.device, non_blocking=True)

    def prefetch(self, update, indices):
        """Start to gather the images that `take(update, indices)` will want; forget those of other updates.

        The parts of one update (accumulation steps) are asked for in turn, so what the update before it has
        not taken yet is kept.
        """
        self.gathered = {key: future for key, future in self.gathered.items() if key[0] in (update - 1, update)}
        self.gathered[update, indices.tobytes()] = self.thread.submit(self._gather, indices)

    def _gather(self, indices):
        """Return the images at `indices` in one block of host memory, pinned when a GPU will fetch it."""
        shape = (len(indices), *self.images.shape[1:])
        block = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        np.take(self.images, indices, axis=0, out=block.numpy(), mode="clip")  # clip: numpy's unbuffered way
        return block


def to_device(tensor, device):
    """Return a small CPU tensor on `device` without waiting for the copy."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def create_rows(images, device, on_device):
    """Return what brings images to `device`; on_device: the config field `data.on_device`.

    "true": they live on the device (on a CPU that is where they are); a `UserError` when they do not fit. "false": they
    are streamed to it. "auto": streamed only to a GPU with too little free memory.
    """
    if on_device == "false" or (on_device == "auto" and not _fits(images.nbytes, device)):
        return StreamedRows(images, device)
    if device.type == "cpu":
        return HostRows(images)
    try:
        return DeviceRows(images, device)
    except torch.OutOfMemoryError:
        raise UserError(f"data.on_device {on_device}: {images.nbytes / 2**20:.0f} MiB of images do not fit: "
                        "stream them with data.on_device false") from None


def _fits(size, device):
    """Return whether `size` bytes may stay on `device` beside the network."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return size <= RESIDENT_SHARE * free
