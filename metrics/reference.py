"""What samples are compared with: statistics of real images, from a file or measured here, and the training images."""

import functools
import pathlib

import numpy as np
import torch

from datasets import load_images
from metrics.features import create_extractor
from metrics.image_files import ArrayImages, open_images
from metrics.scores import check_gaussian, kept_radii, leave_one_out_distances
from metrics.statistics import Statistics, evenly_spread, measure_source
from runtime.downloads import cached_file
from runtime.errors import UserError
from runtime.files import atomic_path, state_digest

CIFAR10_URL = "https://www.cs.cmu.edu/~clean-fid/stats/cifar10_legacy_tensorflow_train_32.npz"
CIFAR10_NAME = "CIFAR-10 train (clean-fid's statistics)"


class Reference:
    """What samples are compared with. `identity` is known at once; the rest is measured when first asked for.

    Every process must ask for `statistics` at the same place of the program.
    """

    def __init__(self, config, target_path, processes):
        """Take what config.eval, config.data and --target_path ask for; UserError where nothing is there."""
        self.config, self.processes = config, processes
        self.extractor = create_extractor(config, processes.device)
        pixels = self.extractor.name == "pixels" and not target_path
        self.training_images = self._training_images(needed=pixels)
        path = target_path or (None if pixels else published_statistics(config))
        if path and not pathlib.Path(path).exists():
            raise UserError(f"--target_path {path} does not exist")
        self.path = path and pathlib.Path(path)
        self.name = (str(target_path) or CIFAR10_NAME) if path else self.training_images.source
        data, trained = config.data, self.training_images
        trained = trained and [trained.source, list(trained.images.shape), pathlib.Path(trained.cache or "").name]
        self.identity = {
            "features": self.extractor.name, "extractor_digest": self.extractor.digest, "target": self.name,
            "target_state": state_digest(self.path) if path else None, "training_images": trained,
            "dataset": data.dataset, "image_shape": [data.num_channels, data.image_size, data.image_size],
            "nearest": config.eval.nearest, "precision_recall": config.eval.precision_recall,
        }

    def _training_images(self, needed):
        """Return the `ImageSet` of config.data, or None where it is not there and only its nearest images are lost."""
        if not (needed or self.config.eval.nearest):
            return None
        try:
            return load_images(self.config)
        except UserError as error:
            if needed:
                raise
            self.processes.say(f"no distance to the nearest training image: {error}")
            return None

    @functools.cached_property
    def source(self):
        """The `ImageSource` of the reference's images, or None where the reference is a file of statistics."""
        if self.path is None:
            return ArrayImages(self.training_images.images, self.training_images.source)
        statistics = self.path.suffix == ".npz" and not self.path.is_dir() and read_npz(self.path, ["mu", "sigma"])
        return None if statistics else open_images(self.path, self.config)

    @functools.cached_property
    def statistics(self):
        """The `Statistics` of the reference."""
        if self.source is None:
            return read_statistics(self.path, self.extractor, self.name)
        return measure_source(self.source, self.extractor, self.config.eval.batch_size, self.processes)

    def check_samples(self, samples):
        """Say where an `ImageSource` of samples has another size."""
        if self.source is not None and samples.shape[1:] != self.source.shape[1:]:
            ours, theirs = ("×".join(map(str, source.shape[1:])) for source in (samples, self.source))
            self.processes.say(f"{samples.name}: its images are {ours}, those they are compared with {theirs}: "
                               "Inception resizes both, and the distance measures that, too")

    @functools.cached_property
    def radii(self):
        """The radii that precision and recall need, or None without features or where config.eval leaves them out."""
        features = self.statistics.features
        if features is None or not self.config.eval.precision_recall:
            return None
        return kept_radii(features.to(self.processes.device), self.config.data.cache_dir, self.config.training.progress)

    @functools.cached_property
    def nn_distance_real(self):
        """The median distance of config.eval.nearest training images to the nearest other one, or None."""
        images, count = self.training_images, self.config.eval.nearest
        if images is None or not count:
            return None
        places = evenly_spread(min(count, len(images)), len(images))
        return leave_one_out_distances(images.images, places, self.processes.device,
                                       self.config.training.progress).median().item()


def published_statistics(config):
    """Return the path of the statistics that are published for config.data; raise UserError where none are."""
    data = config.data
    if data.dataset == "CIFAR10" and (data.image_size, data.num_channels) == (32, 3):
        return cached_file(CIFAR10_URL, "--target_path")
    raise UserError(f"no published statistics are known for config.data.dataset {data.dataset} at "
                    f"{data.image_size}×{data.image_size}: name some with --target_path (make them with "
                    "python -m tools.reference_statistics)")


def read_npz(path, names=None):
    """Return {name: array} of an npz, of the arrays `names` (None: all).

    Raises UserError, naming the file, for one that is damaged or no npz.
    """
    if not pathlib.Path(path).is_file():  # opening a named pipe would wait for ever
        raise UserError(f"{path} is not a file")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in (arrays.files if names is None else names) if name in arrays.files}
    except Exception as error:  # numpy, zipfile and zlib raise many kinds for damaged files
        raise UserError(f"{path} cannot be read as an npz ({error}): make it again") from None


def read_statistics(path, extractor, name=""):
    """Return the `Statistics` in an npz with `mu` and `sigma` (EDM's form) and perhaps our `features`.

    Raises UserError if the file has other arrays, other values than a mean, a covariance and features have, or
    another dimension or extractor than `extractor`.
    """
    found = read_npz(path)
    if not {"mu", "sigma"} <= found.keys():
        raise UserError(f"{path} holds {', '.join(found)}; statistics are the arrays mu and sigma")
    numbers = {key: found[key] for key in ("mu", "sigma", "features") if key in found}
    for key, array in numbers.items():
        if array.dtype.kind not in "fiu":
            raise UserError(f"{path}: {key} holds {array.dtype}, not real numbers")
    mu, sigma = (torch.from_numpy(numbers[key].astype(np.float64)) for key in ("mu", "sigma"))
    check_gaussian(mu, sigma, path)
    maker = str(found.get("extractor", ""))  # only our own files name it
    if maker not in ("", extractor.name) or len(mu) != extractor.dimension:
        raise UserError(
            f"{path} holds statistics of {len(mu)} numbers{maker and f' by {maker}'}, but "
            f"config.eval.feature_extractor {extractor.name} gives {extractor.dimension}: name statistics that belong"
        )
    features = None
    if "features" in numbers:
        features = torch.from_numpy(numbers["features"].astype(np.float32))
        if features.ndim != 2 or features.shape[1] != len(mu) or not features.isfinite().all():
            raise UserError(f"{path}: features has shape {tuple(features.shape)} or holds NaN or infinite numbers; it "
                            f"must be (M, {len(mu)}), finite")
    count = found.get("count")
    if count is not None and (count.shape != () or count.dtype.kind not in "iu" or count < 2):
        raise UserError(f"{path}: count is {count}; it must be the number of images, at least 2")
    return Statistics(mu, sigma, features if features is not None and len(features) > 1 else None,
                      count if count is None else int(count), name or str(path))


def write_statistics(path, statistics, extractor):
    """Write `statistics` as an npz: mu, sigma (EDM's form), features, count, and which extractor made them."""
    arrays = {"mu": statistics.mu, "sigma": statistics.sigma, "features": statistics.features}
    arrays = {name: value.cpu().numpy() for name, value in arrays.items()}
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays, count=statistics.count, extractor=extractor.name, source=statistics.name)
