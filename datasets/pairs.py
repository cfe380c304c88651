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
from datasets.pair_writer import ARRAYS, RECORD, is_unfinished, read_record
from runtime import seeds
from runtime.errors import UserError

QUICK_ROWS = 256  # pairs of a folder that are looked at when it is opened
DIGEST_ROWS = 16
SAME_ORIGIN = ("sampling.direction", "checkpoint", "sampling.init_noise_scale")  # of all folders of a root
NOISE_SCALE_SLACK, NOISE_CORRELATION, OVERSHOOT = 0.2, 0.2, 1.25


def open_rows(path):
    """Return the memory map `(N, ...)` of the npy file of numbers at `path`; UserError naming it if it is no such."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file")
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError, EOFError, OverflowError, TypeError, SyntaxError, KeyError, MemoryError) as error:
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
        if is_unfinished(self.path):
            raise UserError(f"{self.path} is unfinished: run its generate_data.py command again to complete it, or "
                            "with fewer pairs to use those that are there")
        self.record = read_record(self.path)
        self.identity = self.record["identity"] if self.record else {}
        self.noise_scale = self.identity.get("sampling.init_noise_scale", 1.0)
        self.z1 = open_rows(self.path / "z1.npy")
        self.shape = self.z1.shape[1:]
        if len(self.shape) != 3:
            raise UserError(f"{self.path / 'z1.npy'} has rows of shape {self.shape}; images (C, H, W) are needed")
        compact = self.identity.get("sampling.pair_storage") == "compact"
        self.z0 = self._noise() if compact else open_rows(self.path / "z0.npy")
        self.label = open_rows(self.path / "label.npy") if (self.path / "label.npy").exists() else None
        self.count = self.record["count"] if self.record else len(self.z1)
        self._check_sizes()

    def __len__(self):
        """Return the number of pairs."""
        return self.count

    def _noise(self):
        """Return the `NoiseSource` of compact storage."""
        noise = NoiseSource(self.identity["seed"], self.shape, self.noise_scale)
        if noise.digest() != self.identity.get("noise"):
            made_with = (self.record.get("software") or {}).get("numpy")
            raise UserError(f"{self.path} is compact, but its noise cannot be drawn again here: the first rows differ; "
                            f"use numpy {made_with}, with which it was made")
        return noise

    def _check_sizes(self):
        for name, rows in (("z0.npy", self.z0), ("z1.npy", self.z1), ("label.npy", self.label)):
            if not isinstance(rows, np.ndarray):
                continue
            if len(rows) < self.count or (len(rows) > self.count and not self.record):
                source = f"{RECORD} promises {self.count}" if self.record else f"z1.npy has {self.count}"
                raise UserError(f"{self.path / name} has {len(rows)} rows, but {source}: these files do not belong "
                                "together; copy or make them again")
        if isinstance(self.z0, np.ndarray) and self.z0.shape[1:] != self.shape:
            raise UserError(f"{self.path}: rows of z0.npy have shape {self.z0.shape[1:]}, those of z1.npy {self.shape}")
        if self.count == 0:
            raise UserError(f"{self.path} holds no pairs")

    def labels(self, indices, num_classes):
        """Return the labels of the pairs `indices`, one-hot float32 `(n, num_classes)`."""
        rows = self.label[indices]
        return as_float(rows) if rows.ndim == 2 else one_hot(torch.from_numpy(rows.astype(np.int64)), num_classes)

    def check(self, indices):
        """Return the `moments` of the pairs `indices`; raise UserError for a value that is not finite or no class."""
        rows = {"z0": as_float(self.z0[indices]), "z1": as_float(self.z1[indices])}
        for name, values in rows.items():
            bad = (~values.isfinite().flatten(1).all(1)).nonzero()
            if len(bad):
                raise UserError(f"{self.path}: {name} of pair {int(indices[int(bad[0])])} is not finite; delete the "
                                "folder and make its pairs again")
        if self.label is not None:
            label = np.asarray(self.label[indices])
            bad = (label < 0) | (label % 1 != 0) if label.ndim == 1 else (
                ~(np.isin(label, (0, 1)).all(1) & (label.sum(1) == 1)))
            if bad.any():
                raise UserError(f"{self.path / 'label.npy'}: the label of pair {int(indices[int(bad.argmax())])} is no "
                                "class")
        return moments(**rows)


def moments(z0, z1):
    """Return sums over pairs `(n, C, H, W)` that `findings` judges: add them up over parts (but "low" and "high")."""
    z0, z1 = z0.double(), z1.double()
    return {"pairs": len(z0), "values": z0.numel(), "low": z1.min().item(), "high": z1.max().item(),
            "beyond": (z1.abs() > OVERSHOOT).sum().item(), "z0_sum": z0.sum(0), "z1_sum": z1.sum(0),
            "z0_square": z0.square().sum().item(), "z1_square": z1.square().sum().item(),
            "product": (z0 * z1).sum().item(), "z0_beside": (z0[..., 1:] * z0[..., :-1]).sum().item(),
            "z1_beside": (z1[..., 1:] * z1[..., :-1]).sum().item()}


def noise_scale(found, name):
    """Return (root mean square, correlation of horizontal neighbours) of "z0" or "z1" in `moments`."""
    return np.sqrt(found[f"{name}_square"] / found["values"]), found[f"{name}_beside"] / max(found[f"{name}_square"],
                                                                                           1e-30)


def findings(folder, found):
    """Return one sentence for each way in which `moments` of a `PairFolder` are not those of noise and images."""
    slack = 4 / np.sqrt(2 * found["values"])  # the standard deviation of so many values is itself uncertain
    (z0_scale, z0_beside), (z1_scale, z1_beside) = noise_scale(found, "z0"), noise_scale(found, "z1")

    def like_noise(scale, beside):
        return (abs(scale / folder.noise_scale - 1) < NOISE_SCALE_SLACK + slack
                and abs(beside) < NOISE_CORRELATION + 2 * slack)

    said = []
    overshoot = found["beyond"] / found["values"]
    if (overshoot > 0.1 and like_noise(z1_scale, z1_beside)) or not like_noise(z0_scale, z0_beside):
        said.append(f"z0 has standard deviation {z0_scale:.2f} and correlation {z0_beside:.2f} between neighbours, z1 "
                    f"{z1_scale:.2f} and {z1_beside:.2f}; noise has {folder.noise_scale:g} and 0: are z0.npy and "
                    "z1.npy swapped?")
    elif abs(z0_scale / folder.noise_scale - 1) > NOISE_SCALE_SLACK / 2 + slack:
        said.append(f"z0 has standard deviation {z0_scale:.3f} instead of {folder.noise_scale:g}")
    low, high = found["low"], found["high"]
    if low == high:
        said.append(f"every value of z1 is {low + 0.0:g}: its images were never written")
    elif low >= 0 and high <= 1.001:
        said.append(f"all values of z1 lie in {low:.2f} to {high:.2f}; images are in [-1, 1]: use 2 * z1 - 1")
    elif overshoot > 0.05 and not said:
        said.append(f"z1 reaches from {low:.2f} to {high:.2f}, {overshoot:.0%} of it beyond {OVERSHOOT}; images are in "
                    "[-1, 1]")
    return [f"{folder.path}: {text}" for text in said]


def spread_rows(folder):
    """Return the numbers of a few pairs all over a `PairFolder`, the first and the last among them."""
    return np.unique(np.linspace(0, len(folder) - 1, QUICK_ROWS).round().astype(np.int64))


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
        homes = np.searchsorted(self.ends, indices, side="right")
        if len(set(homes.tolist())) == 1:
            return self._take_from(homes[0], indices)
        z0, z1 = (torch.empty(len(indices), *self.shape) for _ in range(2))
        label = torch.empty(len(indices), self.num_classes) if self.num_classes else None
        for home in np.unique(homes):
            places = np.flatnonzero(homes == home)
            for all_rows, rows in zip((z0, z1, label), self._take_from(home, indices[places]), strict=True):
                if rows is not None:
                    all_rows[places] = rows
        return z0, z1, label

    def _take_from(self, home, indices):
        """Return (z0, z1, label) of `indices` that all lie in the folder number `home`."""
        folder = self.folders[home]
        rows = indices - (self.ends[home] - len(folder))
        label = folder.labels(rows, self.num_classes) if self.num_classes else None
        return as_float(folder.z0[rows]), as_float(folder.z1[rows]), label

    def on_device(self, device):
        """Return (z0, z1, label) of all pairs as tensors on `device`."""
        z0, z1 = (torch.empty(len(self), *self.shape, device=device) for _ in range(2))
        label = torch.empty(len(self), self.num_classes, device=device) if self.num_classes else None
        for first in range(0, len(self), COPIED_AT_ONCE):
            part = np.arange(first, min(first + COPIED_AT_ONCE, len(self)))
            for all_rows, rows in zip((z0, z1, label), self.take(part), strict=True):
                if rows is not None:
                    all_rows[first:first + len(part)].copy_(rows)
        return z0, z1, label


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
        for text in findings(folder, folder.check(spread_rows(folder))):
            print(text, file=sys.stderr)
        if config.data.num_classes:
            _check_classes(folder, config.data.num_classes)
    check_origins(folders)
    return folders


def _check_classes(folder, num_classes):
    path = folder.path / "label.npy"
    if folder.label is None:
        raise UserError(f"{folder.path} has no label.npy, but config.data.num_classes is {num_classes}: set it to 0 or "
                        "use pairs of a class-conditional model")
    if folder.label.shape[1:] not in ((), (num_classes,)):
        raise UserError(f"{path} has labels of shape {folder.label.shape[1:]}, but config.data.num_classes is "
                        f"{num_classes}")
    if folder.label.ndim == 1 and (highest := int(folder.label[:len(folder)].max())) >= num_classes:
        raise UserError(f"{path} has class {highest}, but config.data.num_classes is {num_classes}")


def check_origins(folders, names=SAME_ORIGIN):
    """Raise UserError if two folders come from different checkpoints, directions … (`names`), or are the same pairs.

    Only folders with pairs.json tell their origin; the same pairs are known by the first one.
    """
    recorded = [folder for folder in folders if folder.record]
    for folder in recorded[1:]:
        first = recorded[0]
        different = [f"{name} is {folder.identity.get(name)} there and {first.identity.get(name)} in {first.path}"
                     for name in names if folder.identity.get(name) != first.identity.get(name)]
        if different:
            raise UserError(f"{folder.path} holds pairs of another origin: {'; '.join(different)}; keep them under "
                            "different roots")
    seen = {}
    for folder in folders:
        start = as_float(folder.z0[:1] if isinstance(folder.z0, np.ndarray) else folder.z0[range(1)])
        start = start.numpy().tobytes() + as_float(folder.z1[:1]).numpy().tobytes()
        if start in seen:
            raise UserError(f"{folder.path} holds the same pairs as {seen[start]} (z0 and z1 of the first are equal): "
                            "delete one of them")
        seen[start] = folder.path


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
