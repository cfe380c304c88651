"""Mean, covariance and a store of features of images that arrive in batches, on one process or on many."""

import dataclasses

import numpy as np
import torch

from metrics.gather import gather_rows, raise_everywhere, sum_over_processes
from runtime.errors import UserError

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
    """
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
    return Statistics(mu, sigma, gather_rows(torch.cat(kept), device), count, name)


def evenly_spread(chosen, count):
    """Return `chosen` places out of `count`, int64, ascending and evenly spread."""
    return np.arange(chosen) * count // max(1, chosen)
