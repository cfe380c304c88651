"""Rectified flow: the straight path between noise and data, and velocities along it (arXiv 2209.03003).

t = 0 is noise and t = 1 is data; times lie in [eps, 1]. Shapes are (N, C, H, W) for images and (N,) for times.
"""

import dataclasses
import math

import torch
from torch import Tensor

from datasets.batches import pixels_to_float

TIME_SCALE = 999.0  # networks take 999·t, as the released ones do


def per_sample(values, like):
    """Return `values`, a float or (N,), in a shape that broadcasts over the samples of `like` (N, …)."""
    return values.view(-1, *(1,) * (like.ndim - 1)) if isinstance(values, Tensor) else values


def interpolate(z0, z1, alpha):
    """Return x_t = α·z1 + (1-α)·z0, a point on the straight path (arXiv 2209.03003, equation 1).

    `z0`, `z1`: (N, …); `alpha`: float or (N,) in [0, 1]. Exact at both ends.
    """
    return torch.lerp(z0, z1, per_sample(alpha, z0))


def anneal(z0, xi, beta):
    """Return z0' = sqrt(1-β²)·z0 + β·ξ: standard normal if `z0` and `xi` are (arXiv 2407.12718, equation 9).

    `z0`, `xi`: (N, …); `beta`: float in [0, 1]. β = 0 returns `z0` itself, β = 1 returns `xi`.
    """
    return z0 if beta == 0 else math.sqrt(1 - beta**2) * z0 + beta * xi


def velocity_from_network(net):
    """Return `velocity(x, t, label=None)` of a network that takes 999·t.

    `x` (N, C, H, W), `t` (N,) in [eps, 1], `label` one-hot (N, num_classes) or None → (N, C, H, W).
    """
    return lambda x, t, label=None: net(x, t * TIME_SCALE, label)


def analytic_velocity(data, chunk=4096):
    """Return `velocity(x, t, label)` of the flow from N(0, I) to the images `data` `(M, C, H, W)`, each equally likely.

    v(x, t) = (Σ_i w_i·z1_i - x)/(1-t), w = softmax_i(-‖x - t·z1_i‖² / (2(1-t)²)): the conditional mean of z1 - z0
    at x_t = t·z1 + (1-t)·z0 (arXiv 2209.03003, equation 2, for a finite data set).

    `data` is float in [-1, 1] or uint8, on the device of x; t `(N,)` lies in [0, 1); the label is ignored. `chunk`
    images are compared with x at a time, so memory is O(N·chunk). It is computed in float64, since near t = 1 the
    exponents are differences of numbers a million times as large.
    """

    def velocity(x, t, label=None):
        flat, t = x.flatten(1).to(torch.float64), t.to(torch.float64).unsqueeze(1)
        highest = torch.full_like(t, -torch.inf)  # the running maximum of the exponents, and sums relative to it
        weight, mean = torch.zeros_like(t), torch.zeros_like(flat)
        for part in data.split(chunk):
            z1 = part.flatten(1)
            z1 = pixels_to_float(z1, torch.float64) if z1.dtype == torch.uint8 else z1.to(torch.float64)
            # ‖x - t·z1‖² without ‖x‖², which every image shares.
            exponents = t * (2 * flat @ z1.T - t * z1.square().sum(1)) / (2 * (1 - t) ** 2)
            new_highest = torch.maximum(highest, exponents.amax(1, keepdim=True))
            shrink, w = (highest - new_highest).exp(), (exponents - new_highest).exp()
            weight = weight * shrink + w.sum(1, keepdim=True)
            mean = mean * shrink + w @ z1
            highest = new_highest
        return ((mean / weight - flat) / (1 - t)).to(x.dtype).view_as(x)

    return velocity


@dataclasses.dataclass(frozen=True)
class PathPoint:
    """The points of a batch on their paths, as the loss functions take them."""

    z0: Tensor  # start of the path, (N, C, H, W)
    x_t: Tensor  # what the network sees, (N, C, H, W)
    t: Tensor  # the time the network sees, (N,)
    alpha: Tensor  # of x_t, (N,): x_t + (1-α)·target is the end of the path
    target: Tensor  # velocity of the path, z1 - z0, (N, C, H, W)


def point_on_path(z0, z1, t, alpha):
    """Return the `PathPoint` at α (N,) on the paths from `z0` to `z1`; the network sees it at the times `t` (N,)."""
    return PathPoint(z0=z0, x_t=interpolate(z0, z1, alpha), t=t, alpha=alpha, target=z1 - z0)
