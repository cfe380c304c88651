"""Stored pairs as training data: all folders of a root, shuffled, in batches, read row by row, never held in memory."""

import fractions

import numpy as np
import torch

from datasets.batches import Batch, EndlessOrder, Flips, ReadAhead, to_device
from datasets.pair_folder import open_folders, quick_check
from runtime.errors import UserError


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
            folder.fill_z0(z0, places, rows)
            folder.fill_z1(z1, places, rows)
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

    def __init__(self, pairs, batch_size, seed, device, flips=None, real_pairs=None, real_share=0.0):
        """Take a `PairSet`, the global batch size, the seed of order and flips, and the device.

        flips: `Flips` of z0 and z1 of a pair together, or None; they keep z0 white noise. real_pairs, real_share: a
        second `PairSet` and the share of samples that come from it.
        """
        self.pairs, self.batch_size, self.seed = pairs, batch_size, seed
        self.flips = flips
        self.device = torch.device(device)
        self.source = PairSource(pairs, seed)
        self.real_source = PairSource(real_pairs, seed) if real_share else None
        self.real_share = fractions.Fraction(real_share).limit_denominator(10**6)
        self.read = ReadAhead(self._read, self.device)

    def __len__(self):
        """Return the number of pairs."""
        return len(self.pairs)

    @property
    def shape(self):
        """Shape (C, H, W) of an image."""
        return self.pairs.shape

    def batch(self, update, low, high):
        """Return the `Batch` of places [low, high) of `update`, on the device."""
        z0, z1, label = self.read(update, low, high)
        z0, z1 = to_device(z0, self.device), to_device(z1, self.device)
        if self.flips is not None:
            z0, z1 = self.flips(update, low, high, z0, z1)
        return Batch(z0, z1, None if label is None else to_device(label, self.device))

    def _read(self, update, low, high):
        """Return (z0, z1, label) of the places, in host memory, pinned when a GPU will fetch them."""
        rows = self._gather(update * self.batch_size + np.arange(low, high))
        return [row if row is None or self.device.type != "cuda" else row.pin_memory() for row in rows]

    def _gather(self, positions):
        """Return (z0, z1, label) of int64 `positions` in the endless sequence of samples."""
        if self.real_source is None:
            return self.source.take(positions)
        is_real, places = split_by_share(positions, self.real_share)
        return _mix(is_real, self.source.take(places[~is_real]), self.real_source.take(places[is_real]))


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
    flips = Flips(config.seed, config.training.batch_size, config.flow.h_flip, config.data.use_aug)
    return PairBatches(pairs, config.training.batch_size, config.seed, device, flips, real_pairs,
                       config.flow.real_data_share)
