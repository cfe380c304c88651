"""How near samples are to training images: a model that copies its data shows here, and not in an FID."""

import numpy as np
import torch


def nearest_distances(queries, images, own=None, chunk=8192):
    """Return the Euclidean distance of each query to its nearest image, float32 (N,).

    `queries` (N, …), a tensor, and `images` (M, …), an array, are uint8; distances are of their values in [-1, 1].
    `own` (N,): the place in `images` of each query itself, which is left out. Images go through `chunk` at a time.
    The search uses products in float32; the distance of what it finds is computed from the difference, so that
    a copy has distance 0 exactly.
    """
    queries = _flat(queries)
    best = torch.full((len(queries),), torch.inf, device=queries.device)
    nearest = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for low in range(0, len(images), chunk):
        part = _flat(_take(images, slice(low, low + chunk), queries.device))
        squared = part.square().sum(1) - 2 * queries @ part.T  # ‖q‖² does not change which is nearest
        if own is not None:
            here = (own >= low) & (own < low + len(part))
            squared[here, own[here] - low] = torch.inf
        least, place = squared.min(1)
        better = least < best
        best = torch.where(better, least, best)
        nearest = torch.where(better, place + low, nearest)
    found = _flat(_take(images, nearest.cpu().numpy(), queries.device))
    return (queries - found).norm(dim=1)


def leave_one_out_distances(images, count, device):
    """Return the distance of `count` images, evenly spread over the data set, to the nearest other image."""
    count = min(count, len(images))
    own = np.arange(count) * len(images) // count
    return nearest_distances(_take(images, own, device), images, torch.from_numpy(own).to(device))


def _take(images, places, device):
    """Copy some images of a (perhaps read-only, memory-mapped) array to the device."""
    return torch.from_numpy(np.array(images[places])).to(device)


def _flat(images):
    """Return uint8 images as rows of numbers in [-1, 1]."""
    return images.flatten(1).float() / 127.5 - 1
