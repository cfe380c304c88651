"""Look at the data before training: python -m tools.look --config configs/rectified_flow/cifar10_rf_gaussian.py

Prints count, shape, classes with counts, per-channel mean and deviation and where the decoded images are cached, and
writes a picture of the images that the loader yields first, flips and augmentation included. Works with any config,
with data.reflow_data_root for pairs, too.
"""

import numpy as np
import torch

from configs.command_line import run_script
from configs.default import Field
from datasets import create_batches
from runtime.pictures import save_grid
from runtime.progress import progress_bar

FLAGS = {
    "out": Field("look.png", "the picture to write"),
    "images": Field(100, "images in the picture", low=1),
    "columns": Field(10, "images in a row of it", low=1),
}

CHUNK = 4096  # images whose pixels are counted at a time
PAIRS = 10_000  # pairs, spread over all, whose values are looked at
CLASSES_SHOWN = 20


def main(config, args, given):
    """Print what the config's data are and write the picture."""
    source = create_batches(config, torch.device("cpu"))
    if config.data.reflow_data_root:
        report = describe_pairs(source.pairs)
    else:
        report = describe_images(source.image_set, config.training.progress)
    print("\n".join(report))
    save_grid(args.out, first_images(source, config.training.batch_size, args.images), args.columns)
    print(f"picture: {args.out} (what the loader yields first, with flips and augmentation)")


def first_images(source, batch_size, count):
    """Return the first `count` images that training would see, `(count, C, H, W)` in [-1, 1]."""
    updates = range(-(-count // batch_size))
    return torch.cat([source.batch(update, 0, batch_size).z1 for update in updates])[:count]


def describe_images(image_set, progress):
    """Return lines of text about an `ImageSet`, all of its pixels counted."""
    counts = count_values(image_set.images, progress)
    mean, deviation = moments(counts)
    lines = [f"source: {image_set.source}",
             f"cached: {image_set.cache or 'not needed'}",
             f"images: {len(image_set)} of shape {_times(image_set.images.shape[1:])} (C×H×W), uint8"]
    lines += [f"converted: {number} images: {note}" for note, number in image_set.notes.items()]
    if image_set.skipped:
        lines.append(f"skipped: {len(image_set.skipped)} corrupt images, the first {image_set.skipped[0]}")
    lines += class_lines(image_set.labels, image_set.class_names)
    return lines + [f"mean per channel: {_numbers(mean)} (of pixels in [0, 1])",
                    f"deviation per channel: {_numbers(deviation)}"]


def describe_pairs(pairs):
    """Return lines of text about a `PairSet`, the values of up to `PAIRS` of its pairs looked at."""
    chosen = np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), PAIRS)).round().astype(np.int64))
    sums = {"z0": np.zeros((2, pairs.shape[0])), "z1": np.zeros((2, pairs.shape[0]))}
    labels = []
    for part in np.array_split(chosen, -(-len(chosen) // CHUNK)):
        z0, z1, label = pairs.take(part)
        for name, values in (("z0", z0.double()), ("z1", z1.double())):
            sums[name] += [values.sum((0, 2, 3)).numpy(), values.square().sum((0, 2, 3)).numpy()]
        labels += [] if label is None else [label.argmax(1).numpy()]
    lines = [f"source: {len(pairs.folders)} folders of pairs: {', '.join(str(f.path) for f in pairs.folders)}",
             f"pairs: {len(pairs)} of shape {_times(pairs.shape)} (C×H×W)", f"looked at: {len(chosen)} pairs"]
    lines += class_lines(np.concatenate(labels) if labels else None, None)
    for name, (total, squares) in sums.items():
        values = len(chosen) * np.prod(pairs.shape[1:])
        mean = total / values
        lines += [f"{name}: mean per channel {_numbers(mean)}, deviation "
                  f"{_numbers(np.sqrt(np.maximum(squares / values - mean**2, 0)))}"]
    return lines


def count_values(images, progress):
    """Return how often each value occurs in each channel of uint8 images `(N, C, H, W)`: int64 `(C, 256)`."""
    counts = np.zeros((images.shape[1], 256), np.int64)
    with progress_bar(total=len(images), desc="looking", unit="images", enabled=progress) as bar:
        for start in range(0, len(images), CHUNK):
            part = images[start : start + CHUNK]
            counts += [np.bincount(part[:, channel].ravel(), minlength=256) for channel in range(len(counts))]
            bar.update(len(part))
    return counts


def moments(counts):
    """Return mean and standard deviation of each channel, `(C,)` in [0, 1], from the counts of its values."""
    values = np.arange(256) / 255
    shares = counts / counts.sum(1, keepdims=True)
    mean = shares @ values
    return mean, np.sqrt(shares @ values**2 - mean**2)


def class_lines(labels, names):
    """Return lines with the number of images of each class; the first `CLASSES_SHOWN` of many."""
    if labels is None:
        return ["classes: none"]
    counts = np.bincount(labels, minlength=len(names or ()))
    names = names or [str(number) for number in range(len(counts))]
    lines = [f"classes: {len(counts)}, with {counts.min()} to {counts.max()} images each"]
    lines += [f"  {number} {names[number]}: {counts[number]}" for number in range(min(len(counts), CLASSES_SHOWN))]
    return lines + ([f"  … and {len(counts) - CLASSES_SHOWN} more"] if len(counts) > CLASSES_SHOWN else [])


def _times(shape):
    return "×".join(map(str, shape))


def _numbers(values):
    return " ".join(f"{value:.4f}" for value in values)


if __name__ == "__main__":
    run_script(main, __doc__, FLAGS)
