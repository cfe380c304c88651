"""Distances between predicted and target velocities (DISTANCES), LPIPS among them, and weights over time (WEIGHTS).

All are computed in float32.
"""

import dataclasses
import functools
import math
import os
import pickle
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F

from flows.rectified_flow import per_sample
from runtime.terminal import UserError

HUBER_C = 0.00054  # c / d of the pseudo-Huber distance; arXiv 2405.20320, section 4.2
KARRAS_SIGMA_DATA = 0.5  # standard deviation of the data in EDM's weight; arXiv 2206.00364, table 1
LPIPS_SIZE = 64  # images are compared at 64×64 pixels
LPIPS_EPS = 1e-10  # added to a squared feature norm; those of natural images are above 1


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
    """Return the pseudo-Huber distance (sqrt(‖Δ‖² + c²) - c) / d of Δ = v - (z1 - z0), d = C·H·W, c = 0.00054·d: (N,).

    From arXiv 2405.20320, section 4.2, rearranged so that nothing cancels where Δ is small.
    """
    d = math.prod(v.shape[1:])
    c = HUBER_C * d
    squared = (v.float() - point.target).square().flatten(1).sum(dim=1)
    return squared / ((squared + c**2).sqrt() + c) / d


def lpips_at_start(v, point, lpips):
    """Return LPIPS(z0 + v, z1), of one step from z0 and the image: (N,)."""
    return lpips(point.z0 + v, point.z0 + point.target)


def lpips_at_end(v, point, lpips):
    """Return LPIPS(x_t + (1-α)·v, z1), of one step from x_t and the image: (N,)."""
    return lpips(point.x_t + per_sample(1 - point.alpha, v) * v, point.z0 + point.target)


def lpips_plus(distance, v, point, lpips):
    """Return LPIPS(z0 + v, z1) plus a velocity distance (`l2` or `l1`, mean over C·H·W): (N,)."""
    return lpips_at_start(v, point, lpips) + distance(v, point)


def lpips_huber(v, point, lpips):
    """Return t·Huber + LPIPS(x_t + (1-α)·v, z1): (N,) (arXiv 2405.20320, LPIPS-Huber; there t = 1 is noise)."""
    return point.t * huber(v, point) + lpips_at_end(v, point, lpips)


def lpips_huber_inverse(v, point, lpips):
    """Return t·Huber + LPIPS(x_t + (1-α)·v, z1)/(1-t): (N,) (the authors' code; arXiv 2405.20320, LPIPS-Huber-1/t)."""
    return point.t * huber(v, point) + lpips_at_end(v, point, lpips) / (1 - point.t).clamp(min=1e-3)


@dataclasses.dataclass(frozen=True)
class Distance:
    """A row of DISTANCES."""

    function: Callable  # of the predicted velocity v (N, C, H, W) and the `PathPoint` it belongs to → (N,)
    lpips: bool = False  # whether it takes `lpips(image, reference) -> (N,)`, of grey or colour images
    reduce: bool = False  # whether it takes `reduce`, set by training.reduce_mean (the others use the mean)


DISTANCES = {
    "l2": Distance(l2, reduce=True),
    "l1": Distance(l1, reduce=True),
    "lpips": Distance(lpips_at_start, lpips=True),
    "lpips+l2": Distance(functools.partial(lpips_plus, l2), lpips=True),
    "lpips+l1": Distance(functools.partial(lpips_plus, l1), lpips=True),
    "huber": Distance(huber),
    "lpips+huber": Distance(lpips_huber, lpips=True),
    "lpips/1mt+huber": Distance(lpips_huber_inverse, lpips=True),
}


def create_distance(loss_type, reduce_mean=True, device="cpu"):
    """Return the distance `distance(v, point) -> (N,)` that `training.loss_type` names, with LPIPS on `device`.

    `reduce_mean`: l2 and l1 are the mean over C·H·W, otherwise half the sum. Raises UserError as `load_lpips`.
    """
    row, arguments = DISTANCES[loss_type], {}
    if row.lpips:
        arguments["lpips"] = load_lpips(device)
    if row.reduce:
        arguments["reduce"] = mean if reduce_mean else half_sum
    return functools.partial(row.function, **arguments)


def load_lpips(device):
    """Return `lpips(image, reference) -> (N,)`, the distance `lpips_distance` with its network frozen on `device`.

    The `lpips` package has the network and its layer weights. Raises UserError if VGG16's cannot be read or downloaded.
    """
    import lpips  # here, since it takes a second and most losses do not need it
    from torchvision.models import VGG16_Weights

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the package uses a deprecated argument of torchvision
        net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)  # with random weights, which are replaced
    url = VGG16_Weights.IMAGENET1K_V1.url
    try:
        weights = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        # The package's slice2.5.bias is torchvision's features.5.bias.
        net.net.load_state_dict({name: weights["features." + name.partition(".")[2]] for name in net.net.state_dict()})
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
        raise UserError(f"LPIPS needs VGG16's weights, but {path} is damaged or cannot be downloaded "
                        f"({type(error).__name__}): put {url} there, or set the environment variable TORCH_HOME to a "
                        "folder that holds it in hub/checkpoints/") from error
    net.eval().requires_grad_(False).to(device)
    return functools.partial(lpips_distance, net)


def lpips_distance(net, image, reference):
    """Return the LPIPS distance between images, float32 (N,), with gradients for `image` only.

    `net`: `lpips.LPIPS`; `image`, `reference`: (N, 3, H, W) or grey (N, 1, H, W), in [-1, 1]. Both are resized to
    64×64; squared differences of unit-length features are weighted by the package's layers, averaged over pixels and
    summed (arXiv 1801.03924, equation 1), in float32 even under autocast. The package's own distance is not used: it
    has NaN gradients where all features of a pixel are zero, as in a constant image.
    """

    def unit_features(x):
        colour = x.float().expand(-1, 3, -1, -1)
        resized = F.interpolate(colour, (LPIPS_SIZE, LPIPS_SIZE), mode="bilinear", align_corners=True)
        return [f * torch.rsqrt(f.square().sum(dim=1, keepdim=True) + LPIPS_EPS)
                for f in net.net(net.scaling_layer(resized))]

    kind = image.device.type
    with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):  # the meta device has no autocast
        with torch.no_grad():
            targets = unit_features(reference)
        layers = zip(net.lins, unit_features(image), targets, strict=True)
        return sum(weigh((f - target).square()).mean(dim=(1, 2, 3)) for weigh, f, target in layers)


def snr(t, eps):
    """Return (t / (1 - t + eps))², the signal-to-noise ratio at the times `t` (N,)."""
    return (t / (1 - t + eps)).square()


# Weights over t: `weigh(losses, t, eps) -> weighted losses`, all (N,) but the float eps.
WEIGHTS = {
    "uniform": lambda losses, t, eps: losses,
    "snr": lambda losses, t, eps: losses * snr(t, eps),
    "snr_inv": lambda losses, t, eps: losses * (1 / snr(t, eps)),
    "snr+1": lambda losses, t, eps: losses * (snr(t, eps) + 1),
    "karras": lambda losses, t, eps: losses * (snr(t, eps) + 1 / KARRAS_SIGMA_DATA**2),
    "truncated-snr": lambda losses, t, eps: losses * snr(t, eps).clamp(min=1),
    "1mt": lambda losses, t, eps: losses * (1 - t).square(),
}
