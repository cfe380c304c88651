"""Mean, covariance and features of images that arrive in batches, on one process or on many."""

import collections
import dataclasses

import numpy as np
import torch

from runtime.devices import gather
from runtime.terminal import UserError, progress_bar

MAX_FEATURES = 50000  # features kept of one set, evenly spread: 400 MB at 2048 numbers


@dataclasses.dataclass(frozen=True)
class Statistics:
    """A set of images as Gaussian and as points: mu (D,), sigma (D, D) float64, features (M, D) float32 or None."""

    mu: torch.Tensor
    sigma: torch.Tensor
    features: torch.Tensor | None
    count: int | None  # images they come from, where known
    name: str


def measure(batches, extractor, first, count, device, name, observers=(), max_features=MAX_FEATURES):
    """Return the `Statistics` of `count` images, of which this process sees a stretch from number `first` on.

    `batches` yields uint8 (N, C, H, W) on `device`. Each image goes through the extractor once; sums are taken in
    float64 on the device, and Σ divides by count - 1, as `np.cov`. At most `max_features` features, evenly spread
    over the images, are kept. Each of `observers` is called with the number of a batch's first image and the batch.
    Every process must call it; a UserError in one is raised in all. Raises UserError for fewer than two images.
    """
    if count < 2:
        raise UserError(f"{name}: there is {count} image to measure; a covariance needs at least two")
    total = torch.zeros(extractor.dimension, dtype=torch.float64, device=device)
    products = torch.zeros(extractor.dimension, extractor.dimension, dtype=torch.float64, device=device)
    kept = [torch.empty(0, extractor.dimension)]
    wanted = evenly_spread(min(max_features, count), count)
    error = None
    try:
        for images in batches:
            for see in observers:
                see(first, images)
            features = extractor.features(images)
            wide = features.double()
            total += wide.sum(0)
            products.addmm_(wide.T, wide)
            here = wanted[(wanted >= first) & (wanted < first + len(features))] - first
            kept.append(features[torch.from_numpy(here).to(device)].float().cpu())
            first += len(features)
    except UserError as caught:
        error = caught
    errors, totals, parts, features = zip(*gather((error, total.cpu(), products.cpu(), torch.cat(kept))), strict=True)
    for error in filter(None, errors):  # in every process: one that stopped alone would leave the others to wait
        raise error
    mean, products = sum(totals).to(device) / count, sum(parts).to(device)
    sigma = (products - count * torch.outer(mean, mean)) / (count - 1)
    return Statistics(mean, sigma, torch.cat(features), count, name)


def measure_source(source, extractor, batch_size, processes, count=None, observers=(), max_features=MAX_FEATURES):
    """Return the `Statistics` (`measure`) of `count` images of an `ImageSource`, evenly spread (None: all of them)."""
    count = len(source) if count is None else count
    mine = share_of(processes, count)
    chosen = evenly_spread(count, len(source))[mine.start : mine.stop]
    lows = progress_bar(range(0, len(chosen), batch_size), desc=f"reading {source.name}", unit="batches",
                        enabled="auto" if processes.is_main else "false")
    batches = (source.read(chosen[low : low + batch_size]).to(processes.device) for low in lows)
    name = f"{source.name}, {'' if count == len(source) else f'{count} of '}{len(source)} images"
    found = measure(batches, extractor, mine.start, count, processes.device, name, observers, max_features)
    for note, number in sum(gather(source.notes), collections.Counter()).items():
        processes.say(f"{source.name}: {number} images: {note}")
    return found


def evenly_spread(chosen, count):
    """Return `chosen` places out of `count`, int64, ascending and evenly spread."""
    return np.arange(chosen) * count // max(1, chosen)


def share_of(processes, count):
    """Return the range of this process's samples among `count`: each process takes one stretch."""
    rank, size = processes.rank, processes.world_size
    return range(rank * count // size, (rank + 1) * count // size)
