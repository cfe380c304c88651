"""Mean, covariance and features of images that arrive in batches, on one process or on many."""

import dataclasses
import sys

import numpy as np
import torch
import torch.distributed as dist

from runtime.errors import UserError
from runtime.progress import progress_bar

MAX_FEATURES = 50000  # features kept of one set, evenly spread: 400 MB at 2048 numbers


@dataclasses.dataclass(frozen=True)
class Statistics:
    """A set of images as Gaussian and as points: mu (D,), sigma (D, D) float64, features (M, D) float32 or None."""

    mu: torch.Tensor
    sigma: torch.Tensor
    features: torch.Tensor | None
    count: int | None  # images they come from, where known
    name: str


class Moments:
    """Count, sum and sum of outer products of features, in float64 on the device where the features are."""

    def __init__(self, dimension, device):
        """Start empty for features of `dimension` numbers."""
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(dimension, dtype=torch.float64, device=device)
        self.products = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)

    def add(self, features):
        """Take in `features` (N, dimension), of any float type."""
        features = features.to(self.total)
        self.count += len(features)
        self.total += features.sum(0)
        self.products.addmm_(features.T, features)

    def mean_and_covariance(self):
        """Return (μ (D,), Σ (D, D)) float64 over the features of all processes; Σ divides by count - 1, as `np.cov`.

        Needs at least two features; every process must call it.
        """
        count, total, products = map(sum_over_processes, (self.count, self.total, self.products))
        mean = total / count
        return mean, (products - count * torch.outer(mean, mean)) / (count - 1)


def measure(batches, extractor, first, count, device, name, observers=(), max_features=MAX_FEATURES):
    """Return the `Statistics` of `count` images, of which this process sees a stretch from number `first` on.

    `batches` yields uint8 (N, C, H, W) on `device`. Each image goes through the extractor once. At most
    `max_features` features, evenly spread over the images, are kept. Each of `observers` is called with the
    number of a batch's first image and the batch. Every process must call it; a UserError in one is raised in all.
    Raises UserError for fewer than two images.
    """
    if count < 2:
        raise UserError(f"{name}: there is {count} image to measure; a covariance needs at least two")
    moments = Moments(extractor.dimension, device)
    kept = [torch.empty(0, extractor.dimension)]
    wanted = evenly_spread(min(max_features, count), count)
    error = None
    try:
        for images in batches:
            for see in observers:
                see(first, images)
            features = extractor.features(images)
            moments.add(features)
            here = wanted[(wanted >= first) & (wanted < first + len(features))] - first
            kept.append(features[torch.from_numpy(here).to(device)].float().cpu())
            first += len(features)
    except UserError as caught:
        error = caught
    raise_everywhere(error)
    mu, sigma = moments.mean_and_covariance()
    return Statistics(mu, sigma, gather_rows(torch.cat(kept)), count, name)


def measure_source(source, extractor, batch_size, processes, count=None, observers=(), max_features=MAX_FEATURES):
    """Return the `Statistics` of an `ImageSource`, split over the processes.

    count: how many of its images, evenly spread (None: all). observers, max_features: as of `measure`; the images are
    numbered from 0 to count - 1.
    """
    count = len(source) if count is None else count
    first, last = share_of(processes.rank, processes.world_size, count)
    chosen = evenly_spread(count, len(source))[first:last]
    batches = read_batches(source, chosen, batch_size, processes)
    part = "" if count == len(source) else f"{count} of "
    return measure(batches, extractor, first, count, processes.device, f"{source.name}, {part}{len(source)} images",
                   observers, max_features)


def read_batches(source, chosen, batch_size, processes):
    """Yield the images of an `ImageSource` at the ascending places `chosen`, uint8 on the device."""
    with progress_bar(total=len(chosen), desc=f"reading {source.name}", unit="images",
                      enabled="auto" if processes.is_main else "false") as bar:
        for low in range(0, len(chosen), batch_size):
            part = chosen[low : low + batch_size]
            if part[-1] - part[0] == len(part) - 1:
                images = source.read(part[0], part[-1] + 1)
            else:
                images = torch.cat([source.read(place, place + 1) for place in part])
            yield images.to(processes.device)
            bar.update(len(part))
    if processes.is_main:
        for note, number in source.notes.items():
            print(f"{source.name}: {number} images: {note}", file=sys.stderr, flush=True)


def evenly_spread(chosen, count):
    """Return `chosen` places out of `count`, int64, ascending and evenly spread."""
    return np.arange(chosen) * count // max(1, chosen)


# Bringing together what the processes of torchrun measured.


def share_of(rank, world_size, count):
    """Return (first, last): process `rank` takes the samples first ≤ i < last of `count`, in one stretch."""
    return rank * count // world_size, (rank + 1) * count // world_size


def sum_over_processes(tensor):
    """Return the sum of `tensor` over all processes, in every process."""
    if not dist.is_initialized():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def gather_objects(value):
    """Return the list of every process's picklable `value`, in the order of rank. Every process must call it."""
    if not dist.is_initialized():
        return [value]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def raise_everywhere(error):
    """Raise in every process the first error that any of them has (None: this one has none).

    Every process must call it: one that stopped alone would leave the others to fail for want of it.
    """
    error = next((one for one in gather_objects(error) if one is not None), None)
    if error is not None:
        raise error


def gather_rows(rows):
    """Return the rows (N, …) of all processes, which lie on the CPU, in the order of rank, in every process."""
    return torch.from_numpy(np.concatenate(gather_objects(rows.numpy())))
