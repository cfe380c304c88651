"""Image data sets, from their files to one uint8 array `(N, C, H, W)`: `DATASETS` has a row for each data.dataset.

The function `open(root, spec)` of a row takes the path of the files and the `ImageSpec` that images are converted to.
It returns an `ImageSet` (`array_set` makes one from arrays), or a `Source`, which is decoded once into data.cache_dir.
The choices of the config, `--help`, checks and messages are derived from the row.
"""

import collections
import concurrent.futures
import functools
import gzip
import os
import pathlib
import pickle
import re
import tempfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from datasets.batches import check_labels
from datasets.cache import ImageSet, Source, open_cached
from datasets.image_files import LABEL_FILE, FileTree, ImageSpec, find_labels, fit_images, identify, read_file
from runtime import seeds
from runtime.files import file_lock
from runtime.terminal import UserError

FILES_AT_ONCE = 256  # image files decoded at a time, by all threads
SPLITS = {"train", "val", "valid", "validation", "test"}
RELEASED_NAMES = {"plane": "airplane", "car": "automobile"}  # of CIFAR-10's classes, in the released code
SUBSET_SEED = 0  # random_N are the same images for every config.seed


class DataSet(NamedTuple):
    """A row of `DATASETS`.

    open: `open(root, spec)`, see above. channels: of its images, None for any. mirror: whether mirrored images belong
    to it (data.random_flip is on by default). resample: filter for resizing. files: what data.data_root must hold.
    """

    open: Callable[[pathlib.Path, ImageSpec], ImageSet | Source]
    channels: int | None = 3
    mirror: bool = True
    resample: str = "lanczos"
    files: str = ""


def load_images(config):
    """Return the `ImageSet` of `config.data`; UserError for an unusable source or labels that do not fit the config."""
    data, row = config.data, DATASETS[config.data.dataset]
    if data.num_channels not in (1, 3):
        raise UserError(f"data.num_channels {data.num_channels}: images have 1 (grey) or 3 (colour) channels")
    name, older = data.train_subset, config.sampling.train_subset
    if name != "all" and older not in ("all", name):
        raise UserError(f"data.train_subset is {name}, but sampling.train_subset, its older name, is {older}: set one")
    spec = ImageSpec(data.image_size, data.num_channels, row.resample, data.skip_corrupt)
    root = pathlib.Path(root_of(data)).expanduser()
    if row.files and not root.exists():
        raise UserError(f"{data.dataset}: there is nothing at {root}: put {row.files} there, or set data.data_root")
    image_set = row.open(root, spec)
    if isinstance(image_set, Source):
        image_set = open_cached(image_set, spec, data.cache_dir, config.training.progress)
    if data.num_classes:
        check_classes(image_set, data.num_classes)
    return subset(image_set, older, "sampling.train_subset") if name == "all" else subset(image_set, name)


def root_of(data):
    """Return the file or folder of the data set that a `config.data` names."""
    return data.data_root or data.custom_data_root or f"data/{data.dataset}"


def array_set(images, labels, spec, source="", class_names=None):
    """Return an `ImageSet` of uint8 images `(N, C, H, W)`, converted to `spec`, with int64 labels `(N,)` or None."""
    images, notes = fit_images(images, spec)
    return ImageSet(images, labels, class_names, source, dict(notes))


def count_classes(image_set, num_classes=0):
    """Return the number of images of each class, at least `num_classes` of them, and a text of those that have any."""
    counts = np.bincount(image_set.labels, minlength=num_classes)
    names = image_set.class_names or range(len(counts))
    return counts, _shorten([f"{names[k]}: {counts[k]}" for k in np.flatnonzero(counts)])


