"""Stored noise-image pairs as training data: all folders {root}/{seed}, ours or hand-made, shuffled, in batches.

A folder holds z0.npy (unit noise) and z1.npy (images in [-1, 1]), both `(N, C, H, W)`, and perhaps label.npy, class
numbers `(N,)` or one-hot `(N, num_classes)`. In compact storage there is no z0.npy: z0 is drawn from (seed, index).
"""

import fractions
import hashlib
import pathlib
import sys

import numpy as np
import torch

from datasets.batches import COPIED_AT_ONCE, Batch, EndlessOrder, Flips, ReadAhead, fits, one_hot, to_device
from datasets.pair_writer import ARRAYS, RECORD, read_record
from runtime import seeds
from runtime.errors import UserError

QUICK_ROWS = 256  # pairs of a folder that are looked at when it is opened
DIGEST_ROWS = 16
SAME_ORIGIN = ("sampling.direction", "checkpoint", "sampling.init_noise_scale")  # of all folders of a root
BEYOND = 1.25  # share of values beyond it: 21 % of unit noise, next to none of images


def open_rows(path):
    """Return the memory map `(N, ...)` of the npy file of numbers at `path`; UserError naming it if it is no such."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file")
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header raises ten kinds, of numpy's, ast's and tokenize's
        raise UserError(f"{path} cannot be read as an npy file ({error or type(error).__name__}): it is cut short, "
                        "damaged or of another kind; copy or make it again") from None
    if rows.ndim == 0 or rows.dtype.kind not in "fiub":
        raise UserError(f"{path} holds {rows.dtype} of shape {rows.shape}; an npy array of numbers (N, ...) is needed")
    return rows


def as_float(rows):
    """Return an array of any number type and byte order as a float32 tensor."""
    return torch.from_numpy(np.require(rows, np.float32, "CW"))


class NoiseSource:
    """z0 drawn from N(0, scale²): rows by number, each the same on every machine."""

    def __init__(self, seed, shape, scale=1.0):
        """Take the seed, the shape (C, H, W) and the standard deviation."""
        self.seed, self.shape, self.scale = seed, shape, scale

    def __getitem__(self, indices):
        """Return z0 of the pairs `indices`: float32 array `(n, C, H, W)`."""
        noise = seeds.index_noise(self.seed, indices, self.shape).numpy()
        return noise if self.scale == 1 else noise * np.float32(self.scale)

    def digest(self):
        """Return the digest of the first rows at scale 1: another numpy that draws others would show here."""
        noise = seeds.index_noise(self.seed, range(DIGEST_ROWS), self.shape).numpy()
        return hashlib.sha256(noise.astype("<f4").tobytes()).hexdigest()[:16]


class PairFolder:
    """One folder of pairs. `z0[indices]`, `z1[indices]` and `label[indices]` are rows (label: None without)."""

    def __init__(self, path):
        """Open the folder at `path`.

        Raises UserError if it is unfinished, a file is missing or damaged, shapes or lengths disagree, or the noise
        of compact storage comes out otherwise here.
        """
        self.path = pathlib.Path(path)
        self.record = read_record(self.path)
        if self.record and not self.record["complete"]:
            raise UserError(f"{self.path} is unfinished: run its generate_data.py command again to complete it, or "
                            "with fewer pairs to use those that are there")
        self.identity = self.record["identity"] if self.record else {}
        self.noise_scale = self.identity.get("sampling.init_noise_scale", 1.0)
        self.z1 = open_rows(self.path / "z1.npy")
        self.shape = self.z1.shape[1:]
        if len(self.shape) != 3:
            raise UserError(f"{self.path / 'z1.npy'} has rows of shape {self.shape}; images (C, H, W) are needed")
        if self.identity.get("sampling.pair_storage") == "compact":
            self.z0 = NoiseSource(self.identity["seed"], self.shape, self.noise_scale)
            if self.z0.digest() != self.identity.get("noise"):
                raise UserError(f"{self.path} is compact, but its noise cannot be drawn again here: the first rows "
                                f"differ; it was made with {self.record.get('software')}")
        else:
            self.z0 = open_rows(self.path / "z0.npy")
        self.label = open_rows(self.path / "label.npy") if (self.path / "label.npy").exists() else None
        self.count = self.record["count"] if self.record else len(self.z1)
        self._check_sizes()

    def __len__(self):
        """Return the number of pairs."""
        return self.count

    def _check_sizes(self):
        for name, rows in (("z0.npy", self.z0), ("z1.npy", self.z1), ("label.npy", self.label)):
            length = len(rows) if isinstance(rows, np.ndarray) else self.count
            if length < self.count or (length > self.count and not self.record):
                source = f"{RECORD} promises {self.count}" if self.record else f"z1.npy has {self.count}"
                raise UserError(f"{self.path / name} has {length} rows, but {source}: these files do not belong "
                                "together; copy or make them again")
        if isinstance(self.z0, np.ndarray) and self.z0.shape[1:] != self.shape:
            raise UserError(f"{self.path}: rows of z0.npy have shape {self.z0.shape[1:]}, those of z1.npy {self.shape}")
        if self.count == 0:
            raise UserError(f"{self.path} holds no pairs")

    def check_classes(self, num_classes):
        """Raise UserError unless the labels are those of a network with `num_classes` classes."""
        path, advice = self.path / "label.npy", f"but config.data.num_classes is {num_classes}"
        if self.label is None:
            raise UserError(f"{self.path} has no label.npy, {advice}: set it to 0 or use pairs of a class-conditional "
                            "model")
        if self.label.shape[1:] not in ((), (num_classes,)):
            raise UserError(f"{path} has labels of shape {self.label.shape[1:]}, {advice}")
        if self.label.ndim == 1 and (highest := int(self.label[:len(self)].max())) >= num_classes:
            raise UserError(f"{path} has class {highest}, {advice}")

    def labels(self, indices, num_classes):
        """Return the labels of the pairs `indices`, one-hot float32 `(n, num_classes)`."""
        rows = self.label[indices]
        return as_float(rows) if rows.ndim == 2 else one_hot(torch.from_numpy(rows.astype(np.int64)), num_classes)

    def check(self, indices=None):
        """Return the `moments` of the pairs `indices` (a few all over the folder, if None).

        Raises UserError for a value that is not finite or no class.
        """
        if indices is None:
            indices = np.unique(np.linspace(0, len(self) - 1, QUICK_ROWS).round().astype(np.int64))
        rows = {"z0": as_float(self.z0[indices]), "z1": as_float(self.z1[indices])}
        wrong = {f"{name} of pair {{}} is not finite": ~values.isfinite().flatten(1).all(1).numpy()
                 for name, values in rows.items()}
        if self.label is not None and self.label.ndim < 3:  # `check_classes` refuses others
            label = np.asarray(self.label[indices])
            wrong["the label of pair {} is no class"] = (label < 0) | (label % 1 != 0) if label.ndim == 1 else (
                ~np.isin(label, (0, 1)).all(1) | (label.sum(1) != 1))
        for sentence, bad in wrong.items():
            if bad.any():
                raise UserError(f"{self.path}: {sentence.format(int(indices[int(bad.argmax())]))}; delete the folder "
                                "and make its pairs again")
        return moments(**rows)


def moments(z0, z1):
    """Return sums over pairs `(n, C, H, W)` that `findings` judges; parts are added up (but "low" and "high")."""
    z0, z1 = z0.double(), z1.double()
    return {"pairs": len(z0), "values": z0.numel(), "low": z1.min().item(), "high": z1.max().item(),
            "product": (z0 * z1).sum().item(), "z0_square": z0.square().sum().item(),
            "z1_square": z1.square().sum().item(),
            "z0_beyond": (z0.abs() > BEYOND).sum().item(), "z1_beyond": (z1.abs() > BEYOND).sum().item()}


def findings(folder, found):
    """Return a sentence for each way in which the `moments` of a `PairFolder` are not those of noise and images."""
    said, low, high, scale = [], found["low"], found["high"], folder.noise_scale
    slack = 0.1 + 4 / np.sqrt(2 * found["values"])  # the standard deviation of so many values is itself uncertain
    spread = {name: np.sqrt(found[f"{name}_square"] / found["values"]) for name in ("z0", "z1")}
    beyond = {name: found[f"{name}_beyond"] / found["values"] for name in ("z0", "z1")}
    noisy = {name: abs(spread[name] - 1) < 2 * slack and beyond[name] > 0.1 for name in ("z0", "z1")}
    if not folder.record and (noisy["z1"] or not noisy["z0"]):  # our own files cannot be swapped
        said.append("z0 should be unit noise and z1 images in [-1, 1], but their standard deviations are "
                    f"{spread['z0']:.2f} and {spread['z1']:.2f}, {beyond['z0']:.0%} and {beyond['z1']:.0%} of them "
                    f"beyond {BEYOND}: are z0.npy and z1.npy swapped?")
    elif abs(spread["z0"] - scale) > slack * scale:
        said.append(f"z0 has standard deviation {spread['z0']:.3f} instead of {scale:g}")
    if low == high:
        said.append(f"every value of z1 is {low + 0.0:g}: its images were never written")
    elif low >= 0 and high <= 1.001:
        said.append(f"all values of z1 lie in {low:.2f} to {high:.2f}; images are in [-1, 1]: use 2 * z1 - 1")
    elif beyond["z1"] > 0.05 and not said:
        said.append(f"z1 reaches from {low:.2f} to {high:.2f}, {beyond['z1']:.0%} of it beyond {BEYOND}; images are in "
                    "[-1, 1]")
    return [f"{folder.path}: {text}" for text in said]


def open_folders(root):
    """Return the `PairFolder`s in `root` (its sub-folders, one per seed, or `root` itself), ordered by name.

    Raises UserError if there is none.
    """
    root = pathlib.Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is no folder; make pairs with generate_data.py --data_root {root}")
    found = [path for path in [root, *root.iterdir()]
             if path.is_dir() and any((path / name).exists() for name in (*ARRAYS, RECORD))]
    if not found:
        raise UserError(f"{root} holds no pairs: folders such as {root / '0'} with z0.npy and z1.npy are needed; make "
                        f"them with generate_data.py --data_root {root}")
    return [PairFolder(path) for path in sorted(found, key=lambda path: (len(path.name), path.name))]


class PairSet:
    """All pairs of some folders, one after the other."""

    def __init__(self, folders, num_classes):
        """Take `PairFolder`s of one shape; num_classes: width of the labels, 0 for none."""
        self.folders, self.num_classes = folders, num_classes
        self.shape = folders[0].shape
        self.ends = np.cumsum([len(folder) for folder in folders])

    def __len__(self):
        """Return the number of pairs."""
        return int(self.ends[-1])

    def take(self, indices):
        """Return (z0, z1, label) of int64 `indices` `(n,)`.

        z0, z1: float32 `(n, C, H, W)`; label: one-hot float32 `(n, num_classes)`, or None without classes.
        """
        z0, z1, label = self._empty(len(indices), "cpu")
        homes = np.searchsorted(self.ends, indices, side="right")
        for home in np.unique(homes):
            folder, places = self.folders[home], np.flatnonzero(homes == home)
            rows = indices[places] - (self.ends[home] - len(folder))
            z0[places], z1[places] = as_float(folder.z0[rows]), as_float(folder.z1[rows])
            if label is not None:
                label[places] = folder.labels(rows, self.num_classes)
        return z0, z1, label

    def _empty(self, count, device):
        z0, z1 = (torch.empty(count, *self.shape, device=device) for _ in range(2))
        return z0, z1, torch.empty(count, self.num_classes, device=device) if self.num_classes else None

    def on_device(self, device):
        """Return (z0, z1, label) of all pairs as tensors on `device`."""
        whole = self._empty(len(self), device)
        for first in range(0, len(self), COPIED_AT_ONCE):
            part = np.arange(first, min(first + COPIED_AT_ONCE, len(self)))
            for rows, copied in zip(whole, self.take(part), strict=True):
                if rows is not None:
                    rows[first:first + len(part)] = copied
        return whole


def open_pairs(root, config):
    """Return the `PairFolder`s under `root` after a look at some pairs of each.

    Raises UserError if a folder is unfinished or damaged, does not fit `config.data`, or holds pairs of another
    origin than the first, or the same. Unlikely values are said on stderr.
    """
    folders = open_folders(root)
    wanted = (config.data.num_channels, config.data.image_size, config.data.image_size)
    for folder in folders:
        if folder.shape != wanted:
            raise UserError(f"{folder.path} holds pairs of shape {folder.shape}, but config.data.num_channels and "
                            f"config.data.image_size ask for {wanted}")
        for text in findings(folder, folder.check()):
            print(text, file=sys.stderr)
        if config.data.num_classes:
            folder.check_classes(config.data.num_classes)
    check_origins(folders)
    return folders


def check_origins(folders, names=SAME_ORIGIN):
    """Raise UserError if two folders come from different checkpoints, directions … (`names`), or are the same pairs.

    Only folders with pairs.json tell their origin; the same pairs are known by the first one.
    """
    seen, recorded = {}, [folder for folder in folders if folder.record]
    for folder in recorded[1:]:
        origins = [{**other.identity, "checkpoint": (other.record.get("checkpoint"), other.identity.get("checkpoint"))}
                   for other in (folder, recorded[0])]
        different = [f"{name} is {origins[0].get(name)} there and {origins[1].get(name)} in {recorded[0].path}"
                     for name in names if folder.identity.get(name) != recorded[0].identity.get(name)]
        if different:
            raise UserError(f"{folder.path} holds pairs of another origin: {'; '.join(different)}; keep them under "
                            "different roots")
    for folder in folders:
        first = as_float(folder.z0[np.array([0])]).numpy().tobytes(), as_float(folder.z1[:1]).numpy().tobytes()
        if first in seen:
            raise UserError(f"{folder.path} holds the same pairs as {seen[first]} (z0 and z1 of the first are equal): "
                            "delete one of them")
        seen[first] = folder.path


def split_by_share(positions, share):
    """Return (is_real, places) of global sample positions, int64 `(n,)`: which come from the real pairs.

    Sample s is real if floor((s+1)·share) > floor(s·share), so that every stretch of the sequence, whichever
    process reads it, has its share. places: number of samples of the same kind before s.
    """
    before = positions * share.numerator // share.denominator
    is_real = (positions + 1) * share.numerator // share.denominator > before
    return is_real, np.where(is_real, before, positions - before)


class PairBatches:
    """The batches of stored pairs.

    `batch(update, low, high)` holds the pairs at places [low, high) of the global batch of `update`: a pure
    function of (seed, update, place). Pairs that stay on disk are read one update ahead.
    """

    def __init__(self, pairs, config, device, real_count=0):
        """Take a `PairSet`, whose last `real_count` pairs are the real ones, the config and the device."""
        self.pairs, self.device, self.batch_size = pairs, torch.device(device), config.training.batch_size
        self.flips = Flips(config.seed, self.batch_size, config.flow.h_flip, config.data.use_aug)
        self.first_real = len(pairs) - real_count
        self.order = EndlessOrder(self.first_real, 1, config.seed)
        self.real_order = EndlessOrder(real_count, 1, config.seed) if real_count else None
        share = config.flow.real_data_share if real_count else 0
        self.real_share = fractions.Fraction(share).limit_denominator(10**6)
        size = len(pairs) * 2 * 4 * int(np.prod(pairs.shape))
        keep = {"true": True, "false": False, "auto": self.device.type == "cuda" and fits(size, self.device)}
        self.resident = pairs.on_device(self.device) if keep[config.data.on_device] else None
        self.read = ReadAhead(self._read, self.device)

    def __len__(self):
        """Return the number of pairs, real ones not counted."""
        return self.first_real

    @property
    def shape(self):
        """Shape (C, H, W) of an image."""
        return self.pairs.shape

    def batch(self, update, low, high):
        """Return the `Batch` of places [low, high) of `update`, on the device."""
        if self.resident:
            indices = to_device(torch.from_numpy(self._indices(update, low, high)), self.device)
            z0, z1, label = (None if rows is None else rows[indices] for rows in self.resident)
        else:
            rows = self.read(update, low, high)
            z0, z1, label = (None if part is None else part.to(self.device, non_blocking=True) for part in rows)
        z0, z1 = self.flips(update, low, high, z0, z1)
        return Batch(z0=z0, z1=z1, label=label)

    def _read(self, update, low, high):
        """Return (z0, z1, label) in host memory, pinned when a GPU will fetch them."""
        rows = self.pairs.take(self._indices(update, low, high))
        return [part if part is None or self.device.type != "cuda" else part.pin_memory() for part in rows]

    def _indices(self, update, low, high):
        """Return the pairs at places [low, high) of `update`, int64 `(high - low,)`."""
        is_real, places = split_by_share(update * self.batch_size + np.arange(low, high), self.real_share)
        indices = np.empty_like(places)
        for chosen, order, offset in ((~is_real, self.order, 0), (is_real, self.real_order, self.first_real)):
            if chosen.any():
                first, last = places[chosen][[0, -1]]
                indices[chosen] = offset + order.indices(0, int(first), int(last) + 1)
        return indices


def create_pair_batches(config, device):
    """Return the `PairBatches` of `config.data.reflow_data_root`, with the real pairs that the config mixes in.

    Raises UserError for pairs that cannot be trained on with this config.
    """
    folders, real = open_pairs(config.data.reflow_data_root, config), []
    count = sum(map(len, folders))
    if count < config.training.batch_size:
        raise UserError(f"{config.data.reflow_data_root} holds {count} pairs, fewer than training.batch_size "
                        f"{config.training.batch_size}: lower it or make more pairs")
    if config.flow.real_data_share > 0:
        if not config.data.real_pairs_root:
            raise UserError("config.flow.real_data_share is above 0, but config.data.real_pairs_root is empty: make "
                            "pairs with sampling.direction from_z1 and name their folder")
        real = open_pairs(config.data.real_pairs_root, config)
        check_origins([*folders, *real], SAME_ORIGIN[1:])
    try:
        return PairBatches(PairSet([*folders, *real], config.data.num_classes), config, device, sum(map(len, real)))
    except torch.OutOfMemoryError:
        raise UserError(f"data.on_device {config.data.on_device}: {count} pairs do not fit: read them from disk with "
                        "data.on_device false") from None
