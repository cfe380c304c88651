"""Distances between predicted and target velocity (`training.loss_type`), and weights over time.

Both compute in float32. DISTANCES and WEIGHTS are their tables.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch.nn.functional as F

from flows.rectified_flow import per_sample

HUBER_C = 0.00054  # c / d of the pseudo-Huber distance; arXiv 2405.20320, section 4.2
KARRAS_SIGMA_DATA = 0.5  # standard deviation of the data in EDM's weight; arXiv 2206.00364, table 1


def mean(values):
    """Return the mean of each sample, (N, C, H, W) → (N,)."""
    return values.flatten(1).mean(dim=1)


def half_sum(values):
    """Return half the sum of each sample, (N, C, H, W) → (N,)."""
    return 0.5 * values.flatten(1).sum(dim=1)


def l2(v, point, reduce=mean):
    """Return ‖v - (z1 - z0)‖², reduced over C·H·W: (N,)."""
    return reduce(F.mse_loss(v.float(), point.target, reduction="none"))


def l1(v, point, reduce=mean):
    """Return |v - (z1 - z0)|, reduced over C·H·W: (N,)."""
    return reduce(F.l1_loss(v.float(), point.target, reduction="none"))


def huber(v, point):
    """Return the pseudo-Huber distance (sqrt(‖Δ‖² + c²) - c) / d, d = C·H·W, c = 0.00054·d: (N,).

    Δ = v - (z1 - z0) (arXiv 2405.20320, section 4.2). Written without the difference of two near numbers.
    """
    d = math.prod(v.shape[1:])
    c = HUBER_C * d
    squared = (v.float() - point.target).square().flatten(1).sum(dim=1)
    return squared / ((squared + c**2).sqrt() + c) / d


def lpips_at_start(v, point, lpips):
    """Return LPIPS(z0 + v, z1), of the images that one step from the start of the path leads to: (N,)."""
    return lpips(point.z0 + v, point.z0 + point.target)


def lpips_from_here(v, point, lpips):
    """Return LPIPS(x_t + (1-α)·v, z1), of the images that one step from x_t to the end of the path leads to: (N,)."""
    return lpips(point.x_t + per_sample(1 - point.alpha, v) * v, point.z0 + point.target)


def lpips_l2(v, point, lpips):
    """Return LPIPS(z0 + v, z1) + ‖v - (z1 - z0)‖²/d: (N,)."""
    return lpips_at_start(v, point, lpips) + l2(v, point)


def lpips_l1(v, point, lpips):
    """Return LPIPS(z0 + v, z1) + |v - (z1 - z0)|/d: (N,)."""
    return lpips_at_start(v, point, lpips) + l1(v, point)


def lpips_huber(v, point, lpips):
    """Return t·Huber + LPIPS(x_t + (1-α)·v, z1): (N,) (arXiv 2405.20320, section 4.2, LPIPS-Huber).

    There t = 1 is noise, so that its 1-t is our t.
    """
    return point.t * huber(v, point) + lpips_from_here(v, point, lpips)


def lpips_huber_inverse(v, point, lpips):
    """Return t·Huber + LPIPS(x_t + (1-α)·v, z1)/(1-t): (N,) (the authors' code; arXiv 2405.20320, LPIPS-Huber-1/t)."""
    return point.t * huber(v, point) + lpips_from_here(v, point, lpips) / (1 - point.t).clamp(min=1e-3)


@dataclasses.dataclass(frozen=True)
class Distance:
    """A row of DISTANCES.

    function: `distance(v, point) -> (N,)` of the predicted velocity (N, C, H, W) and the `PathPoint` it belongs to
    lpips: whether it takes `lpips(image, image) -> (N,)`, whose weights are then loaded
    reduce: whether it takes `reduce`, chosen by training.reduce_mean (the others always take the mean)
    image_channels: whether it works on grey and colour images only
    """

    function: Callable
    lpips: bool = False
    reduce: bool = False
    image_channels: bool = False


# A new distance is a function above and a row here.
DISTANCES = {
    "l2": Distance(l2, reduce=True),
    "l1": Distance(l1, reduce=True),
    "lpips": Distance(lpips_at_start, lpips=True, image_channels=True),
    "lpips+l2": Distance(lpips_l2, lpips=True, image_channels=True),
    "lpips+l1": Distance(lpips_l1, lpips=True, image_channels=True),
    "huber": Distance(huber),
    "lpips+huber": Distance(lpips_huber, lpips=True, image_channels=True),
    "lpips/1mt+huber": Distance(lpips_huber_inverse, lpips=True, image_channels=True),
}


def create_distance(loss_type, reduce_mean, load_lpips):
    """Return the distance `distance(v, point) -> (N,)` that `training.loss_type` names.

    `reduce_mean`: l2 and l1 as mean over C·H·W, otherwise as half the sum.
    `load_lpips`: called without arguments when the distance needs it, gives `lpips(image, image) -> (N,)`.
    """
    row, arguments = DISTANCES[loss_type], {}
    if row.lpips:
        arguments["lpips"] = load_lpips()
    if row.reduce:
        arguments["reduce"] = mean if reduce_mean else half_sum
    return functools.partial(row.function, **arguments)


def snr(t, eps):
    """Return (t / (1 - t + eps))², the ratio of signal to noise at `t` (N,)."""
    return (t / (1 - t + eps)).square()


# Weights over t: `weigh(losses, t, eps) -> losses`, losses and t (N,).
WEIGHTS = {
    "uniform": lambda losses, t, eps: losses,
    "snr": lambda losses, t, eps: losses * snr(t, eps),
    "snr_inv": lambda losses, t, eps: losses * (1 / snr(t, eps)),
    "snr+1": lambda losses, t, eps: losses * (snr(t, eps) + 1),
    "karras": lambda losses, t, eps: losses * (snr(t, eps) + 1 / KARRAS_SIGMA_DATA**2),
    "truncated-snr": lambda losses, t, eps: losses * snr(t, eps).clamp(min=1),
    "1mt": lambda losses, t, eps: losses * (1 - t).square(),
}
