"""What images are turned into before they are compared: Inception features (FID), or their own pixels."""

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
INCEPTION_BATCH = 128  # images that go through it at a time: 1 GB of activations
LARGEST_PIXEL_DIMENSION = 4096  # beyond it the covariance has more entries than samples can estimate
INCEPTION_NAMES = {"frechet": "fid", "kernel": "kid", "precision": "precision", "recall": "recall",
                   "inception": "inception_score", "inception_std": "inception_score_std"}
PIXEL_NAMES = {"frechet": "pixel_frechet_distance", "kernel": "pixel_kernel_distance",
               "precision": "pixel_precision", "recall": "pixel_recall"}


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

    The network resizes images of any size itself. Raises UserError if the file is missing or is no such TorchScript.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would rather have torch.export's files; there is none of this one
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
        # The last layer without its bias (`no_output_bias`), as the score's usual implementation: so the images need
        # not go through the network twice.
        with full_float32():
            return (features @ weights[0].T).softmax(1)

    digest = file_digest(path)
    return FeatureExtractor("inception", INCEPTION_DIMENSION, features, probabilities if len(weights) == 1 else None,
                            INCEPTION_NAMES, "uint8 by truncation, clean-fid legacy_tensorflow Inception "
                            f"({pathlib.Path(path).name} {digest}) in float32", digest)


@contextlib.contextmanager
def full_float32():
    """Switch TF32 off inside: with it, features differ in the third digit from those of the literature.

    `torch.backends.cudnn.flags` would set its other flags to their defaults, too, and with them cuDNN itself off.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
