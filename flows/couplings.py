"""Couplings: which noise z0 goes with which image z1, as the directions of generate_data.py have it (COUPLINGS).

`points` gives the initial points of pairs by number: `points.z0(indices)`, `points.z1(indices)`,
`points.label(indices)`. `solve(x, label)` integrates x, and returns where it ends and its evaluations.
"""

import dataclasses
from collections.abc import Callable

import torch

from flows.rectified_flow import interpolate
from flows.samplers import create_sampler


def random_paired(points, indices, solve, eps):
    """Any image with any noise: the coupling that the first rectified flow learns from."""
    return points.z0(indices), points.z1(indices), points.label(indices), torch.zeros(len(indices), dtype=torch.int64)


def noise_to_image(points, indices, solve, eps):
    """z0 is given, and z1 is where it flows to: the reflow coupling (Liu et al. 2022, arXiv 2209.03003)."""
    z0, label = points.z0(indices), points.label(indices)
    z1, nfe = solve(z0, label)
    return z0, z1, label, nfe


def image_to_noise(points, indices, solve, eps):
    """z1 is given, and z0 is where it flows to back in time."""
    z1, label = points.z1(indices), points.label(indices)
    z0, nfe = solve(z1, label)
    return z0, z1, label, nfe


def near_image_to_noise(points, indices, solve, eps):
    """As `image_to_noise`, from (1-eps)·z1 + eps·ξ with ξ = `points.z0`.

    For the closed-form velocity, which is singular at t = 1: z1 itself lies between paths, and gives a wrong z0.
    """
    z1, label = points.z1(indices), points.label(indices)
    z0, nfe = solve(interpolate(points.z0(indices), z1, 1 - eps), label)
    return z0, z1, label, nfe


@dataclasses.dataclass(frozen=True)
class Coupling:
    """A row of COUPLINGS.

    pairs: `pairs(points, indices, solve, eps) -> (z0, z1, label, nfe)`
    given: what its initial points are: "noise", "image" or "both"; from images it runs in reverse
    velocity: what it integrates: "network", "closed form" (which ends at T - eps) or "" (nothing)
    """

    pairs: Callable
    given: str
    velocity: str = ""


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
    `config.training.batch_size` pairs at a time. The rounding of a pair may depend on the others of its range (rk45
    drops idle slots at the end of it): it is the same to the last bit only when made in the same range, with the same
    number of threads and the same instruction set.
    """
    row, eps = COUPLINGS[config.sampling.direction], config.flow.eps
    if row.velocity:
        end = 1 - eps if row.velocity == "closed form" else 1.0
        sample = create_sampler(config, reverse=row.given == "image", T=end, shrink_slots=True)

    def pairs(indices, finished):
        def solve(x, label):
            x, nfe = sample(velocity, x.to(device), None if label is None else label.to(device), indices=indices,
                            batch_size=config.training.batch_size, finished=finished)
            return x.cpu(), nfe

        if not row.velocity:
            finished(len(indices))
        return row.pairs(points, indices, solve, eps)

    return pairs
