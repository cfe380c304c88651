"""LPIPS, the learned perceptual distance of images, on VGG16's features (arXiv 1801.03924).

Network and weights are those of the `lpips` package; the arithmetic around them is ours, because the package's has
NaN gradients where all features of a pixel are zero (the root of a zero sum), as a constant image can have them.
"""

import contextlib
import os
import pickle

import torch
import torch.nn.functional as F

from runtime.errors import UserError

SIDE = 64  # images are compared at 64×64 pixels
SMALLEST_SQUARE = 1e-10  # added to a squared feature norm; those of natural images are above 1


def load_lpips(device):
    """Return `lpips(image, reference) -> (N,)`, the distance `lpips_distance` with its network frozen on `device`.

    VGG16's weights come by torchvision's cache, downloaded when absent. Raises UserError where that fails.
    """
    import lpips  # here, since it takes a second and most objectives do without

    with torch.random.fork_rng(devices=[]):  # the package first draws weights, which are replaced below
        net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    _load_vgg16(net.net)
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


def _load_vgg16(trunk):
    """Fill the package's `trunk` with torchvision's VGG16 weights: features.5.bias is its slice2.5.bias."""
    from torchvision.models import VGG16_Weights

    url = VGG16_Weights.IMAGENET1K_V1.url
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    try:
        weights = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        trunk.load_state_dict({name: weights["features." + name.partition(".")[2]] for name in trunk.state_dict()})
    except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged or holds no VGG16 weights: remove it, so that {url} is downloaded again, "
                        "or put that file there") from error
    except OSError as error:
        raise UserError(f"LPIPS needs VGG16's weights and cannot download them ({error}): put {url} at {path}, or set "
                        "the environment variable TORCH_HOME to a folder that holds it in hub/checkpoints/"
                        ) from error
