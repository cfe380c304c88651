"""Couplings: which noise z0 goes with which image z1, as the directions of generate_data.py have it.

A coupling is a function `pairs(indices, finished) -> (z0, z1, label, nfe)` of the pairs' numbers, a range:
z0, z1 float32 `(n, C, H, W)`, label one-hot float32 `(n, num_classes)` or None, nfe int64 `(n,)`, all on the CPU.
`finished(k)` is told whenever k more pairs are done. `starts` gives the starting points by number:
`starts.z0(indices)`, `starts.z1(indices)` and `starts.label(indices)`.
"""

import torch

from flows.rectified_flow import interpolate
from flows.samplers import create_sampler


def random_paired(starts):
    """Any image with any noise: the coupling that the first rectified flow learns from."""

    def pairs(indices, finished):
        finished(len(indices))
        nfe = torch.zeros(len(indices), dtype=torch.int64)
        return starts.z0(indices), starts.z1(indices), starts.label(indices), nfe

    return pairs


def noise_to_image(starts, solve):
    """z0 is given and `solve` finds z1: the reflow coupling (Liu et al. 2022, arXiv 2209.03003)."""

    def pairs(indices, finished):
        z0, label = starts.z0(indices), starts.label(indices)
        z1, nfe = solve(z0, label, indices, finished)
        return z0, z1, label, nfe

    return pairs


def image_to_noise(starts, solve, start=lambda z1, indices: z1):
    """z1 is given and `solve` finds z0, from `start(z1, indices)` near z1 back in time."""

    def pairs(indices, finished):
        z1, label = starts.z1(indices), starts.label(indices)
        z0, nfe = solve(start(z1, indices), label, indices, finished)
        return z0, z1, label, nfe

    return pairs


def create_coupling(config, velocity, starts, device):
    """Return the coupling of `config.sampling.direction`, solved `config.training.batch_size` pairs at a time.

    The rounding of a pair may depend on the others of its range (rk45 drops idle slots at the end of it), so the same
    pair is the same to the last bit only when made in the same range.
    The closed-form velocity (gt_v_…) ends at T - eps, since it is singular at T; backwards it starts there, on the
    path, at (1-eps)·z1 + eps·ξ with ξ = `starts.z0`: at z1 itself, a point between paths, z0 would come out wrong.
    """
    eps = config.flow.eps

    def solver(**options):
        sample = create_sampler(config, shrink_slots=True, **options)

        def solve(x, label, indices, finished):
            x, label = x.to(device), None if label is None else label.to(device)
            x, nfe = sample(velocity, x, label, indices=indices, batch_size=config.training.batch_size,
                            finished=finished)
            return x.cpu(), nfe

        return solve

    def on_path(z1, indices):
        return interpolate(starts.z0(indices), z1, 1 - eps)

    match config.sampling.direction:
        case "random_paired":
            return random_paired(starts)
        case "from_z0":
            return noise_to_image(starts, solver())
        case "from_z1":
            return image_to_noise(starts, solver(reverse=True))
        case "gt_v_from_z0":
            return noise_to_image(starts, solver(T=1 - eps))
        case "gt_v_from_z1":
            return image_to_noise(starts, solver(T=1 - eps, reverse=True), on_path)
