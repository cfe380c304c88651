"""Couplings of noise z0 and images z1: COUPLINGS has one for each sampling.direction of generate_data.py.

A coupling is a function (points, indices, solve, eps) → (z0, z1, nfe). `points.z0(indices)` and `points.z1(indices)`
return noise and images by pair number; `solve(x)` integrates x and returns (end point, number of evaluations `(n,)`).
"""

import dataclasses
import functools
from collections.abc import Callable

import torch

from flows.rectified_flow import interpolate
from flows.samplers import create_sampler


def random_paired(points, indices, solve, eps):
    """Pair images with independent noise: the coupling that a 1-rectified flow is trained on."""
    return points.z0(indices), points.z1(indices), torch.zeros(len(indices), dtype=torch.int64)


def noise_to_image(points, indices, solve, eps):
    """Integrate noise z0 to an image z1: the coupling of reflow (arXiv 2209.03003)."""
    z0 = points.z0(indices)
    return z0, *solve(z0)


def image_to_noise(points, indices, solve, eps):
    """Integrate an image z1 backwards in time to noise z0."""
    z1 = points.z1(indices)
    z0, nfe = solve(z1)
    return z0, z1, nfe


def near_image_to_noise(points, indices, solve, eps):
    """Integrate (1-eps)·z1 + eps·ξ, ξ = `points.z0`, backwards from t = 1-eps to noise z0.

    For the closed-form velocity, singular at t = 1. At t = 1-eps z1 itself is off the paths: its z0 would be wrong.
    """
    z1 = points.z1(indices)
    z0, nfe = solve(interpolate(points.z0(indices), z1, 1 - eps))
    return z0, z1, nfe


@dataclasses.dataclass(frozen=True)
class Coupling:
    """A row of COUPLINGS: the function, and what generate_data.py must know about it."""

    pairs: Callable
    given: str  # the initial points that it reads: "noise", "image" (integrated in reverse) or "both"
    velocity: str = ""  # the velocity that it integrates: "network", "closed form" (up to t = 1-eps) or "" (none)


COUPLINGS = {
    "from_z0": Coupling(noise_to_image, "noise", "network"),
    "from_z1": Coupling(image_to_noise, "image", "network"),
    "random_paired": Coupling(random_paired, "both"),
    "gt_v_from_z0": Coupling(noise_to_image, "noise", "closed form"),
    "gt_v_from_z1": Coupling(near_image_to_noise, "image", "closed form"),
}


def create_coupling(config, velocity, points, device):
    """Return the coupling of `config.sampling.direction`: `pairs(indices, finished) -> (z0, z1, label, nfe)`.

    It is `make_pairs`, integrated config.training.batch_size at a time. Raises UserError as `create_sampler`.
    """
    row, eps = COUPLINGS[config.sampling.direction], config.flow.eps
    end = 1 - eps if row.velocity == "closed form" else 1.0
    sample = create_sampler(config, reverse=row.given == "image", T=end, shrink_slots=True)
    sample = functools.partial(sample, velocity, batch_size=config.training.batch_size)
    return functools.partial(make_pairs, row, sample, points, eps, device)


def make_pairs(row, sample, points, eps, device, indices, finished):
    """Return (z0, z1, label, nfe) of the pairs with the numbers `indices`, a range, by the `Coupling` row.

    z0, z1: float32 `(n, C, H, W)`, label one-hot float32 `(n, num_classes)` or None, nfe int64 `(n,)`, all on the CPU.
    `finished(k)` is called whenever k more pairs are done. A pair is bit-identical only in the same range (at its end
    rk45 drops idle slots) with the same number of threads and instruction set.
    """
    label = points.label(indices)

    def solve(x):
        x, nfe = sample(x.to(device), None if label is None else label.to(device), indices=indices, finished=finished)
        return x.cpu(), nfe

    if not row.velocity:
        finished(len(indices))
    z0, z1, nfe = row.pairs(points, indices, solve, eps)
    return z0, z1, label, nfe
