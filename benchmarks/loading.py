"""Batches of a CIFAR-10-sized data set: ours against torchvision's transforms in a DataLoader.

    python benchmarks/loading.py | tee benchmarks/loading.txt

Both give shuffled batches of 128 colour images of 32×32, flipped at random, float in [-1, 1], on the CPU with one
thread: ours from the memory-mapped cache entry; torchvision's as it documents them, with and without workers.
"""

import itertools
import pathlib
import pickle
import statistics
import sys
import tempfile
import time

import numpy as np
import torch
import torchvision
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, Resize, ToTensor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from configs.default import get_default_config
from datasets import create_batches

COUNT, BATCH, ROUNDS = 50_000, 128, 7


class RandomCifar(torchvision.datasets.CIFAR10):
    """torchvision's CIFAR10, `__getitem__` and all, with given images uint8 `(N, 32, 32, 3)` in place of a download."""

    def __init__(self, data):
        self.data, self.targets, self.target_transform = data, [0] * len(data), None
        self.transform = Compose([Resize((32, 32)), RandomHorizontalFlip(), ToTensor(),
                                  Normalize((0.5,) * 3, (0.5,) * 3)])


def our_batches(folder, images):
    """Write the images as CIFAR-10's python batches and return an iterator over our training batches."""
    for number, part in enumerate(np.array_split(images, 5), 1):
        batch = {"data": part.transpose(0, 3, 1, 2).reshape(len(part), -1), "labels": [0] * len(part)}
        (folder / f"data_batch_{number}").write_bytes(pickle.dumps(batch, protocol=2))
    config = get_default_config()
    config.data.data_root, config.data.cache_dir = str(folder), str(folder / "cache")
    config.training.progress, config.training.batch_size = "false", BATCH
    source = create_batches(config, torch.device("cpu"))
    return (source.batch(update, 0, BATCH) for update in itertools.count())  # over rounds: permutations are paid for


def milliseconds(batches, count):
    """Return the time per batch over `count` batches."""
    started = time.perf_counter()
    for _ in range(count):
        next(batches)
    return 1000 * (time.perf_counter() - started) / count


def main():
    """Print the milliseconds per batch of each loader, medians over the rounds, and their ratios."""
    torch.set_num_threads(1)
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)
    times = {}
    with tempfile.TemporaryDirectory() as folder:
        ours = our_batches(pathlib.Path(folder), images)
        for _ in range(ROUNDS):
            times.setdefault("ours", []).append(milliseconds(ours, 400))
            for workers in (0, 2):
                loader = iter(torch.utils.data.DataLoader(RandomCifar(images), BATCH, shuffle=True, drop_last=True,
                                                          num_workers=workers))
                milliseconds(loader, 5)  # the workers start
                times.setdefault(f"torchvision, {workers} workers", []).append(milliseconds(loader, 40))
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, 1 thread, batch {BATCH} of {COUNT} "
          f"images 3×32×32; ms per batch, medians of {ROUNDS} alternating rounds")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name}: {median:.3f} ms, {median / statistics.median(times['ours']):.1f} times ours")


if __name__ == "__main__":
    main()
