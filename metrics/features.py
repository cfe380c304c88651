"""The features in which images are compared: those of Inception (FID), or the pixels themselves.

An extractor has `features(images)`, of uint8 (N, C, H, W) on the device, float32 (N, `dimension`), and
`probabilities(features)` of classes, (N, classes), or None without classes: then there is no Inception score. `names`
is {kind of metric: its name in results}, `protocol` a description to quote beside a number, `digest` that of the file.
"""

import contextlib
import pathlib
import warnings

import torch

from datasets.batches import pixels_to_float
from runtime.files import cached_file, file_digest
from runtime.terminal import UserError

INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_BATCH = 128  # images per forward pass: 1 GB of activations
LARGEST_PIXEL_DIMENSION = 4096  # above it a covariance cannot be estimated from usual numbers of samples
INCEPTION_NAMES = {"frechet": "fid", "kernel": "kid", "precision": "precision", "recall": "recall",
                   "inception": "inception_score", "inception_std": "inception_score_std"}
PIXEL_NAMES = {"frechet": "pixel_frechet_distance", "kernel": "pixel_kernel_distance",
               "precision": "pixel_precision", "recall": "pixel_recall"}


@contextlib.contextmanager
def full_float32():
    """Switch TF32 off in the `with` block: it would change features in the third digit."""
    # torch.backends.cudnn.flags would also reset its other flags, which switches cuDNN off.
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def pixel_features(images):
    """Return uint8 images as float32 rows (N, C·H·W) of numbers in [-1, 1]."""
    return pixels_to_float(images.flatten(1))


def create_extractor(config, device):
    """Return the extractor that config.eval.feature_extractor names, on `device`."""
    if config.eval.feature_extractor == "pixels":
        return PixelExtractor(config.data.num_channels * config.data.image_size**2)
    path = config.eval.inception_path or cached_file(INCEPTION_URL, "config.eval.inception_path")
    return InceptionExtractor(path, device)


class PixelExtractor:
    """The `dimension` = C·H·W pixels themselves, in [-1, 1]. Raises UserError for too many."""

    name, names, probabilities, digest = "pixels", PIXEL_NAMES, None, None
    protocol, features = "pixels in [-1, 1], uint8 by truncation", staticmethod(pixel_features)

    def __init__(self, dimension):
        self.dimension = dimension
        if dimension > LARGEST_PIXEL_DIMENSION:
            raise UserError(f"config.eval.feature_extractor pixels is for small images: {dimension} numbers an image "
                            f"are more than {LARGEST_PIXEL_DIMENSION}; use inception")


class InceptionExtractor:
    """clean-fid's `legacy_tensorflow` Inception from the TorchScript file `path`, in full float32.

    The network resizes its images, of any size. Raises UserError if the file is missing or is another one.
    """

    name, names, dimension = "inception", INCEPTION_NAMES, 2048

    def __init__(self, path, device):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript is deprecated, but these weights exist in no other form
                self.network = torch.jit.load(str(path), map_location=device).eval()
            last = [p.detach().float() for p in self.network.parameters() if p.shape[1:] == (self.dimension,)]
        except (RuntimeError, ValueError) as error:
            raise UserError(f"config.eval.inception_path: {path} is not a TorchScript file of clean-fid's Inception "
                            f"({str(error).splitlines()[0]}); get it from {INCEPTION_URL}") from None
        self.weight, self.digest = last[0] if last else None, file_digest(path)
        if len(last) != 1:
            self.probabilities = None
        self.protocol = ("uint8 by truncation, clean-fid legacy_tensorflow Inception "
                         f"({pathlib.Path(path).name} {self.digest}) in float32")

    @torch.no_grad()
    @full_float32()
    def features(self, images):
        """Return the features of uint8 images (N, 1 or 3, H, W)."""
        parts = images.expand(-1, 3, -1, -1).split(INCEPTION_BATCH)
        found = torch.cat([self.network(part.float(), return_features=True) for part in parts])
        return found.reshape(len(images), self.dimension)

    @torch.no_grad()
    @full_float32()
    def probabilities(self, features):
        """Return the class probabilities of features: images need not pass through the network twice.

        The last layer has no bias (`no_output_bias`), as in the usual implementation of the Inception score.
        """
        return (features @ self.weight.T).softmax(1)
