"""Look at the data before training: python -m tools.look --config configs/rectified_flow/cifar10_rf_gaussian.py

Prints where the images are cached, their shape, conversions, classes, mean and standard deviation, and writes a grid of
the first images of training, flips included.
"""

import numpy as np
import torch

from configs.command_line import run_script
from configs.default import Field
from datasets import create_batches
from datasets.sources import count_classes
from runtime.plots import save_grid
from runtime.terminal import print_message, progress_bar

FLAGS = {
    "out": Field("look.png", "image file to write"),
    "images": Field(100, "images in the grid, ten per row", low=1),
}

CHUNK = 4096  # images read at a time


def main(config, args, given):
    """Describe the data of the config and write the grid."""
    source, size = create_batches(config, torch.device("cpu")), config.training.batch_size
    if config.data.reflow_data_root:
        print_message(f"pairs: {len(source)} of shape {tuple(source.shape)} (C, H, W) in "
                      f"{config.data.reflow_data_root}; tools.check_pairs checks them")
    else:
        print_message("\n".join(describe_images(source.samples)))
    updates = range(-(-args.images // size))
    images = torch.cat([source.batch(update, 0, size).z1 for update in updates])[:args.images]
    save_grid(args.out, images, 10)
    print_message(f"grid: {args.out} (the first images of training, flips included)")


def describe_images(image_set):
    """Return lines of text about an `ImageSet`."""
    mean, std = (" ".join(f"{value:.4f}" for value in values) for values in moments(image_set.images))
    lines = [f"source: {image_set.source}",
             f"cached: {image_set.cache or 'not needed'}",
             f"images: {len(image_set)} of shape {image_set.images.shape[1:]} (C, H, W), uint8"]
    lines += [f"converted: {number} images: {note}" for note, number in image_set.notes.items()]
    if image_set.skipped:
        lines.append(f"skipped: {len(image_set.skipped)} images, the first: {image_set.skipped[0]}")
    counts, named = ([], "none") if image_set.labels is None else count_classes(image_set)
    return [*lines, f"classes: {len(counts)} ({named})", f"mean per channel: {mean} (of pixels in [0, 1])",
            f"standard deviation: {std}"]


def moments(images):
    """Return mean and standard deviation of each channel, `(C,)` in [0, 1], of uint8 images `(N, C, H, W)`."""
    sums = np.zeros((2, images.shape[1]))
    for start in progress_bar(range(0, len(images), CHUNK), desc="statistics", unit="blocks"):
        part = images[start : start + CHUNK] / np.float32(255)
        sums += [part.sum((0, 2, 3), np.float64), (part**2).sum((0, 2, 3), np.float64)]
    mean, square = sums / (images.size / images.shape[1])
    return mean, np.sqrt(np.maximum(0, square - mean**2))


if __name__ == "__main__":
    run_script(main, __doc__, FLAGS)
