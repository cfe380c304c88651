"""The features in which images are compared: those of Inception (FID), or the pixels themselves."""

import contextlib
import dataclasses
import pathlib
import warnings
from collections.abc import Callable

import torch

from datasets.batches import pixels_to_float
from runtime.files import cached_file, file_digest
from runtime.terminal import UserError

INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_DIMENSION = 2048
INCEPTION_BATCH = 128  # images per forward pass: 1 GB of activations
LARGEST_PIXEL_DIMENSION = 4096  # above it a covariance cannot be estimated from usual numbers of samples
INCEPTION_NAMES = {"frechet": "fid", "kernel": "kid", "precision": "precision", "recall": "recall",
                   "inception": "inception_score", "inception_std": "inception_score_std"}
PIXEL_NAMES = {"frechet": "pixel_frechet_distance", "kernel": "pixel_kernel_distance",
               "precision": "pixel_precision", "recall": "pixel_recall"}


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
    """Features of uint8 images, and how metrics of them are named and described.

    features: uint8 (N, C, H, W) on the device → float32 (N, dimension). probabilities: features → class
    probabilities (N, classes); None without classes (then there is no Inception score). names: {kind of metric: its
    name in results}. protocol: description to quote beside a number. digest: of the weights file, None without one.
    """

    name: str
    dimension: int
    features: Callable
    probabilities: Callable | None
    names: dict
    protocol: str
    digest: str | None = None


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
    """Return the extractor whose features are the `dimension` = C·H·W pixels themselves; UserError for too many."""
    if dimension > LARGEST_PIXEL_DIMENSION:
        raise UserError(f"config.eval.feature_extractor pixels is for small images: {dimension} numbers an image are "
                        f"more than {LARGEST_PIXEL_DIMENSION}; use inception")
    return FeatureExtractor("pixels", dimension, pixel_features, None, PIXEL_NAMES,
                            "pixels in [-1, 1], uint8 by truncation")


def inception_extractor(path, device):
    """Return clean-fid's `legacy_tensorflow` Inception from the TorchScript file `path`, in full float32.

    The network resizes its images, of any size. Raises UserError if the file is missing or is another one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, but these weights exist in no other form
            network = torch.jit.load(str(path), map_location=device).eval()
        weights = [p.detach().float() for p in network.parameters() if p.shape[1:] == (INCEPTION_DIMENSION,)]
    except (RuntimeError, ValueError) as error:
        raise UserError(f"config.eval.inception_path: {path} is not a TorchScript file of clean-fid's Inception "
                        f"({str(error).splitlines()[0]}); get it from {INCEPTION_URL}") from None

    @torch.no_grad()
    def features(images):
        images = images.expand(-1, 3, -1, -1)
        with full_float32():
            found = [network(part.float(), return_features=True) for part in images.split(INCEPTION_BATCH)]
        return torch.cat(found).reshape(len(images), INCEPTION_DIMENSION)

    @torch.no_grad()
    def probabilities(features):
        # The last layer without its bias (`no_output_bias`), as in the usual implementation of the score, from the
        # features: images need not pass through the network twice.
        with full_float32():
            return (features @ weights[0].T).softmax(1)

    digest = file_digest(path)
    return FeatureExtractor("inception", INCEPTION_DIMENSION, features, probabilities if len(weights) == 1 else None,
                            INCEPTION_NAMES, "uint8 by truncation, clean-fid legacy_tensorflow Inception "
                            f"({pathlib.Path(path).name} {digest}) in float32", digest)


@contextlib.contextmanager
def full_float32():
    """Switch TF32 off in the `with` block: it would change features in the third digit.

    `torch.backends.cudnn.flags` would also reset its other flags, which switches cuDNN off.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
