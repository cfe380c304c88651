"""Images to be measured, read in batches and decoded as for training; their statistics; and the reference's."""

import collections
import dataclasses
import functools
import pathlib

import numpy as np
import torch

from datasets.batches import check_finite, some_of
from datasets.image_files import FileTree, ImageSpec, fit_images
from datasets.pairs import open_rows
from datasets.sources import DATASETS, load_arrays, load_images
from metrics.features import create_extractor
from metrics.scores import check_gaussian, nearest_distances, neighbour_radii
from runtime.devices import gather
from runtime.files import atomic_path, cached_file, state_digest
from runtime.terminal import UserError, print_message, progress_bar

LARGEST_FLOAT = 20.0  # samples exceed [-1, 1] a little; larger values were meant for 0 to 255
LOSSY = "JPEG or WebP: distances to images that were not compressed so include the compression"
CIFAR10_URL = "https://www.cs.cmu.edu/~clean-fid/stats/cifar10_legacy_tensorflow_train_32.npz"
CIFAR10_NAME = "CIFAR-10 train (clean-fid's statistics)"
MAX_FEATURES = 50000  # features kept of one set, evenly spread: 400 MB at 2048 numbers


def quantise(images):
    """Return float images in [-1, 1] as uint8, by truncation of 255·clip((x + 1)/2, 0, 1) as in the literature."""
    return (255 * ((images + 1) / 2).clamp(0, 1)).to(torch.uint8)


class ImageSource:
    """Images that are read in batches: their path, name in results and shape (C, H, W).

    notes: {remark, such as a conversion: number of images read so far that it applies to}.
    """

    def __init__(self, path, count):
        self.path, self.name, self.count = pathlib.Path(path).absolute(), str(path), count
        self.shape, self.notes = None, collections.Counter()
        self.shape = tuple(self._load([0])[0].shape[1:])

    def __len__(self):
        return self.count

    def read(self, places):
        """Return the images at `places`, uint8 tensor (len(places), C, H, W). Raises UserError for invalid ones."""
        images, notes = self._load(places)
        self.notes.update(notes)
        return torch.from_numpy(images)


class ArrayImages(ImageSource):
    """Images of an array (N, C, H, W), uint8, or floats in [-1, 1], which are quantised; else a UserError."""

    def __init__(self, images, name, spec=None):
        floats = np.issubdtype(images.dtype, np.floating)
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not (len(images) and (floats or images.dtype == "u1")):
            raise UserError(f"{name} holds {images.dtype} of shape {images.shape}; images are (N, C, H, W) with 1 or 3 "
                            "channels, uint8, or floats in [-1, 1]")
        self.images, self.spec = images, spec or ImageSpec(None, images.shape[1])
        super().__init__(name, len(images))
        some = images[some_of(len(images), 64)]
        if floats and some.min() >= 0 and some.max() <= 1:
            print_message(f"{name}: its values lie in [{some.min():.3g}, {some.max():.3g}], but floats are read as "
                          "pixels in [-1, 1]: bring them there if they were meant for [0, 1]", stderr=True)

    def _load(self, places):
        part = np.array(self.images[np.array(places)])
        if part.dtype != np.uint8:
            part = torch.from_numpy(part.astype(np.float32))
            check_finite(part, places, f"{self.name}: sample", "make it again")
            if (most := part.abs().max()) > LARGEST_FLOAT:
                raise UserError(f"{self.name} holds values up to {most:.0f}; images as floats are in [-1, 1]")
            part = quantise(part).numpy()
        return fit_images(part, self.spec)


class FileImages(ImageSource):
    """Image files of one size in a folder or zip."""

    def __init__(self, path, spec):
        self.tree, self.spec = FileTree(path), spec
        super().__init__(path, len(self.tree.names))

    def _load(self, places):
        images, notes = [], collections.Counter()
        for name in (self.tree.names[place] for place in places):
            image, conversions = self.tree.decode(name, self.spec)
            if image.shape != (shape := self.shape or image.shape):
                raise UserError(f"{self.path} holds images of different sizes, {self.tree.names[0]} of {shape}, {name} "
                                f"of {image.shape} (C, H, W): bring them to one")
            images.append(image)
            notes.update(conversions + [LOSSY] * name.lower().endswith((".jpg", ".jpeg", ".webp")))
        return np.stack(images), notes


