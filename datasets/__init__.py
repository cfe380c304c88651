"""Data sets: from files to uint8 arrays, and from those to batches on the device."""

import torch

from datasets.augment import create_augmentation
from datasets.batch import Batch, one_hot, pixels_to_float
from datasets.images import ImageSet, load_images, subset
from datasets.loading import ImageBatches, create_rows
from runtime.errors import UserError

__all__ = ["Batch", "ImageSet", "create_batches", "load_images", "one_hot", "pixels_to_float", "subset"]


def create_batches(config, device):
    """Return the source of training batches: stored pairs with `data.reflow_data_root`, images otherwise.

    The source has `batch(update, low, high) -> Batch` for places [low, high) of the global batch of `update`,
    `len()` and `shape` (C, H, W). Raises `UserError` for data that cannot be trained on.
    """
    if config.data.reflow_data_root:
        from datasets.pairs import create_pair_batches

        return create_pair_batches(config, device)
    image_set = load_images(config)
    if len(image_set) < config.training.batch_size:
        raise UserError(f"{image_set.source} has {len(image_set)} images, fewer than training.batch_size "
                        f"{config.training.batch_size}: lower it or add images")
    rows = create_rows(image_set.images, torch.device(device), config.data.on_device)
    return ImageBatches(image_set, rows, config.training.batch_size, config.seed, config.data.num_classes,
                        config.data.random_flip, create_augmentation(config))
