"""What images are turned into before they are compared: Inception features (FID), or their own pixels."""

import contextlib
import dataclasses
import pathlib
import warnings
from collections.abc import Callable

import torch

from datasets.batches import pixels_to_float
from runtime.downloads import cached_file
from runtime.errors import UserError
from runtime.files import file_digest

INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_DIMENSION = 2048
INCEPTION_BATCH = 128  # images that go through it at a time: 1 GB of activations
LARGEST_PIXEL_DIMENSION = 4096  # beyond it the covariance has more entries than samples can estimate


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
    """One way of turning uint8 images into numbers that are compared.

    features: uint8 (N, C, H, W) on the device → float32 (N, dimension). probabilities: features → class
    probabilities (N, classes), or None where there are no classes (then there is no Inception score).
    names: of the metrics in results, by what they are. protocol: what a reader must know beside the number.
    digest: of the file with its weights, None where there are none.
    """

    name: str
    dimension: int
    features: Callable
    probabilities: Callable | None
    names: dict
    protocol: str
    digest: str | None = None


INCEPTION_NAMES = {"frechet": "fid", "kernel": "kid", "precision": "precision", "recall": "recall",
                   "inception": "inception_score", "inception_std": "inception_score_std"}
PIXEL_NAMES = {"frechet": "pixel_frechet_distance", "kernel": "pixel_kernel_distance",
               "precision": "pixel_precision", "recall": "pixel_recall"}


def check_finite(images, numbers, name, advice):
    """Raise UserError if any of `images` (N, …) has NaN or infinite pixels, naming the first by its `numbers` entry."""
    bad = (~images.flatten(1).isfinite().all(1)).nonzero()
    if len(bad):
        raise UserError(f"{name}: sample {numbers[bad[0].item()]} holds NaN or infinite pixels; {advice}")


def quantise(images):
    """Return float images in [-1, 1] as uint8, by truncation of 255·clip((x + 1)/2, 0, 1) as in the literature."""
    return (255 * ((images + 1) / 2).clamp(0, 1)).to(torch.uint8)


def pixel_features(images):
    """Return uint8 images as float32 rows (N, C·H·W) of numbers in [-1, 1]."""
    return pixels_to_float(images.flatten(1))


def create_extractor(config, device):
    """Return the `FeatureExtractor` that config.eval.feature_extractor names, on `device`."""
    if config.eval.feature_extractor == "pixels":
        return pixel_extractor(config.data.num_channels * config.data.image_size**2)
    path = config.eval.inception_path or cached_file(INCEPTION_URL, "config.eval.inception_path")
    return inception_extractor(path, device)


def pixel_extractor(dimension):
    """Return the extractor whose features are the `dimension` = C·H·W pixels themselves."""
    if dimension > LARGEST_PIXEL_DIMENSION:
        raise UserError(
            f"config.eval.feature_extractor pixels is for small images: {dimension} numbers an image are more than "
            f"{LARGEST_PIXEL_DIMENSION}; use inception"
        )
    return FeatureExtractor("pixels", dimension, pixel_features, None, PIXEL_NAMES,
                            "pixels in [-1, 1], uint8 by truncation")


def inception_extractor(path, device):
    """Return clean-fid's `legacy_tensorflow` Inception from the TorchScript file `path`.

    The network resizes images of any size itself. Features and probabilities are computed in full float32.
    Raises UserError if the file is missing or is no such TorchScript.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"config.eval.inception_path: {path} does not exist; it is clean-fid's file, to be had from "
                        f"{INCEPTION_URL}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would rather have torch.export's files; there is none of this one
            network = torch.jit.load(str(path), map_location=device).eval()
        classifier = _classifier_weight(network)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is not a TorchScript file of clean-fid's Inception ({str(error).splitlines()[0]}); "
                        f"get it again from {INCEPTION_URL}") from None

    @torch.no_grad()
    def features(images):
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        with full_float32():
            found = [network(part.float(), return_features=True) for part in images.split(INCEPTION_BATCH)]
        return torch.cat(found).reshape(len(images), INCEPTION_DIMENSION)

    @torch.no_grad()
    def probabilities(features):
        with full_float32():
            return (features @ classifier.T).softmax(1)

    digest = file_digest(path)
    return FeatureExtractor(
        "inception", INCEPTION_DIMENSION, features, probabilities if classifier is not None else None,
        INCEPTION_NAMES, "uint8 by truncation, clean-fid legacy_tensorflow Inception "
        f"({path.name} {digest}) in float32", digest,
    )


def _classifier_weight(network):
    """Return the weight (classes, 2048) of the last layer, which the Inception score needs, or None.

    The score's usual implementation leaves the bias out (`no_output_bias`); then the probabilities are the
    softmax of features times this weight, and the images need not go through the network twice.
    """
    found = [p for p in network.parameters() if p.ndim == 2 and p.shape[1] == INCEPTION_DIMENSION]
    return found[0].detach().float() if len(found) == 1 else None


@contextlib.contextmanager
def full_float32():
    """Switch TF32 off inside: with it, features differ in the third digit from those of the literature.

    `torch.backends.cudnn.flags` would set its other flags to their defaults, too, and with them cuDNN itself off.
    """
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
