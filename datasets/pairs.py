"""Stored noise-image pairs as training data: all folders {root}/{seed}, of generate_data.py or any other program.

A folder holds z0.npy (unit noise) and z1.npy (images in [-1, 1]), both `(N, C, H, W)`, and optionally label.npy, class
numbers `(N,)` or one-hot `(N, num_classes)`. In compact storage there is no z0.npy: z0 is drawn from (seed, index).
"""

import fractions
import hashlib
import os
import pathlib

import numpy as np
import torch

from datasets.batches import Batches, EndlessOrder, check_finite, check_labels, one_hot, some_of
from runtime import seeds
from runtime.files import read_json
from runtime.terminal import UserError, print_message

ARRAYS = ("z0.npy", "z1.npy", "label.npy")
METADATA = "pairs.json"
QUICK_ROWS = 256  # pairs of a folder that are checked when it is opened
DIGEST_ROWS = 16
SAME_ORIGIN = ("sampling.direction", "checkpoint", "sampling.init_noise_scale")  # of all folders of a root
# A 1-flow on digits has correlation 0.36, closed-form flows 0.22 (digits) and 0.05 (1,000 images of CIFAR-10).
LEAST_CORRELATION = 0.03
BEYOND = 1.25  # share of values beyond it: 21 % of unit noise, next to none of images


def read_metadata(folder):
    """Return the content of `pairs.json`, or None if there is none. Raises UserError if it is damaged."""
    path = pathlib.Path(folder) / METADATA
    content = read_json(path) if path.exists() else None
    if content is not None and not (isinstance(content.get("complete"), bool) and isinstance(content.get("count"), int)
                                    and content["count"] >= 0 and isinstance(content.get("identity"), dict)):
        raise UserError(f"{path} is damaged: delete the folder and make its pairs again")
    return content


def open_rows(path):
    """Return the memory map `(N, ...)` of the npy file of numbers at `path`; UserError, naming it, for other files."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file")
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header raises many kinds of error, from numpy, ast and tokenize
        raise UserError(f"{path} cannot be read as an npy file ({error or type(error).__name__}): it is cut short, "
                        "damaged or of another kind; copy or make it again") from None
    if rows.ndim == 0 or rows.dtype.kind not in "fiub":
        raise UserError(f"{path} holds {rows.dtype} of shape {rows.shape}; an npy array of numbers (N, ...) is needed")
    return rows


def as_float(rows):
    """Return an array of any number type and byte order as a float32 tensor."""
    return torch.from_numpy(np.require(rows, np.float32, "CW"))


def as_one_hot(rows, num_classes):
    """Return labels, numbers `(n,)` or one-hot, as one-hot float32 `(n, num_classes)`."""
    return as_float(rows) if rows.ndim == 2 else one_hot(torch.from_numpy(rows.astype(np.int64)), num_classes)


class NoiseSource:
    """Noise z0 ~ N(0, scale²) of `shape` (C, H, W), drawn by index, the same on every machine."""

    def __init__(self, seed, shape, scale=1.0):
        self.seed, self.shape, self.scale = seed, shape, scale

    def __getitem__(self, indices):
        """Return z0 of the pairs `indices`: float32 array `(n, C, H, W)`."""
        return seeds.index_noise(self.seed, indices, self.shape).numpy() * np.float32(self.scale)

    def digest(self):
        """Return the digest of the first rows at scale 1, which detects a numpy version with other random numbers."""
        noise = seeds.index_noise(self.seed, range(DIGEST_ROWS), self.shape).numpy()
        return hashlib.sha256(noise.astype("<f4").tobytes()).hexdigest()[:16]


def image_shape(config):
    """Return the shape (C, H, W) of the config's images."""
    return config.data.num_channels, config.data.image_size, config.data.image_size


