"""LPIPS, the learned perceptual distance of images, on VGG16's features (arXiv 1801.03924).

Network and weights are those of the `lpips` package; the arithmetic around them is ours, because the package's has
NaN gradients where the squared features of a pixel add up to zero (the root of zero), as in a constant image.
"""

import contextlib
import os
import pickle
import warnings

import torch
import torch.nn.functional as F

from runtime.errors import UserError

SIDE = 64  # images are compared at 64×64 pixels
SMALLEST_SQUARE = 1e-10  # added to a squared feature norm; those of natural images are above 1
LAST_LAYER = "features.28.weight"  # of VGG16, which smaller networks lack


def load_lpips(device):
    """Return `lpips(image, reference) -> (N,)`, the distance `lpips_distance` with its network frozen on `device`.

    VGG16's weights come by torchvision's cache, downloaded when absent. Raises UserError where that fails.
    """
    import lpips  # here, since it takes a second and most objectives do without

    weights = _read_vgg16()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the package calls torchvision by an older keyword
        net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)  # draws weights, replaced by the next line
    net.net.load_state_dict({name: weights[_vgg16_name(name)] for name in net.net.state_dict()})
    net.eval().requires_grad_(False).to(device)
    return lambda image, reference: lpips_distance(net, image, reference)


def lpips_distance(net, image, reference):
    """Return the LPIPS distance between images, float32 (N,), with gradient to `image` alone.

    `net`: `lpips.LPIPS`; `image`, `reference`: (N, 3, H, W) or grey (N, 1, H, W), in [-1, 1]. Both are resized to
    64×64; differences of unit features are weighed by the package's layers, averaged over pixels, and added
    (arXiv 1801.03924, equation 1). In float32 under autocast, too.
    """
    with _without_autocast(image.device.type):
        with torch.no_grad():
            wanted = _unit_features(net, reference.float())
        found = _unit_features(net, image.float())
        layers = zip(net.lins, found, wanted, strict=True)
        return sum(weigh((f - w).square()).mean(dim=(1, 2, 3)) for weigh, f, w in layers)


def _unit_features(net, image):
    """Return the features of each layer, scaled to norm 1 over the channels of each pixel."""
    colour = image.expand(-1, 3, -1, -1)
    resized = F.interpolate(colour, (SIDE, SIDE), mode="bilinear", align_corners=True)
    return [f * torch.rsqrt(f.square().sum(dim=1, keepdim=True) + SMALLEST_SQUARE)
            for f in net.net(net.scaling_layer(resized))]


def _without_autocast(device_type):
    """Return a context without autocast, also for devices that have none (meta)."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _vgg16_name(name):
    """Return torchvision's name of the package's tensor `name`: its slice2.5.bias is features.5.bias."""
    return "features." + name.partition(".")[2]


def _read_vgg16():
    """Return the state dict of torchvision's VGG16 from its cache, downloaded there when absent."""
    from torchvision.models import VGG16_Weights

    url = VGG16_Weights.IMAGENET1K_V1.url
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    try:
        weights = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        if LAST_LAYER not in weights:
            raise RuntimeError(f"there is no {LAST_LAYER} in it")
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged or holds no VGG16 weights: remove it, so that {url} is downloaded again, "
                        "or put that file there") from error
    except OSError as error:
        raise UserError(f"LPIPS needs VGG16's weights and cannot download them ({error}): put {url} at {path}, or set "
                        "the environment variable TORCH_HOME to a folder that holds it in hub/checkpoints/"
                        ) from error
    return weights