def open_images(path, config):
    """Return the `ImageSource` of an npy or npz (N, C, H, W) or (N, H, W, C), in [-1, 1] or uint8, a folder or a zip.

    Images are converted to config.data.num_channels, and for the extractor `pixels` to config.data.image_size, as in
    training. Raises UserError for other paths.
    """
    path, data = pathlib.Path(path), config.data
    spec = ImageSpec(data.image_size if config.eval.feature_extractor == "pixels" else None, data.num_channels,
                     DATASETS[data.dataset].resample)
    if path.is_dir() or (path.is_file() and path.suffix == ".zip"):
        return FileImages(path, spec)
    if not path.is_file() or path.suffix not in (".npy", ".npz"):  # a named pipe would never end
        raise UserError(f"{path} {'is no npy, npz, folder or zip of images' if path.exists() else 'does not exist'}")
    if path.suffix == ".npy":
        images = open_rows(path)
    else:
        arrays = load_arrays(path)
        names = [name for name in ("images", "samples", "arr_0") if name in arrays]
        if not names:
            raise UserError(f"{path} holds {', '.join(arrays) or 'nothing'}, but no array images, samples or arr_0")
        images = arrays[names[0]]
    if images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    return ArrayImages(images, path, spec)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean mu (D,) and covariance sigma (D, D), float64, of image features, and features (M, D) float32."""

    mu: torch.Tensor
    sigma: torch.Tensor
    features: torch.Tensor | None
    count: int | None  # number of images, if known
    name: str
    images: torch.Tensor | None = None  # uint8 (n, C, H, W) on the CPU: those of this process that `measure` keeps


def measure(batches, extractor, count, processes, name, max_features=MAX_FEATURES, keep=()):
    """Return the `Statistics` of `count` images, of which each process sees its `share_of`.

    `batches` yields uint8 (N, C, H, W) on the device. Each image goes through the extractor once; sums are taken in
    float64 on the device, and Σ divides by count - 1, as `np.cov`. At most `max_features` features, evenly spread
    over the images, are kept, and the images whose numbers, ascending, are in `keep`. Every process must call it; a
    UserError in one is raised in all. Raises UserError for fewer than two images.
    """
    if count < 2:
        raise UserError(f"{name}: there is {count} image to measure; a covariance needs at least two")
    first, device = share_of(processes, count).start, processes.device
    total = torch.zeros(extractor.dimension, dtype=torch.float64, device=device)
    products = torch.zeros(extractor.dimension, extractor.dimension, dtype=torch.float64, device=device)
    kept, kept_images = [torch.empty(0, extractor.dimension)], [torch.empty(0, dtype=torch.uint8)]
    error, wanted, keep = None, evenly_spread(min(max_features, count), count), np.array(keep, np.int64)
    try:
        for images in batches:
            kept_images.append(images[numbers_within(keep, first, images)].cpu())
            features = extractor.features(images)
            wide = features.double()
            total += wide.sum(0)
            products.addmm_(wide.T, wide)
            kept.append(features[numbers_within(wanted, first, features)].float().cpu())
            first += len(features)
    except UserError as caught:
        error = caught
    errors, totals, parts, features = zip(*gather((error, total.cpu(), products.cpu(), torch.cat(kept))), strict=True)
    for error in filter(None, errors):  # in every process, since the others would wait for one that stopped alone
        raise error
    mean, products = sum(totals).to(device) / count, sum(parts).to(device)
    sigma = (products - count * torch.outer(mean, mean)) / (count - 1)
    return Statistics(mean, sigma, torch.cat(features), count, name, torch.cat(kept_images))


def numbers_within(numbers, first, rows):
    """Return the places in `rows`, a tensor of the samples from number `first` on, of those with these `numbers`."""
    here = numbers[(numbers >= first) & (numbers < first + len(rows))] - first
    return torch.from_numpy(here).to(rows.device)


def measure_source(source, extractor, batch_size, processes, count=None, max_features=MAX_FEATURES, keep=()):
    """Return the `Statistics` (`measure`) of `count` images of an `ImageSource`, evenly spread (None: all of them)."""
    count = len(source) if count is None else count
    mine = share_of(processes, count)
    chosen = evenly_spread(count, len(source))[mine.start : mine.stop]
    lows = progress_bar(range(0, len(chosen), batch_size), desc=f"reading {source.name}", unit="batches",
                        enabled="auto" if processes.is_main else "false")
    batches = (source.read(chosen[low : low + batch_size]).to(processes.device) for low in lows)
    name = f"{source.name}, {'' if count == len(source) else f'{count} of '}{len(source)} images"
    found = measure(batches, extractor, count, processes, name, max_features, keep)
    for note, number in sum(gather(source.notes), collections.Counter()).items():
        processes.say(f"{source.name}: {number} images: {note}")
    return found


def evenly_spread(chosen, count):
    """Return `chosen` indices of `count`, int64, ascending and evenly spread."""
    return np.arange(chosen) * count // max(1, chosen)


def share_of(processes, count):
    """Return the range of this process's samples among `count`: each process takes a contiguous part."""
    rank, size = processes.rank, processes.world_size
    return range(rank * count // size, (rank + 1) * count // size)


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
        subset = data.train_subset if data.train_subset != "all" else config.sampling.train_subset
        if own:
            self.path, self.name = None, trained.source
        elif target_path:
            self.path, self.name = pathlib.Path(target_path), str(target_path)
        elif (data.dataset, data.image_size, data.num_channels, subset) == ("CIFAR10", 32, 3, "all"):
            self.path, self.name = cached_file(CIFAR10_URL, "--target_path"), CIFAR10_NAME
        else:
            raise UserError(f"no published statistics are known for config.data.dataset {data.dataset} (train_subset "
                            f"{subset}) at {data.num_channels}×{data.image_size}×{data.image_size}: make "
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
    def radii(self):
        """The `neighbour_radii` of the features of `statistics`, or None if precision and recall cannot be measured."""
        features = self.statistics.features
        if features is None or not self.config.eval.precision_recall:
            return None
        return neighbour_radii(features.to(self.processes.device), self.config.training.progress)

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
    """Return the `Statistics` in an npz of mu and sigma (EDM's form), perhaps with features; UserError for others."""
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
