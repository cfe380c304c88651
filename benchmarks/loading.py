"""Batches of a CIFAR-10-sized data set: ours against torchvision's transforms in a DataLoader.

    python benchmarks/loading.py | tee benchmarks/loading.txt

Both give shuffled batches of 128 colour images of 32×32, flipped at random, float in [-1, 1], on the CPU with one
thread. The peer does what torchvision documents: Resize, RandomHorizontalFlip, ToTensor, Normalize on its CIFAR10
class, without worker processes and with two. Ours reads the memory-mapped cache entry. Runs alternate; the figures
are medians over the rounds.
"""

import itertools
import pathlib
import pickle
import platform
import statistics
import sys
import tempfile
import time

import numpy as np
import torch
import torchvision
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, Resize, ToTensor

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.default import get_default_config  # noqa: E402
from datasets import create_batches  # noqa: E402

COUNT, BATCH, ROUNDS = 50_000, 128, 7
OUR_BATCHES, PEER_BATCHES = 400, 40  # in one round


class RandomCifar(torchvision.datasets.CIFAR10):
    """torchvision's CIFAR10, `__getitem__` and all, with given images in place of a download."""

    def __init__(self, data, targets, transform):
        """Take images uint8 `(N, 32, 32, 3)`, labels and the transform."""
        self.data, self.targets = data, targets
        self.transform, self.target_transform = transform, None


def main():
    """Print the milliseconds per batch of each loader, round by round, and the ratios of the medians."""
    torch.set_num_threads(1)
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 3, 32, 32), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        source = our_batches(pathlib.Path(folder), images)
        updates = itertools.count()  # runs on over the rounds, so that they pay for the epochs' permutations
        loaders = {"ours": lambda: time_ours(source, updates),
                   "torchvision, no workers": lambda: time_peer(peer_loader(images, 0)),
                   "torchvision, 2 workers": lambda: time_peer(peer_loader(images, 2))}
        print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, torchvision "
              f"{torchvision.__version__}, 1 thread, batch {BATCH} of {COUNT} images 3×32×32; ms per batch")
        times = {name: [] for name in loaders}
        for number in range(ROUNDS):
            for name, measure in loaders.items():
                times[name].append(1000 * measure())
            print(f"round {number}: " + ", ".join(f"{name} {values[-1]:.3f}" for name, values in times.items()))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name}: {median:.3f} ms, {median / medians['ours']:.1f} times ours")


def our_batches(folder, images):
    """Write the images as CIFAR-10's python batches and return our source of training batches."""
    for number, part in enumerate(np.array_split(images, 5), 1):
        batch = {"data": part.reshape(len(part), -1), "labels": [0] * len(part)}
        (folder / f"data_batch_{number}").write_bytes(pickle.dumps(batch, protocol=2))
    config = get_default_config()
    config.data.data_root, config.data.cache_dir = str(folder), str(folder / "cache")
    config.training.progress, config.training.batch_size = "false", BATCH
    return create_batches(config, torch.device("cpu"))


def peer_loader(images, workers):
    """Return an iterator over torchvision's batches, its workers started."""
    transform = Compose([Resize((32, 32)), RandomHorizontalFlip(), ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)])
    data = RandomCifar(np.ascontiguousarray(images.transpose(0, 2, 3, 1)), [0] * len(images), transform)
    return iter(torch.utils.data.DataLoader(data, BATCH, shuffle=True, drop_last=True, num_workers=workers))


def time_ours(source, updates):
    """Return the seconds per batch."""
    started = time.perf_counter()
    for update in itertools.islice(updates, OUR_BATCHES):
        source.batch(update, 0, BATCH)
    return (time.perf_counter() - started) / OUR_BATCHES


def time_peer(batches):
    """Return the seconds per batch, after the first few."""
    for _ in range(5):
        next(batches)
    started = time.perf_counter()
    for _ in range(PEER_BATCHES):
        next(batches)
    return (time.perf_counter() - started) / PEER_BATCHES


if __name__ == "__main__":
    main()