def check_classes(image_set, num_classes):
    """Raise UserError unless the labels are 0..num_classes-1, each with at least one image."""
    source = f"data.num_classes {num_classes}: {image_set.source}"
    if image_set.labels is None:
        raise UserError(f"{source} has no labels: set it to 0, or give labels by {LABEL_FILE} or by "
                        "sub-folders that hold all images")
    counts, found = count_classes(image_set, num_classes)
    if len(counts) != num_classes or not counts.all():
        raise UserError(f"{source} has images of {np.count_nonzero(counts)} classes ({found}): set it to their number, "
                        "or data.data_root to the folder whose sub-folders are the classes")
    if image_set.class_names and SPLITS.issuperset(image_set.class_names):
        raise UserError(f"{source} has the sub-folders {found}, which are splits: set data.data_root to one of them")


def subset(image_set, name, field="data.train_subset"):
    """Return the part of `image_set` with the name that the config field `field` has; UserError for an unknown name.

    name: "all"; "random_N", N images drawn without replacement, the same for every seed; or a class name.
    """
    if name == "all":
        return image_set
    names, labels, source = image_set.class_names or (), image_set.labels, image_set.source
    if name.startswith("random_"):
        number = name.removeprefix("random_")
        if not (number.isdecimal() and 1 <= int(number) <= len(image_set)):
            raise UserError(f"{field} {name}: N of random_N must be from 1 to {len(image_set)}, the images of {source}")
        generator = seeds.index_generator(SUBSET_SEED, 0, seeds.SUBSET)
        chosen = np.sort(generator.choice(len(image_set), int(number), replace=False))
    else:
        name = name if name in names else RELEASED_NAMES.get(name, name)
        if labels is None or name not in names:
            raise UserError(f"{field} {name}: {source} has no such class; choose all, random_N or one of "
                            f"{_shorten(names) or 'its classes (it has none)'}")
        chosen = np.flatnonzero(labels == names.index(name))
    return image_set.choose(chosen, f"{source} ({field} {name})")


def _shorten(words):
    return ", ".join(words[:20]) + (f", … ({len(words)} classes)" if len(words) > 20 else "")


# Folders and archives of image files


def open_files(name, with_labels, root, spec):
    """Return the `Source` of a folder or zip; with_labels: classes are those of dataset.json (EDM's) or sub-folders."""
    tree = FileTree(root)

    def open_tree():
        labels, class_names = find_labels(tree) if with_labels else (None, None)
        return _decode_tree(tree, labels, spec), len(tree.names), class_names

    return Source(name, f"{name} at {tree.root}", tree.identity(), open_tree)


def _decode_tree(tree, labels, spec):
    """Yield the images of a `FileTree`, decoded by threads, in `ImageSet`s; labels: of all its images, or None."""
    def decode(name):
        try:
            return tree.decode(name, spec)
        except UserError as error:
            if spec.skip_corrupt:
                return None, str(error)
            raise UserError(f"{error}: remove it, or skip such files with --config.data.skip_corrupt true") from None

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for first in range(0, len(tree.names), FILES_AT_ONCE):
            part = slice(first, first + FILES_AT_ONCE)
            decoded = list(pool.map(decode, tree.names[part]))
            kept = [place for place, (pixels, _) in enumerate(decoded) if pixels is not None]
            images = np.array([decoded[place][0] for place in kept], np.uint8)
            yield ImageSet(images.reshape(-1, spec.channels, spec.size, spec.size),
                           None if labels is None else np.array(labels[part], np.int64)[kept],
                           notes=collections.Counter(note for place in kept for note in decoded[place][1]),
                           skipped=tuple(error for pixels, error in decoded if pixels is None))


# Arrays in files


def _read_batches(paths, size, first_label, classes, spec):
    """Yield the `ImageSet`s of batch files as of CIFAR-10 and ImageNet64 at 64×64; UserError for other files."""
    for path in paths:
        batch = load_arrays(path)
        try:
            data, labels = np.asarray(batch["data"]), np.asarray(batch["labels"])
        except (TypeError, KeyError, IndexError, ValueError):  # no dict, or lists of lists
            data = labels = np.empty(0)
        if data.dtype != np.uint8 or labels.ndim != 1 or data.shape != (len(labels), 3 * size**2):
            raise UserError(f"{path} is not a batch of images: a dict of uint8 data (N, {3 * size**2}) and N labels")
        check_labels(labels, path, classes, first_label)
        yield array_set(data.reshape(-1, 3, size, size), labels.astype(np.int64) - first_label, spec)


CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def open_cifar10(root, spec):
    """Return CIFAR-10's training set (Krizhevsky 2009): the Python batches in `root`, downloaded if they are absent."""
    folders = [root, root / CIFAR10_FOLDER]
    there = [folder for folder in folders if any((folder / name).exists() for name in CIFAR10_BATCHES)]
    folder = there[0] if there else _download_cifar10(root)
    paths = [folder / name for name in CIFAR10_BATCHES]
    return Source("CIFAR10", f"CIFAR10 at {folder}", identify(paths),
                  lambda: (_read_batches(paths, 32, 0, 10, spec), None, CIFAR10_CLASSES))


def _download_cifar10(root):
    """Fetch the archive to `root` and unpack it, once for all processes; return the folder of the batches."""
    from torchvision.datasets import CIFAR10  # here, since importing it takes seconds
    from torchvision.datasets.utils import download_and_extract_archive

    folder = root / CIFAR10_FOLDER
    try:
        with file_lock(root / ".download.lock", "downloading CIFAR10"):
            if not folder.exists():
                with tempfile.TemporaryDirectory(dir=root) as unpacked:
                    download_and_extract_archive(CIFAR10.url, root, unpacked, md5=CIFAR10.tgz_md5)
                    os.replace(os.path.join(unpacked, CIFAR10_FOLDER), folder)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; RuntimeError: a wrong checksum
        raise UserError(f"CIFAR10: put cifar-10-python.tar.gz or {CIFAR10_FOLDER}/ into {root}, or set data.data_root; "
                        f"{CIFAR10.url} could not be downloaded ({getattr(error, 'reason', error)})") from None
    return folder


def open_imagenet64(root, spec):
    """Return the `Source` of ImageNet at 64×64 with its 1,000 classes.

    `root` holds the downsampled release (Chrabaszcz et al. 2017), `train_data_batch_1` … `10`, pickled or npz, with
    the release's order of classes; or image files with `dataset.json`, or with a folder per class, ordered by name.
    """
    found = {}
    for path in sorted([*root.glob("train_data_batch_*"), *root.glob("Imagenet64*/train_data_batch_*")]):
        if matched := re.fullmatch(r"train_data_batch_(\d+)(\.npz)?", path.name):
            found.setdefault(int(matched[1]), path)
    if not found:
        return open_files("ImageNet64", True, root / "train" if (root / "train").is_dir() else root, spec)
    if missing := set(range(1, max(found) + 1)) - set(found):
        raise UserError(f"ImageNet64: {root} lacks train_data_batch_{min(missing)}: add it (there are 10)")
    paths = [found[number] for number in sorted(found)]
    return Source("ImageNet64", f"ImageNet64 at {root}", identify(paths),
                  lambda: (_read_batches(paths, 64, 1, 1000, spec), None, tuple(map(str, range(1000)))))


IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
FASHION_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                   "Ankle boot")


def open_idx(name, class_names, root, spec):
    """Return the `Source` of MNIST's or Fashion-MNIST's training set in `root`, `root`/raw or `root`/{name}/raw."""
    found = {path.name.removesuffix(".gz").replace(".idx", "-idx"): path
             for folder in (root / name / "raw", root / "raw", root) for path in folder.glob("train-*")}
    if missing := [file for file in IDX_FILES if file not in found]:
        raise UserError(f"{name}: {root} lacks {missing[0]}: put it there (.gz or unpacked), or set data.data_root")
    paths = [found[file] for file in IDX_FILES]

    def open_arrays():
        images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
        if len(images) != len(labels):
            raise UserError(f"{paths[0]} has {len(images)} images, {paths[1]} {len(labels)} labels: fetch both again")
        check_labels(labels, paths[1], 10)
        return iter([array_set(images[:, None], labels.astype(np.int64), spec)]), len(images), class_names

    return Source(name, f"{name} at {paths[0].parent}", identify(paths), open_arrays)