class PairFolder:
    """One folder of pairs: rows `z0[indices]`, `z1[indices]` and `label[indices]` (label: None without labels).

    Raises UserError if it is unfinished or damaged, or if the noise of compact storage cannot be reproduced here.
    """

    def __init__(self, path):
        self.path, self.metadata = pathlib.Path(path), read_metadata(path)
        if self.metadata and not self.metadata["complete"]:
            raise UserError(f"{self.path} is unfinished: run its generate_data.py command again to complete it, or "
                            "with fewer pairs to use those that are there")
        self.identity = (self.metadata or {}).get("identity", {})
        self.noise_scale = self.identity.get("sampling.init_noise_scale", 1.0)
        compact = self.identity.get("sampling.pair_storage") == "compact"
        arrays = {name: open_rows(self.path / name) for name in ARRAYS
                  if name == "z1.npy" or (name == "z0.npy" and not compact) or (self.path / name).exists()}
        self.z1, self.label = arrays["z1.npy"], arrays.get("label.npy")
        self.shape, self.count = self.z1.shape[1:], self.metadata["count"] if self.metadata else len(self.z1)
        if len(self.shape) != 3 or self.count == 0:
            raise UserError(f"{self.path / 'z1.npy'} has shape {self.z1.shape}; images (N, C, H, W) are needed")
        for name, rows in arrays.items():
            right = len(rows) >= self.count if self.metadata else len(rows) == self.count
            if not right or (name == "z0.npy" and rows.shape[1:] != self.shape):
                source = f"{self.count} in {METADATA}" if self.metadata else f"those of z1.npy {self.z1.shape}"
                raise UserError(f"{self.path / name} has rows {rows.shape}, {source}: they do not belong together")
        drawn = NoiseSource(self.identity.get("seed", 0), self.shape, self.noise_scale)
        self.z0 = drawn if compact else arrays["z0.npy"]
        if compact and drawn.digest() != self.identity.get("noise"):
            raise UserError(f"{self.path} is compact, but its noise cannot be drawn again here: the first rows "
                            f"differ; it was made with {self.metadata.get('software')}")

    def __len__(self):
        return self.count

    def take(self, indices):
        """Return z0 and z1 of the pairs `indices`, float32 `(n, C, H, W)`."""
        return as_float(self.z0[indices]), as_float(self.z1[indices])

    def check(self, indices, num_classes=None):
        """Return z0 and z1 of the pairs `indices`; UserError if values are not finite or labels are invalid."""
        rows = self.take(indices)
        for name, values in zip(("z0", "z1"), rows, strict=True):
            check_finite(values, indices, f"{self.path}: {name} of pair", "make it again")
        if self.label is not None:
            label = self.label[:len(self)] if self.label.ndim == 1 else self.label[indices]
            check_labels(label, self.path / "label.npy", num_classes)
        return rows


def describe(z0, z1):
    """Return the statistics of pairs `(n, C, H, W)` for `findings`: root mean squares and the correlation about 0."""
    z0, z1 = z0.double(), z1.double()
    stats = {"pairs": len(z0), "values": z0.numel(), "z1 minimum": z1.min().item(), "z1 maximum": z1.max().item()}
    for name, values in (("z0", z0), ("z1", z1)):
        stats[f"{name} RMS"] = values.square().mean().sqrt().item()
        stats[f"{name} beyond"] = (values.abs() > BEYOND).double().mean().item()
    return stats | {"correlation": (z0 * z1).mean().item() / max(stats["z0 RMS"] * stats["z1 RMS"], 1e-15)}


def findings(folder, stats):
    """Return a sentence for each sign in the statistics (`describe`) that the pairs of a `PairFolder` are wrong."""
    signs, low, high, scale = [], stats["z1 minimum"], stats["z1 maximum"], folder.noise_scale
    uncertain = 4 / np.sqrt(stats["values"])  # four standard errors of a mean
    slack = 0.1 + uncertain / np.sqrt(2)
    noisy = {z: abs(stats[f"{z} RMS"] - 1) < 2 * slack and stats[f"{z} beyond"] > 0.1 for z in ("z0", "z1")}
    if not folder.metadata and (noisy["z1"] or not noisy["z0"]):  # our own files cannot be swapped
        signs.append("z0 should be unit noise and z1 images in [-1, 1], but their standard deviations are "
                     f"{stats['z0 RMS']:.2f} and {stats['z1 RMS']:.2f}, {stats['z0 beyond']:.0%} and "
                     f"{stats['z1 beyond']:.0%} of their values are beyond ±{BEYOND}: are z0.npy and z1.npy swapped?")
    elif abs(stats["z0 RMS"] - scale) > slack * scale:
        signs.append(f"z0 has standard deviation {stats['z0 RMS']:.3f} instead of {scale:g}")
    if low == high:
        signs.append(f"every value of z1 is {low + 0.0:g}: its images were never written")
    elif low >= 0 and high <= 1.001:
        signs.append(f"all values of z1 lie in {low:.2f} to {high:.2f}; images are in [-1, 1]: use 2 * z1 - 1")
    elif stats["z1 beyond"] > 0.05 and not signs:
        signs.append(f"z1 ranges from {low:.2f} to {high:.2f}, {stats['z1 beyond']:.0%} of it beyond ±{BEYOND}; images "
                     "are in [-1, 1]")
    random = folder.identity.get("sampling.direction") == "random_paired"
    if not signs and not random and stats["correlation"] <= uncertain <= LEAST_CORRELATION:
        signs.append(f"z0 and z1 have correlation {stats['correlation']:.3f}, but pairs of a flow have a clearly "
                     "positive one: are they in the same order, and is z0 the noise that each image was made from?")
    return [f"{folder.path}: {text}" for text in signs]


def open_folders(root):
    """Return the `PairFolder`s in `root`: its sub-folders, one per seed, or `root` itself; UserError if none."""
    root = pathlib.Path(root)
    found = [path for path in (root, *root.glob("*")) if any((path / name).exists() for name in (*ARRAYS, METADATA))]
    if not found:
        raise UserError(f"{root} holds no pairs, folders such as {root / '0'} with z0.npy and z1.npy: make them with "
                        f"generate_data.py --data_root {root}")
    return [PairFolder(path) for path in sorted(found, key=lambda path: (len(path.name), path.name))]


