"""Rectified flow: the straight path between noise and data, and the velocity along it (arXiv 2209.03003).

Time t = 0 is noise, t = 1 is data; it lives in [eps, 1]. Shapes are (N, C, H, W) for images and (N,) for times.
"""

import dataclasses

import torch
from torch import Tensor

TIME_SCALE = 999.0  # a network is called with 999·t, as the released ones were trained


def per_sample(values, like):
    """Return `values`, float or (N,), in a shape that multiplies each sample of `like` (N, …) by its own."""
    return values.view(-1, *(1,) * (like.ndim - 1)) if isinstance(values, Tensor) else values


def interpolate(z0, z1, a):
    """Return the point at place `a` on the path, x_t = a·z1 + (1-a)·z0 (arXiv 2209.03003, equation 1).

    `z0`, `z1`: (N, …); `a`: float or (N,), in [0, 1]. Exact at both ends.
    """
    return torch.lerp(z0, z1, per_sample(a, z0))


def velocity_from_network(net):
    """Return `velocity(x, t, label=None)` of a network that is called with 999·t.

    `x` (N, C, H, W), `t` float or (N,) in [eps, 1], `label` one-hot (N, num_classes) or None → (N, C, H, W).
    """

    def velocity(x, t, label=None):
        scaled = t * TIME_SCALE if isinstance(t, Tensor) else x.new_full((len(x),), t * TIME_SCALE)
        return net(x, scaled, label)

    return velocity


@dataclasses.dataclass(frozen=True)
class PathPoint:
    """What a loss knows about each sample of a batch: where it stands on which path."""

    z0: Tensor  # start of the path, (N, C, H, W)
    x_t: Tensor  # what the network sees, (N, C, H, W)
    t: Tensor  # the time the network sees, (N,)
    a: Tensor  # place of x_t on the path, (N,): x_t + (1-a)·target is its end
    target: Tensor  # velocity of the path, z1 - z0, (N, C, H, W)


def point_on_path(z0, z1, t, a):
    """Return the `PathPoint` at place `a` (N,) of the paths from `z0` to `z1`, seen by the network at time `t` (N,)."""
    return PathPoint(z0=z0, x_t=interpolate(z0, z1, a), t=t, a=a, target=z1 - z0)