def read_idx(path, dimensions):
    """Return the uint8 array of an IDX file, gzipped or not, with `dimensions` axes; UserError for other content.

    The format (LeCun et al. 1998): two zero bytes, the type (8: unsigned byte), the number of dimensions, each
    dimension as a big-endian 32-bit number, then the values.
    """
    data = read_file(path)
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}): fetch it again") from None
    head = 4 + 4 * dimensions
    if len(data) < head or data[:4] != bytes([0, 0, 8, dimensions]):
        raise UserError(f"{path} is not an IDX file of unsigned bytes with {dimensions} dimensions: fetch it again")
    shape = np.frombuffer(data, ">u4", dimensions, offset=4).astype(int)
    if len(data) - head != shape.prod() or 0 in shape:
        raise UserError(f"{path} should hold {shape.prod()} values and holds {len(data) - head}: fetch it again")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def open_digits(root, spec):
    """Return scikit-learn's handwritten digits, 1,797 grey images of 8×8; values 0..16 become `round(v * 255 / 16)`."""
    from sklearn.datasets import load_digits  # here, since importing it takes a second

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    return array_set(images, digits.target.astype(np.int64), spec, "digits of scikit-learn", tuple("0123456789"))


# The functions and types that pickles of numpy arrays name (numpy 2 renamed numpy.core), and bytes in protocol 2.
_KNOWN = {
    "numpy.core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
    "numpy.core.multiarray.scalar": np.float64(0).__reduce__()[0],
    "numpy.core.numeric._frombuffer": np.empty(1).__reduce_ex__(5)[0],
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "_codecs.encode": lambda text, encoding="latin1": text.encode({"latin1": "latin1"}[encoding]),
}


class _ArrayUnpickler(pickle._Unpickler):  # Python's: a few bytes make C's allocate gigabytes, a memo of any size
    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8}  # as large as read

    def find_class(self, module, name):
        known = _KNOWN.get(f"{module}.{name}".replace("numpy._core.", "numpy.core."))
        if known is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return known


def load_arrays(path):
    """Return the content of an npz or a pickle of arrays, numbers, text; UserError for others, which could run code."""
    try:
        with open(path, "rb") as opened:
            return dict(np.load(opened)) if path.suffix == ".npz" else _ArrayUnpickler(opened, encoding="latin1").load()
    except Exception as error:  # a damaged file raises many kinds of error
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a readable npz or pickle of arrays ({text}): fetch or make it again") from None


DATASETS = {
    "CIFAR10": DataSet(open_cifar10),
    "FFHQ64": DataSet(functools.partial(open_files, "FFHQ64", False), files=(
        "ffhq-64x64.zip (as EDM's dataset_tool.py writes it), a folder of the PNGs at 64×64 or the 128×128 "
        "thumbnails")),
    "ImageNet64": DataSet(open_imagenet64, resample="area", files=(
        "train_data_batch_1 … 10 of the 64×64 release (pickled or npz), imagenet-64x64.zip (as EDM's dataset_tool.py "
        "writes it) or a folder per class of JPEGs")),
    "MNIST": DataSet(functools.partial(open_idx, "MNIST", tuple("0123456789")), channels=1, mirror=False,
                     files=" and ".join(IDX_FILES) + " (.gz or unpacked)"),
    "FashionMNIST": DataSet(functools.partial(open_idx, "FashionMNIST", FASHION_CLASSES), channels=1,
                            files=" and ".join(IDX_FILES) + " (.gz or unpacked)"),
    "digits": DataSet(open_digits, channels=1, mirror=False),
    "custom": DataSet(functools.partial(open_files, "custom", True), channels=None, files="a folder or zip of images"),
}
