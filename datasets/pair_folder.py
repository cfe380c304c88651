"""One folder of noise-image pairs, ours or of the released code: opening it, reading rows, looking for damage."""

import pathlib
import warnings

import numpy as np
import torch

from datasets.batches import one_hot
from datasets.npy_rows import NpyRows
from datasets.pair_starts import NoiseStarts, noise_digest
from datasets.pair_writer import ARRAYS, RECORD, is_unfinished, read_record
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
        return self._take(self.fill_z0, indices)

    def take_z1(self, indices):
        """Return z1 of the pairs `indices`: float32 `(n, C, H, W)`."""
        return self._take(self.fill_z1, indices)

    def fill_z0(self, out, places, indices):
        """Put z0 of the pairs `indices` into the rows `places` of `out`, float32 `(N, C, H, W)`."""
        if isinstance(self.z0, NpyRows):
            _fill(out, places, self.z0, indices)
        else:
            out[places] = self.z0.take(indices)

    def fill_z1(self, out, places, indices):
        """Put z1 of the pairs `indices` into the rows `places` of `out`, float32 `(N, C, H, W)`."""
        _fill(out, places, self.z1, indices)

    def _take(self, fill, indices):
        out = torch.empty(len(indices), *self.shape)
        fill(out, np.arange(len(indices)), indices)
        return out

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


def quick_check(folder):
    """Look at some pairs all over a `PairFolder`: UserError for NaN or infinity, warnings for unlikely values."""
    for text in unlikely(folder, folder.check(spread_rows(folder))):
        warnings.warn(text, stacklevel=2)


def spread_rows(folder):
    """Return the numbers of a few pairs all over a `PairFolder`, the first and the last among them."""
    return np.unique(np.linspace(0, len(folder) - 1, QUICK_ROWS).round().astype(np.int64))


def z0_deviation(statistics):
    """Return the standard deviation of the values of z0 (see `PairFolder.check`)."""
    mean = statistics["z0_sum"] / statistics["values"]
    return np.sqrt(max(0.0, statistics["z0_squares"] / statistics["values"] - mean**2))


def unlikely(folder, statistics):
    """Return sentences about what pairs of noise and images should not look like (swapped files above all)."""
    found = []
    deviation = z0_deviation(statistics)
    slack = 0.1 + 4 / np.sqrt(2 * statistics["values"])  # the deviation of so many values is itself uncertain
    if abs(deviation / folder.z0_scale - 1) > slack:
        found.append(f"{folder.path}: z0 has standard deviation {deviation:.3f} instead of {folder.z0_scale:g}; are "
                     "z0.npy and z1.npy swapped?")
    if statistics["z1_low"] < -LARGEST_PIXEL or statistics["z1_high"] > LARGEST_PIXEL:
        found.append(f"{folder.path}: z1 reaches from {statistics['z1_low']:.2f} to {statistics['z1_high']:.2f}; "
                     "images lie in [-1, 1]; are z0.npy and z1.npy swapped?")
    return found


def _fill(out, places, rows, indices):
    """Put the rows `indices` of an `NpyRows` into the rows `places` of a float32 tensor, without a copy if they are."""
    if rows.dtype == np.float32:
        rows.read_into(out.numpy(), places.tolist(), indices)
    else:
        out[places] = torch.from_numpy(rows.rows(indices)).float()
