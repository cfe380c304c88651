"""Noise-image pairs on disk, and the batches that reflow trains on: read row by row, never held in memory."""

import concurrent.futures
import fractions
import pathlib
import warnings

import numpy as np
import torch

from datasets.batch import Batch, one_hot
from datasets.loading import flip_some, to_device
from datasets.npy_rows import NpyRows
from datasets.order import EndlessOrder
from datasets.pair_starts import NoiseStarts, noise_digest
from datasets.pair_writer import ARRAYS, RECORD, is_unfinished, read_record
from runtime import seeds
from runtime.errors import UserError

QUICK_ROWS = 256  # rows of a folder that are looked at when it is opened
LARGEST_PIXEL = 1.5


class PairFolder:
    """One folder of pairs: `z0.npy`, `z1.npy` and perhaps `label.npy`, ours or as the released code writes them.

    A folder in compact storage has no `z0.npy`: its z0 is drawn again from (seed, index).
    """

    def __init__(self, path):
        """Open the folder at `path`.

        Raises UserError if it is unfinished, a file is missing, shapes or lengths disagree, or the noise of a
        compact folder is not what it was made from.
        """
        self.path = pathlib.Path(path)
        self.record = read_record(self.path)
        if is_unfinished(self.path):
            raise UserError(f"{self.path} is unfinished: run its generate_data.py command again to complete it, or "
                            "with fewer pairs to use those that are there")
        self.z1 = NpyRows(self.path / "z1.npy")
        self.shape = self.z1.shape
        self.z0 = self._open_z0()
        has_label = (self.path / "label.npy").exists()
        self.label = NpyRows(self.path / "label.npy") if has_label else None
        self.count = self.record["count"] if self.record else len(self.z1)
        self._check_sizes()

    def __len__(self):
        """Return the number of pairs."""
        return self.count

    @property
    def z0_scale(self):
        """Standard deviation that z0 was drawn with."""
        return self.record["config"]["sampling"]["init_noise_scale"] if self.record else 1.0

    def take_z0(self, indices):
        """Return z0 of the pairs `indices`: float32 `(n, C, H, W)`."""
        return _as_float(self.z0.rows(indices)) if isinstance(self.z0, NpyRows) else self.z0.take(indices)

    def take_z1(self, indices):
        """Return z1 of the pairs `indices`: float32 `(n, C, H, W)`."""
        return _as_float(self.z1.rows(indices))

    def take_label(self, indices, num_classes):
        """Return the labels of the pairs `indices`, one-hot float32 `(n, num_classes)`."""
        label = torch.from_numpy(self.label.rows(indices))
        return label.float() if label.ndim == 2 else one_hot(label, num_classes)

    def check(self, indices):
        """Return the statistics of the pairs `indices`, a dict; raise UserError for NaN, infinity or a wrong label.

        z0_sum, z0_squares, values: sums over the values of z0, and their number; z1_low, z1_high: range of the images.
        """
        z0, z1 = self.take_z0(indices), self.take_z1(indices)
        for name, rows in (("z0", z0), ("z1", z1)):
            bad = (~rows.isfinite().flatten(1).all(1)).nonzero()
            if len(bad):
                raise UserError(f"{self.path}: {name} of pair {int(indices[int(bad[0])])} is not finite; delete the "
                                "folder and make its pairs again")
        if self.label is not None:
            self._check_labels(indices)
        return {"z0_sum": z0.double().sum().item(), "z0_squares": z0.double().square().sum().item(),
                "values": z0.numel(), "z1_low": z1.min().item(), "z1_high": z1.max().item()}

    def _open_z0(self):
        """Return the rows of z0, or in compact storage what draws them."""
        if not self.record or self.record["storage"] == "full":
            return NpyRows(self.path / "z0.npy")
        found = noise_digest(self.record["seed"], self.shape)
        if found != self.record["noise_digest"]:
            raise UserError(f"{self.path} is compact, but its noise cannot be drawn again here: the first noises have "
                            f"digest {found} and not {self.record['noise_digest']}; use numpy "
                            f"{self.record['software']['numpy']}, with which it was made")
        return NoiseStarts(self.record["seed"], self.shape, self.z0_scale)

    def _check_sizes(self):
        """Raise UserError if the arrays' shapes or lengths disagree."""
        if len(self.shape) != 3:
            raise UserError(f"{self.z1.path} has rows of shape {self.shape}; images (C, H, W) are needed")
        for rows in (self.z0, self.z1, self.label):
            if isinstance(rows, NpyRows):
                self._check_length(rows)
        if self.z0.shape != self.shape:
            raise UserError(f"{self.path}: rows of z0.npy have shape {self.z0.shape}, those of z1.npy {self.shape}")
        if self.count == 0:
            raise UserError(f"{self.path} holds no pairs")

    def _check_length(self, rows):
        if self.record and len(rows) < self.count:
            raise UserError(f"{rows.path} has {len(rows)} rows, but {RECORD} promises {self.count}; copy or make it "
                            "again")
        if not self.record and len(rows) != self.count:
            raise UserError(f"{rows.path} has {len(rows)} rows, but z1.npy has {self.count}: these files are not of "
                            "the same pairs")

    def _check_labels(self, indices):
        label = self.label.rows(indices)
        bad = label < 0 if label.ndim == 1 else ~(np.isin(label, (0, 1)).all(1) & (label.sum(1) == 1))
        if bad.any():
            raise UserError(f"{self.label.path}: the label of pair {int(indices[int(bad.argmax())])} is no class")


