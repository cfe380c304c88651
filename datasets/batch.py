"""What one update trains on, on the device: images in [-1, 1], noise of pairs, one-hot labels."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Batch:
    """The samples of one update, or one process's or accumulation step's slice of them.

    z1: images `(N, C, H, W)`, float32 in [-1, 1]. z0: the noise of stored pairs, same shape; None for images.
    label: one-hot float32 `(N, num_classes)`, or None without classes. augment_label: what augmentation did
    to each sample, float32 `(N, len(augment.LABEL_NAMES))`, for networks that take it; None without.
    """

    z0: torch.Tensor | None
    z1: torch.Tensor
    label: torch.Tensor | None = None
    augment_label: torch.Tensor | None = None


def one_hot(labels, num_classes):
    """Return class numbers `(N,)`, integers in [0, num_classes), as one-hot float32 `(N, num_classes)`.

    A number outside the range is an all-zero row: ranges are checked where labels are read, once, so that
    nothing here waits for the device.
    """
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()


def pixels_to_float(pixels):
    """Return uint8 pixels as float32 in [-1, 1]: `v / 127.5 - 1`."""
    return pixels.float().div_(127.5).sub_(1.0)
