"""Data sets: from files to uint8 arrays, and from those to batches on the device."""

import os

from datasets.batches import Batch, Batches, EndlessOrder, one_hot, pixels_to_float
from datasets.pairs import create_pair_batches
from datasets.sources import DATASETS, DataSet, ImageSet, array_set, load_images, subset
from runtime.terminal import UserError, print_message

__all__ = ["DATASETS", "Batch", "DataSet", "ImageSet", "array_set", "create_batches", "load_images", "one_hot",
           "pixels_to_float", "subset"]


def create_batches(config, device):
    """Return the `Batches` of pairs with data.reflow_data_root, otherwise of images; UserError if they do not fit."""
    if config.data.reflow_data_root:
        return create_pair_batches(config, device)
    data, size = config.data, config.training.batch_size
    image_set = load_images(config)
    if len(image_set) < size:
        raise UserError(f"{image_set.source} has {len(image_set)} images, fewer than training.batch_size {size}")
    if not DATASETS[data.dataset].mirror and os.environ.get("RANK", "0") == "0":
        flips = "mirrored at random" if data.random_flip or data.use_aug else "not mirrored (data.random_flip is false)"
        print_message(f"images of {image_set.source} are {flips}", stderr=True)
    return Batches(image_set, EndlessOrder(len(image_set), config.seed), config, device, data.random_flip)
