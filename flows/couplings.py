"""Couplings: which noise z0 goes with which image z1, as the directions of generate_data.py have it (COUPLINGS).

A coupling is a function (points, indices, solve, eps) → (z0, z1, nfe). `points.z0(indices)` and `points.z1(indices)`
are the initial points of pairs by number; `solve(x)` integrates x, and returns where it ends and its evaluations.
"""

import dataclasses
from collections.abc import Callable

import torch

from flows.rectified_flow import interpolate
from flows.samplers import create_sampler


def random_paired(points, indices, solve, eps):
    """Any image with any noise: the coupling that the first rectified flow learns from."""
    return points.z0(indices), points.z1(indices), torch.zeros(len(indices), dtype=torch.int64)


def noise_to_image(points, indices, solve, eps):
    """z0 is given, and z1 is where it flows to: the reflow coupling (arXiv 2209.03003)."""
    z0 = points.z0(indices)
    return z0, *solve(z0)


def image_to_noise(points, indices, solve, eps):
    """z1 is given, and z0 is where it flows to back in time."""
    z1 = points.z1(indices)
    z0, nfe = solve(z1)
    return z0, z1, nfe


def near_image_to_noise(points, indices, solve, eps):
    """As `image_to_noise`, from (1-eps)·z1 + eps·ξ with ξ = `points.z0`.

    For the closed-form velocity, which is singular at t = 1: z1 itself lies between paths, and gives a wrong z0.
    """
    z1 = points.z1(indices)
    z0, nfe = solve(interpolate(points.z0(indices), z1, 1 - eps))
    return z0, z1, nfe


@dataclasses.dataclass(frozen=True)
class Coupling:
    """A row of COUPLINGS: the function, and what generate_data.py must know of it."""

    pairs: Callable
    given: str  # its initial points: "noise", "image" or "both"; from images it runs in reverse
    velocity: str = ""  # what it integrates: "network", "closed form" (which ends at T - eps) or "" (nothing)


COUPLINGS = {
    "from_z0": Coupling(noise_to_image, "noise", "network"),
    "from_z1": Coupling(image_to_noise, "image", "network"),
    "random_paired": Coupling(random_paired, "both"),
    "gt_v_from_z0": Coupling(noise_to_image, "noise", "closed form"),
    "gt_v_from_z1": Coupling(near_image_to_noise, "image", "closed form"),
}


def create_coupling(config, velocity, points, device):
    """Return the coupling of `config.sampling.direction`: `pairs(indices, finished) -> (z0, z1, label, nfe)`.

    `indices` are numbers of pairs, a range; `finished(k)` is called whenever k more are done. z0, z1: float32
    `(n, C, H, W)`, label one-hot float32 `(n, num_classes)` or None, nfe int64 `(n,)`, all on the CPU. Solved are
    `config.training.batch_size` pairs at a time. A pair is bit-identical only in the same range (rk45 drops idle slots
    at the end of it), with the same number of threads and the same instruction set.
    """
    row, eps = COUPLINGS[config.sampling.direction], config.flow.eps
    end = 1 - eps if row.velocity == "closed form" else 1.0
    sample = create_sampler(config, reverse=row.given == "image", T=end, shrink_slots=True)

    def pairs(indices, finished):
        label = points.label(indices)

        def solve(x):
            x, nfe = sample(velocity, x.to(device), None if label is None else label.to(device), indices=indices,
                            batch_size=config.training.batch_size, finished=finished)
            return x.cpu(), nfe

        if not row.velocity:
            finished(len(indices))
        z0, z1, nfe = row.pairs(points, indices, solve, eps)
        return z0, z1, label, nfe

    return pairs
