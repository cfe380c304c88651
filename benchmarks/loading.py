"""Batches of images and of pairs, compared with torch's DataLoader: milliseconds per batch.

    OMP_NUM_THREADS=1 python -m benchmarks.loading | tee benchmarks/loading.txt

An epoch of shuffled batches of 128 at CIFAR-10's size, opening included, on one thread. Images: flipped at random, ours
from a memory-mapped array, the peer torchvision's CIFAR10 with its documented transforms. Pairs: ours from disk (page
cache) and in memory, the peer np.load with a TensorDataset. Rounds alternate; figures are medians of wall-clock time.
"""

import os
import statistics
import tempfile
import time

import numpy as np
import torch
import torchvision
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, Resize, ToTensor

from configs.default import get_default_config
from datasets import DATASETS, DataSet, array_set, create_batches
from runtime.run_folder import git_commit
from runtime.seeds import index_noise

COUNT, PAIRS, BATCH, ROUNDS, SHAPE = 50_000, 20_000, 128, 5, (3, 32, 32)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DATASETS["mapped"] = DataSet(lambda path, spec: array_set(np.load(path, mmap_mode="r"), None, spec))


class RandomCifar(torchvision.datasets.CIFAR10):
    """torchvision's CIFAR10 with its `__getitem__`, on given images uint8 `(N, 32, 32, 3)` instead of a download."""

    def __init__(self, data):
        self.data, self.targets, self.target_transform = data, [0] * len(data), None
        self.transform = Compose([Resize((32, 32)), RandomHorizontalFlip(), ToTensor(),
                                  Normalize((0.5,) * 3, (0.5,) * 3)])


def ours(batches, **data):
    """Read the first batches of the data that fields of `config.data` describe."""
    config = get_default_config()
    config.data.update(data)
    config.training.batch_size = BATCH
    source = create_batches(config, DEVICE)
    for update in range(batches):
        source.batch(update, 0, BATCH)


def loader(batches, dataset, workers=0):
    """Read the first batches of a DataLoader."""
    rows = iter(DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers))
    for _ in range(batches):
        [row.to(DEVICE) for row in next(rows)]


def main():
    """Print the milliseconds per batch of every reader."""
    images, times = np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8), {}
    with tempfile.TemporaryDirectory() as root:
        np.save(f"{root}/images.npy", np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        os.mkdir(f"{root}/0")
        np.save(f"{root}/0/z0.npy", index_noise(0, range(PAIRS), SHAPE))
        np.save(f"{root}/0/z1.npy", index_noise(0, range(PAIRS), SHAPE).tanh())
        cases = {  # name: (batches, how they are read)
            "images: ours": (COUNT // BATCH, lambda n: ours(n, dataset="mapped", data_root=f"{root}/images.npy")),
            "images: torchvision": (COUNT // BATCH, lambda n: loader(n, RandomCifar(images))),
            "images: torchvision, 2 workers": (COUNT // BATCH, lambda n: loader(n, RandomCifar(images), 2)),
            "pairs: ours, from disk": (PAIRS // BATCH, lambda n: ours(n, reflow_data_root=root, on_device="false")),
            "pairs: ours, resident": (PAIRS // BATCH, lambda n: ours(n, reflow_data_root=root, on_device="true")),
            "pairs: np.load, DataLoader": (PAIRS // BATCH, lambda n: loader(n, TensorDataset(
                *(torch.from_numpy(np.load(f"{root}/0/{name}.npy")) for name in ("z0", "z1"))))),
        }
        for _ in range(ROUNDS):
            for name, (batches, read) in cases.items():
                started = time.perf_counter()
                read(batches)
                times.setdefault(name, []).append(1000 * (time.perf_counter() - started) / batches)
    print(f"{DEVICE}, torch {torch.__version__}, torchvision {torchvision.__version__}, batches of {BATCH}, "
          f"commit {git_commit()}")
    for name, values in times.items():
        print(f"{name:32}{statistics.median(values):8.3f} ms; rounds {' '.join(f'{value:.2f}' for value in values)}")


if __name__ == "__main__":
    main()