def open_pairs(root, config):
    """Return the `PairFolder`s in `root`; UserError if some pairs of one, or their origins, do not fit the config."""
    folders, data = open_folders(root), config.data
    for folder in folders:
        if folder.shape != image_shape(config):
            raise UserError(f"{folder.path} holds pairs of shape {folder.shape}, but config.data.num_channels and "
                            f"config.data.image_size ask for {image_shape(config)}")
        if data.num_classes and folder.label is None:
            raise UserError(f"{folder.path} has no label.npy, but config.data.num_classes is {data.num_classes}: set "
                            "it to 0 or use pairs of a class-conditional model")
        pairs = folder.check(some_of(len(folder), QUICK_ROWS), data.num_classes or None)
        if os.environ.get("RANK", "0") == "0":
            for text in findings(folder, describe(*pairs)):
                print_message(f"warning: {text}; training uses the values as they are", stderr=True)
    check_origins(folders)
    return folders


def check_origins(folders, names=SAME_ORIGIN):
    """Raise UserError if folders differ in the entries `names` of pairs.json, or if two hold the same pairs."""
    def shown(folder, name):
        value, path = folder.identity.get(name), folder.metadata.get("checkpoint")
        return f"{path} ({value})" if name == "checkpoint" and path else value

    first, *others = [folder for folder in folders if folder.metadata] or [None]
    for folder in others:
        different = [f"{name} is {shown(folder, name)} there and {shown(first, name)} in {first.path}"
                     for name in names if folder.identity.get(name) != first.identity.get(name)]
        if different:
            raise UserError(f"{folder.path} holds pairs of another origin, keep them apart: {'; '.join(different)}")
    seen = {}
    for folder in folders:
        pair = tuple(rows.numpy().tobytes() for rows in folder.take(np.array([0])))
        if pair in seen:
            raise UserError(f"{folder.path} holds the same pairs as {seen[pair]}: delete one of them")
        seen[pair] = folder.path


class PairSet:
    """The pairs of several `PairFolder`s, numbered consecutively."""

    def __init__(self, folders, num_classes):
        self.folders, self.num_classes = folders, num_classes
        self.ends = np.cumsum([len(folder) for folder in folders])

    def __len__(self):
        return int(self.ends[-1])

    def take(self, indices):
        """Return {"z0", "z1": float32 `(n, C, H, W)`, with classes "label": one-hot `(n, classes)`} of `indices`."""
        taken = {name: torch.empty(len(indices), *self.folders[0].shape) for name in ("z0", "z1")}
        if self.num_classes:
            taken["label"] = torch.empty(len(indices), self.num_classes)
        homes = np.searchsorted(self.ends, indices, side="right")
        for home in np.unique(homes):
            folder, places = self.folders[home], np.flatnonzero(homes == home)
            rows = indices[places] - (self.ends[home] - len(folder))
            taken["z0"][places], taken["z1"][places] = folder.take(rows)
            if self.num_classes:
                taken["label"][places] = as_one_hot(folder.label[rows], self.num_classes)
        return taken


class MixedOrder(EndlessOrder):
    """Generated pairs 0..count-1 mixed with a share of the `real_count` real pairs after them, both kinds shuffled.

    Position s is real if floor((s+1)·share) > floor(s·share), so that every part of the sequence has that share.
    """

    def __init__(self, count, real_count, share, seed):
        super().__init__(count, seed)
        self.share, self.real = fractions.Fraction(share).limit_denominator(10**6), EndlessOrder(real_count, seed)

    def at(self, positions):
        """Return the pairs at `positions` of the sequence, both int64 arrays `(n,)`."""
        real_before = positions * self.share.numerator // self.share.denominator
        is_real = (positions + 1) * self.share.numerator // self.share.denominator > real_before
        indices = np.empty(len(positions), np.int64)
        indices[is_real] = self.count + self.real.at(real_before[is_real])
        indices[~is_real] = super().at((positions - real_before)[~is_real])
        return indices


def create_pair_batches(config, device):
    """Return the `Batches` of data.reflow_data_root and real pairs; UserError for pairs that do not fit the config."""
    data, size, share = config.data, config.training.batch_size, config.flow.real_data_share
    folders = open_pairs(data.reflow_data_root, config)
    count = sum(map(len, folders))
    if count < size:
        raise UserError(f"{data.reflow_data_root} holds {count} pairs, fewer than training.batch_size {size}")
    order = EndlessOrder(count, config.seed)
    if share > 0:
        folders += open_pairs(data.real_pairs_root, config)
        check_origins(folders, SAME_ORIGIN[1:])
        order = MixedOrder(count, sum(map(len, folders)) - count, share, config.seed)
    return Batches(PairSet(folders, data.num_classes), order, config, device, config.flow.h_flip)