def open_folders(root):
    """Return the `PairFolder`s in `root` (its sub-folders, one per seed, or `root` itself), ordered by name.

    Raises UserError if there is none.
    """
    root = pathlib.Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is no folder; make pairs with generate_data.py --data_root {root}")
    found = [path for path in [root, *root.iterdir()] if _holds_pairs(path)]
    if not found:
        raise UserError(f"{root} holds no pairs: folders such as {root / '0'} with z0.npy and z1.npy are needed; make "
                        f"them with generate_data.py --data_root {root}")
    return [PairFolder(path) for path in sorted(found, key=lambda path: (len(path.name), path.name))]


def _holds_pairs(path):
    return path.is_dir() and any((path / name).exists() for name in (*ARRAYS, RECORD))


class PairSet:
    """All pairs under a root: the pairs of its folders, one after the other."""

    def __init__(self, folders, num_classes):
        """Take `PairFolder`s of one shape; num_classes: width of the labels, 0 for none. UserError if they differ."""
        self.folders, self.num_classes = folders, num_classes
        self.shape = folders[0].shape
        self.ends = np.cumsum([len(folder) for folder in folders])
        for folder in folders:
            self._check_folder(folder)

    def __len__(self):
        """Return the number of pairs."""
        return int(self.ends[-1])

    def take(self, indices):
        """Return (z0, z1, label) of int64 `indices` `(n,)`.

        z0, z1: float32 `(n, C, H, W)`; label: one-hot float32 `(n, num_classes)`, or None without classes.
        """
        z0, z1 = (torch.empty(len(indices), *self.shape) for _ in range(2))
        label = torch.empty(len(indices), self.num_classes) if self.num_classes else None
        homes = np.searchsorted(self.ends, indices, side="right")
        for home in np.unique(homes):
            folder, places = self.folders[home], np.flatnonzero(homes == home)
            rows = indices[places] - (self.ends[home] - len(folder))
            z0[places], z1[places] = folder.take_z0(rows), folder.take_z1(rows)
            if label is not None:
                label[places] = folder.take_label(rows, self.num_classes)
        return z0, z1, label

    def _check_folder(self, folder):
        if folder.shape != self.shape:
            raise UserError(f"{folder.path} holds pairs of shape {folder.shape}, {self.folders[0].path} of "
                            f"{self.shape}: they cannot be trained on together")
        if not self.num_classes:
            return
        if folder.label is None:
            raise UserError(f"{folder.path} has no label.npy, but config.data.num_classes is {self.num_classes}: set "
                            "it to 0 or use pairs of a class-conditional model")
        shape, numbers = folder.label.shape, folder.label.shape == ()
        if shape != (self.num_classes,) and not numbers:
            raise UserError(f"{folder.label.path} has labels of shape {shape}, but config.data.num_classes is "
                            f"{self.num_classes}")
        if numbers and (highest := int(folder.label.slice(0, len(folder)).max())) >= self.num_classes:
            raise UserError(f"{folder.label.path} has class {highest}, but config.data.num_classes is "
                            f"{self.num_classes}")


def open_pairs(root, config):
    """Return the `PairSet` of all folders under `root`, after a quick look at each.

    Raises UserError if a folder is unfinished or damaged or does not fit `config.data`; warns of z0 without unit
    variance and of z1 outside [-1.5, 1.5].
    """
    folders = open_folders(root)
    wanted = (config.data.num_channels, config.data.image_size, config.data.image_size)
    for folder in folders:
        if folder.shape != wanted:
            raise UserError(f"{folder.path} holds pairs of shape {folder.shape}, but config.data.num_channels and "
                            f"config.data.image_size ask for {wanted}")
        quick_check(folder)
    return PairSet(folders, config.data.num_classes)


def quick_check(folder):
    """Look at some pairs all over a `PairFolder`: UserError for NaN or infinity, warnings for unlikely values."""
    rows = np.unique(np.linspace(0, len(folder) - 1, QUICK_ROWS).round().astype(np.int64))
    for text in unlikely(folder, folder.check(rows)):
        warnings.warn(text, stacklevel=2)


def unlikely(folder, statistics):
    """Return sentences about what pairs of noise and images should not look like (swapped files above all)."""
    found = []
    values, mean = statistics["values"], statistics["z0_sum"] / statistics["values"]
    deviation = np.sqrt(max(0.0, statistics["z0_squares"] / values - mean**2))
    slack = 0.1 + 4 / np.sqrt(2 * values)  # the deviation of so many values is itself uncertain
    if abs(deviation / folder.z0_scale - 1) > slack:
        found.append(f"{folder.path}: z0 has standard deviation {deviation:.3f} instead of {folder.z0_scale:g}; are "
                     "z0.npy and z1.npy swapped?")
    if statistics["z1_low"] < -LARGEST_PIXEL or statistics["z1_high"] > LARGEST_PIXEL:
        found.append(f"{folder.path}: z1 reaches from {statistics['z1_low']:.2f} to {statistics['z1_high']:.2f}; "
                     "images lie in [-1, 1]; are z0.npy and z1.npy swapped?")
    return found


