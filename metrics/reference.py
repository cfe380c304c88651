"""What samples are compared with: statistics of real images, from a file or measured here, and the training images."""

import functools
import pathlib

import numpy as np
import torch

from datasets import load_images
from datasets.sources import load_arrays
from metrics.features import create_extractor
from metrics.scores import check_gaussian, nearest_distances
from metrics.statistics import ArrayImages, Statistics, evenly_spread, measure_source, open_images
from runtime.files import atomic_path, cached_file, state_digest
from runtime.terminal import UserError

CIFAR10_URL = "https://www.cs.cmu.edu/~clean-fid/stats/cifar10_legacy_tensorflow_train_32.npz"
CIFAR10_NAME = "CIFAR-10 train (clean-fid's statistics)"


class Reference:
    """What samples are compared with. `identity` is available at once; the rest is computed at the first access.

    `statistics` is collective: every process must access it at the same point. Raises UserError for missing files.
    """

    def __init__(self, config, target_path, processes):
        self.config, self.processes, self.training_images = config, processes, None
        self.extractor = create_extractor(config, processes.device)
        own = self.extractor.name == "pixels" and not target_path
        try:
            if own or config.eval.nearest:
                self.training_images = load_images(config)
        except UserError as error:
            if own:
                raise
            processes.say(f"no distance to the nearest training image: {error}")
        data, trained = config.data, self.training_images
        if own:
            self.path, self.name = None, trained.source
        elif target_path:
            self.path, self.name = pathlib.Path(target_path), str(target_path)
        elif (data.dataset, data.image_size, data.num_channels, data.train_subset) == ("CIFAR10", 32, 3, "all"):
            self.path, self.name = cached_file(CIFAR10_URL, "--target_path"), CIFAR10_NAME
        else:
            raise UserError(f"no published statistics are known for config.data.dataset {data.dataset} (train_subset "
                            f"{data.train_subset}) at {data.num_channels}×{data.image_size}×{data.image_size}: make "
                            "them with python -m tools.reference_statistics and name the file with --target_path")
        if not (own or self.path.is_file() or self.path.is_dir()):
            raise UserError(f"--target_path {target_path} is neither a file nor a folder")
        self.identity = {
            "features": self.extractor.name, "extractor_digest": self.extractor.digest, "target": self.name,
            "target_state": None if own else state_digest(self.path),
            "training_images": trained and [trained.source, list(trained.images.shape),
                                            pathlib.Path(trained.cache or "").name],
            "dataset": data.dataset, "image_shape": [data.num_channels, data.image_size, data.image_size],
            "nearest": config.eval.nearest, "precision_recall": config.eval.precision_recall,
        }

    @functools.cached_property
    def source(self):
        """The `ImageSource` of the reference's images, or None if the reference is a file of statistics."""
        if self.path is None:
            return ArrayImages(self.training_images.images, self.training_images.source)
        statistics = self.path.suffix == ".npz" and {"mu", "sigma"} & load_arrays(self.path).keys()
        return None if statistics else open_images(self.path, self.config)

    @functools.cached_property
    def statistics(self):
        """The `Statistics` of the reference."""
        if self.source is None:
            return read_statistics(self.path, self.extractor, self.name)
        return measure_source(self.source, self.extractor, self.config.eval.batch_size, self.processes)

    @functools.cached_property
    def nn_distance_real(self):
        """The median distance of config.eval.nearest training images to the nearest other one, or None."""
        count = min(self.config.eval.nearest, len(self.training_images or ()))
        if not count:
            return None
        images, device = self.training_images.images, self.processes.device
        places = evenly_spread(count, len(images))
        queries, own = (torch.from_numpy(array).to(device) for array in (np.array(images[places]), places))
        return nearest_distances(queries, images, own, progress=self.config.training.progress).median().item()


def read_statistics(path, extractor, name=""):
    """Return the `Statistics` in an npz with `mu` and `sigma` (EDM's form) and perhaps our `features`.

    Raises UserError for other arrays, invalid values, or features of another extractor or dimension.
    """
    found = load_arrays(pathlib.Path(path))
    arrays = [found.get("mu"), found.get("sigma"), found.get("features", np.zeros((0, extractor.dimension)))]
    if not all(isinstance(array, np.ndarray) and array.dtype.kind in "fiu" for array in arrays):
        raise UserError(f"{path} holds {', '.join(found)}; statistics are the arrays mu and sigma, of real numbers")
    mu, sigma = (torch.from_numpy(array.astype(np.float64)) for array in arrays[:2])
    features = torch.from_numpy(arrays[2].astype(np.float32))
    check_gaussian(mu, sigma, path)
    recorded = str(found.get("extractor", ""))  # in our own files only
    if recorded not in ("", extractor.name) or len(mu) != extractor.dimension:
        raise UserError(f"{path} holds statistics of {len(mu)} features{recorded and f' of {recorded}'}, but "
                        f"config.eval.feature_extractor {extractor.name} has {extractor.dimension}: name another file")
    if features.shape[1:] != mu.shape or not features.isfinite().all():
        raise UserError(f"{path}: features, of shape {tuple(features.shape)}, must be (M, {len(mu)}) finite numbers")
    return Statistics(mu, sigma, features if len(features) > 1 else None, None, name or str(path))


def write_statistics(path, statistics, extractor):
    """Write `statistics` as an npz: mu, sigma (EDM's form), features, count, and the name of the extractor."""
    arrays = {name: getattr(statistics, name).cpu().numpy() for name in ("mu", "sigma", "features")}
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays, count=statistics.count, extractor=extractor.name, source=statistics.name)
