"""Distances between predicted and target velocity, and weights over time.

A distance is a function `distance(v, point) -> (N,)` of the predicted velocity (N, C, H, W) and the `PathPoint`
it was predicted at. Both it and the weights over t (N,) compute in float32.
"""

import math

import torch.nn.functional as F

from flows.rectified_flow import per_sample
from runtime.errors import UserError

HUBER_C = 0.00054  # c / d of the pseudo-Huber distance; arXiv 2405.20320, section 4.2
KARRAS_SIGMA_DATA = 0.5  # deviation of the data in EDM's weight; arXiv 2206.00364, table 1


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


def snr(t, eps, end=1.0):
    """Return (t / (T - t + eps))², the ratio of signal to noise at `t` (N,)."""
    return (t / (end - t + eps)).square()


def create_weighting(name, eps):
    """Return the function `weigh(losses, t) -> losses`, all (N,), that `training.weight_schedule` names.

    Raises UserError for a name that is not in the table.
    """
    weights = {
        "snr": lambda t: snr(t, eps),
        "snr_inv": lambda t: 1 / snr(t, eps),
        "snr+1": lambda t: snr(t, eps) + 1,
        "karras": lambda t: snr(t, eps) + 1 / KARRAS_SIGMA_DATA**2,
        "truncated-snr": lambda t: snr(t, eps).clamp(min=1),
        "1mt": lambda t: (1 - t).square(),
    }
    if name == "uniform":
        return lambda losses, t: losses
    if name not in weights:
        raise UserError(f"config.training.weight_schedule is {name!r}: use uniform or one of {', '.join(weights)}")
    return lambda losses, t: losses * weights[name](t)


def create_distance(loss_type, reduce_mean, load_lpips):
    """Return the distance `distance(v, point) -> (N,)` that `training.loss_type` names.

    `reduce_mean`: l2 and l1 as mean over C·H·W, otherwise as half the sum (mixed forms always take the mean).
    `load_lpips`: called without arguments when the distance needs it, gives `lpips(image, image) -> (N,)`.
    Raises UserError for another name.
    """
    reduce = mean if reduce_mean else half_sum
    velocity_distances = {
        "l2": lambda v, point: l2(v, point, reduce),
        "l1": lambda v, point: l1(v, point, reduce),
        "huber": huber,
    }
    if loss_type in velocity_distances:
        return velocity_distances[loss_type]
    image_distances = {
        "lpips": lpips_of_ends,
        "lpips+l2": lambda v, point, lpips: lpips_of_ends(v, point, lpips) + l2(v, point),
        "lpips+l1": lambda v, point, lpips: lpips_of_ends(v, point, lpips) + l1(v, point),
        "lpips+huber": lpips_huber,
        "lpips/1mt+huber": lpips_huber_inverse,
    }
    if loss_type not in image_distances:
        known = ", ".join([*velocity_distances, *image_distances])
        raise UserError(f"config.training.loss_type is {loss_type!r}: use one of {known}")
    lpips = load_lpips()
    return lambda v, point: image_distances[loss_type](v, point, lpips)


def lpips_of_ends(v, point, lpips):
    """Return LPIPS(z0 + v, z1), the images that one step from the start of the path leads to: (N,)."""
    return lpips(point.z0 + v, point.z0 + point.target)


def lpips_huber(v, point, lpips):
    """Return t·Huber + LPIPS(x_t + (1-a)·v, z1): (N,) (arXiv 2405.20320, section 4.2, LPIPS-Huber).

    There t = 1 is noise, so that its 1-t is our t.
    """
    return point.t * huber(v, point) + _lpips_from_here(v, point, lpips)


def lpips_huber_inverse(v, point, lpips):
    """Return Huber + LPIPS(x_t + (1-a)·v, z1) / (1-t): (N,) (arXiv 2405.20320, section 4.2, LPIPS-Huber-1/t)."""
    return huber(v, point) + _lpips_from_here(v, point, lpips) / (1 - point.t).clamp(min=1e-3)


def _lpips_from_here(v, point, lpips):
    """Return LPIPS of the image that one step from x_t to the end of the path leads to, and of the true one."""
    left = per_sample(1 - point.a, v)
    return lpips(point.x_t + left * v, point.z0 + point.target)