class PairSource:
    """An endless shuffled sequence of a `PairSet`: what `PairBatches` draws from."""

    def __init__(self, pairs, seed):
        """Take a `PairSet` and the seed of its order."""
        self.pairs, self.order = pairs, EndlessOrder(len(pairs), 1, seed)

    def take(self, positions):
        """Return (z0, z1, label) at int64 `positions` `(n,)` of the endless sequence, each one after the other."""
        if not len(positions):
            return self.pairs.take(positions)
        return self.pairs.take(self.order.indices(0, int(positions[0]), int(positions[-1]) + 1))


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
    function of (seed, update, place). A thread reads the same places of the next update ahead.
    """

    def __init__(self, pairs, batch_size, seed, h_flip, device, real_pairs=None, real_share=0.0):
        """Take a `PairSet`, the global batch size, the seed of order and flips, and the device.

        h_flip: flip z0 and z1 of a pair together, left-right, with probability 1/2. real_pairs, real_share: a
        second `PairSet` and the share of samples that come from it.
        """
        self.pairs, self.batch_size, self.seed, self.h_flip = pairs, batch_size, seed, h_flip
        self.device = torch.device(device)
        self.source = PairSource(pairs, seed)
        self.real_source = PairSource(real_pairs, seed) if real_share else None
        self.real_share = fractions.Fraction(real_share).limit_denominator(10**6)
        self.thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="read pairs")
        self.ahead = {}  # (update, low, high) -> future of the rows

    def __len__(self):
        """Return the number of pairs."""
        return len(self.pairs)

    @property
    def shape(self):
        """Shape (C, H, W) of an image."""
        return self.pairs.shape

    def batch(self, update, low, high):
        """Return the `Batch` of places [low, high) of `update`, on the device."""
        waiting = self.ahead.pop((update, low, high), None)
        z0, z1, label = waiting.result() if waiting else self._read(update, low, high)
        self.ahead = {key: rows for key, rows in self.ahead.items() if key[0] >= update}  # drops what nobody fetched
        self.ahead[update + 1, low, high] = self.thread.submit(self._read, update + 1, low, high)
        z0, z1 = to_device(z0, self.device), to_device(z1, self.device)
        label = None if label is None else to_device(label, self.device)
        if self.h_flip:
            flipped = self._draw_flips(update)[low:high]
            z0, z1 = flip_some(z0, flipped), flip_some(z1, flipped)
        return Batch(z0=z0, z1=z1, label=label)

    def _read(self, update, low, high):
        """Return (z0, z1, label) of the places, in host memory."""
        positions = update * self.batch_size + np.arange(low, high)
        if self.real_source is None:
            return self.source.take(positions)
        is_real, places = split_by_share(positions, self.real_share)
        return _mix(is_real, self.source.take(places[~is_real]), self.real_source.take(places[is_real]))

    def _draw_flips(self, update):
        """Return which samples of the global batch are flipped, bool `(batch_size,)`."""
        generator = seeds.step_generator(self.seed, update, seeds.FLIP, self.device)
        return torch.rand(self.batch_size, generator=generator, device=self.device) < 0.5


def _mix(is_real, usual, real):
    """Return the tensors of `usual` and `real` in one, each sample at its place; None where they are None."""
    mask = torch.from_numpy(is_real)
    mixed = []
    for a, b in zip(usual, real, strict=True):
        if a is None:
            mixed.append(None)
            continue
        mixed.append(a.new_empty(len(mask), *a.shape[1:]))
        mixed[-1][~mask], mixed[-1][mask] = a, b
    return mixed


def create_pair_batches(config, device):
    """Return the `PairBatches` of `config.data.reflow_data_root`, with the real pairs that the config mixes in.

    Raises UserError for pairs that cannot be trained on with this config.
    """
    pairs = open_pairs(config.data.reflow_data_root, config)
    if len(pairs) < config.training.batch_size:
        raise UserError(f"{config.data.reflow_data_root} holds {len(pairs)} pairs, fewer than training.batch_size "
                        f"{config.training.batch_size}: lower it or make more pairs")
    real_pairs = None
    if config.flow.real_data_share > 0:
        if not config.data.real_pairs_root:
            raise UserError("config.flow.real_data_share is above 0, but config.data.real_pairs_root is empty: make "
                            "pairs with sampling.direction from_z1 and name their folder")
        real_pairs = open_pairs(config.data.real_pairs_root, config)
    return PairBatches(pairs, config.training.batch_size, config.seed, config.flow.h_flip, device, real_pairs,
                       config.flow.real_data_share)


def _as_float(rows):
    return torch.from_numpy(rows.astype(np.float32, copy=False))
