"""What samples are compared with: statistics of real images, from a file or measured here."""

import pathlib
import zipfile

import numpy as np
import torch

from metrics.downloads import cached_file
from metrics.features import check_shape
from metrics.gather import share_of
from metrics.image_files import array_source, open_images
from metrics.statistics import MAX_FEATURES, Statistics, measure
from runtime.errors import UserError
from runtime.files import atomic_path
from runtime.progress import progress_bar

CIFAR10_URL = "https://www.cs.cmu.edu/~clean-fid/stats/cifar10_legacy_tensorflow_train_32.npz"
CIFAR10_NAME = "CIFAR-10 train (clean-fid's statistics)"


def load_reference(target_path, config, extractor, processes, image_set=None):
    """Return the `Statistics` that samples of `config` are compared with.

    `target_path`: an npz of statistics, or images as npy, npz, folder or zip. When it is empty: for `pixels` the
    training images `image_set`, for `inception` clean-fid's statistics of CIFAR-10's training images.
    """
    if target_path and _is_statistics(pathlib.Path(target_path)):
        return read_statistics(target_path, extractor)
    if target_path:
        source = open_images(target_path, config.data.num_channels)
    elif extractor.name == "pixels":
        source = array_source(image_set.images, image_set.source)
    elif config.data.dataset == "CIFAR10" and config.data.image_size == 32:
        return read_statistics(cached_file(CIFAR10_URL, "--target_path"), extractor, CIFAR10_NAME)
    else:
        raise UserError(
            f"no published statistics are known for config.data.dataset {config.data.dataset} at "
            f"{config.data.image_size}×{config.data.image_size}: name some with --target_path (make them with "
            "python -m tools.reference_statistics)"
        )
    return measure_source(source, extractor, config.eval.batch_size, processes)


def _is_statistics(path):
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return bool({"mu", "sigma"} & set(arrays.files))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an npz: {error}") from None


def read_statistics(path, extractor, name=""):
    """Return the `Statistics` in an npz with `mu` and `sigma` (EDM's form) and perhaps our `features`.

    Raises UserError if the file has other arrays, or another dimension or extractor than `extractor`.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an npz of statistics: {error}") from None
    if not {"mu", "sigma"} <= found.keys():
        raise UserError(f"{path} holds {', '.join(found)}; statistics are the arrays mu and sigma")
    mu, sigma, features = found["mu"], found["sigma"], found.get("features")
    maker = str(found.get("extractor", ""))  # only our own files name it
    shape = (extractor.dimension,)
    if maker not in ("", extractor.name) or mu.shape != shape or sigma.shape != shape * 2:
        raise UserError(
            f"{path} holds statistics of {'×'.join(map(str, mu.shape))} numbers{maker and f' by {maker}'}, but "
            f"config.eval.feature_extractor {extractor.name} gives {extractor.dimension}: name statistics that belong"
        )
    count = int(found["count"]) if "count" in found else None
    return Statistics(
        torch.from_numpy(mu.astype(np.float64)), torch.from_numpy(sigma.astype(np.float64)),
        None if features is None else torch.from_numpy(features.astype(np.float32)), count, name or str(path),
    )


def write_statistics(path, statistics, extractor):
    """Write `statistics` as an npz: mu, sigma (EDM's form), features, count, and which extractor made them."""
    arrays = {"mu": statistics.mu, "sigma": statistics.sigma, "features": statistics.features}
    arrays = {name: value.cpu().numpy() for name, value in arrays.items()}
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays, count=statistics.count, extractor=extractor.name, source=statistics.name)


def measure_source(source, extractor, batch_size, processes, max_features=MAX_FEATURES):
    """Return the `Statistics` of all images of an `ImageSource`, split over the processes."""
    check_shape(source, extractor)
    first, last = share_of(processes.rank, processes.world_size, len(source))
    name = f"{source.name}, {len(source)} images"
    batches = read_batches(source, first, last, batch_size, processes, f"reference {source.name}")
    return measure(batches, extractor, first, len(source), processes.device, name, max_features=max_features)


def read_batches(source, first, last, batch_size, processes, title):
    """Yield images first ≤ i < last of an `ImageSource`, uint8 on the device, `batch_size` at a time."""
    with progress_bar(total=last - first, desc=title, unit="images",
                      enabled="auto" if processes.is_main else "false") as bar:
        for low in range(first, last, batch_size):
            images = source.read(low, min(low + batch_size, last)).to(processes.device)
            yield images
            bar.update(len(images))
