"""The data side of generate_data.py: the initial points of pairs, and the folder that it fills block by block.

A folder of pairs is consistent at any moment. It holds the arrays, `pairs.json` (what the pairs are) and the journal
`blocks.jsonl`, to which every process appends a line once a block, a fixed range of consecutive pairs, is on disk.
Until all blocks are, the headers of the arrays keep their old number of rows: no missing row is read, and a folder that
is being extended stays usable.
"""

import dataclasses
import hashlib
import json
import os
import shutil

import numpy as np
import torch

from datasets.batches import check_finite, check_labels, pixels_to_float, some_of
from datasets.cache import npy_header
from datasets.pairs import ARRAYS, METADATA, NoiseSource, as_float, as_one_hot, image_shape, open_rows, read_metadata
from datasets.sources import load_images
from runtime import seeds
from runtime.files import file_digest, file_lock, read_json_lines, write_json, write_text
from runtime.terminal import UserError

JOURNAL, LOCK = "blocks.jsonl", ".lock"
# Entries of PairJob.identity that are digests, and what messages call them.
DIGESTS = {"checkpoint": "the content of --ckpt_path", "images": "the data set", "noise": "the noise of this numpy",
           **{name: f"the content of --{name}" for name in ("z0_path", "z1_path", "label_path")}}
ENTRY = ("block", "pairs", "nfe_sum", "nfe_worst", "z1_rounding")  # the fields of a line of the journal, all numbers


@dataclasses.dataclass(frozen=True)
class PairJob:
    """The pairs to make, in blocks of consecutive ones.

    layouts: {file name: dtype of a row, such as `np.dtype(("<f4", (3, 32, 32)))`}. identity: {name: value} of
    everything that the values of a pair depend on. checkpoint: path of the network, which messages name.
    """

    count: int
    block_size: int
    layouts: dict
    identity: dict
    checkpoint: str = ""

    def block_range(self, block):
        """Return the range of the pairs of a block."""
        return range(block * self.block_size, min((block + 1) * self.block_size, self.count))

    def unfinished(self, done):
        """Return the blocks that are not in the journal entries `done`, or are there with fewer pairs."""
        blocks = range(-(-self.count // self.block_size))
        return [b for b in blocks if done.get(b, {"pairs": 0})["pairs"] < len(self.block_range(b))]


def row_offset(layout, row):
    """Return the position of `row` in an npy file, in bytes."""
    return len(npy_header(layout, 0)) + row * layout.itemsize


def locked(folder):
    """Lock `folder` (created if missing) inside a `with` block; UserError if another run has locked it."""
    return file_lock(folder / LOCK, "making pairs", f"another run is making pairs in {folder}; wait for it, or choose "
                     "another --data_root or --config.seed")


def prepare(folder, job):
    """Prepare a locked `folder` for `job`; return (number of pairs that it already offers, list of unfinished blocks).

    Raises UserError, changing nothing, for a folder of other pairs and for a disk that is too small.
    """
    metadata, done = read_metadata(folder), read_journal(folder)
    if metadata is None and any((folder / name).exists() for name in ARRAYS):
        raise UserError(f"{folder} has arrays but no {METADATA}: another program made them; choose another --data_root")
    if metadata is not None:
        there, here = metadata["identity"], json.loads(json.dumps(job.identity))  # as JSON has it: tuples are lists
        differences = [f"{DIGESTS[name]} differs" if name in DIGESTS and there.get(name) and here.get(name) else
                       f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
                       for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
        if differences:
            maker = f", made with {metadata['checkpoint']}" if metadata.get("checkpoint") else ""
            raise UserError(f"{folder} holds other pairs{maker}: {'; '.join(differences)}. Give the same values to "
                            "continue, or choose another --data_root")
    _check_arrays(folder, job, done)
    offered = metadata["count"] if metadata and metadata["complete"] else 0
    if offered >= job.count:
        return offered, []
    if metadata is None:
        write_json(folder / METADATA, {"complete": False, "count": 0, "checkpoint": job.checkpoint,
                                       "identity": job.identity})
    for name, layout in job.layouts.items():
        _write(folder / name, npy_header(layout, offered), 0, least=row_offset(layout, job.count))
    return offered, job.unfinished(done)


def _check_arrays(folder, job, done):
    """Raise UserError if an array lacks finished rows (deleted or cut short), or the disk lacks room for the others."""
    missing, rows = 0, max((entry["block"] * job.block_size + entry["pairs"] for entry in done.values()), default=0)
    for name, layout in job.layouts.items():
        path = folder / name
        if rows and (not path.exists() or path.stat().st_size < row_offset(layout, rows)):
            raise UserError(f"{path} is missing or cut short, although {len(done)} blocks are recorded as finished: "
                            f"restore it, or delete {folder} to make its pairs again")
        taken = path.stat().st_blocks * 512 if path.exists() else 0
        missing += max(0, row_offset(layout, job.count) - taken)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise UserError(f"{job.count} pairs need another {missing / 1e6:,.1f} MB in {folder}, where {free / 1e6:,.1f} "
                        "MB are free: make room, or choose another --data_root, fewer pairs or pair_storage compact")


def read_journal(folder):
    """Return {block: entry} of the journal: of several the one with more pairs; damaged lines are skipped."""
    done = {}
    for entry in read_json_lines(folder / JOURNAL):
        if (all(isinstance(entry.get(name), (int, float)) and entry[name] >= 0 for name in ENTRY)
                and entry["pairs"] >= done.get(entry["block"], entry)["pairs"]):
            done[entry["block"]] = entry
    return done


def write_block(folder, job, block, rows, nfe):
    """Write a block's `rows`, {file name: float tensor}, into a prepared folder, and then its line of the journal.

    One-hot labels become class numbers where the layout has numbers. nfe: int64 `(n,)`. Raises UserError for values
    that are not finite or do not fit float16.
    """
    indices, stored = job.block_range(block), {}
    for name, values in rows.items():
        if values is not None:
            check_finite(values, indices, f"{name} of pair", "check the checkpoint's weights")
    for name, layout in job.layouts.items():
        values = rows[name] if layout.shape else rows[name].argmax(1)
        with np.errstate(over="ignore"):  # float16 has no numbers above 65504; checked below
            stored[name] = np.ascontiguousarray(values.numpy(), dtype=layout.base)
    rounding = float(np.abs(stored["z1.npy"] - rows["z1.npy"].numpy()).max())
    if not np.isfinite(rounding):
        raise UserError("z1 has values beyond the range of float16: use --config.sampling.pair_storage full")
    for name, layout in job.layouts.items():
        _write(folder / name, stored[name].tobytes(), row_offset(layout, indices.start))
    entry = dict(zip(ENTRY, (block, len(indices), int(nfe.sum()), int(nfe.max()), rounding), strict=True))
    _write(folder / JOURNAL, f"\n{json.dumps(entry)}\n".encode())  # the line before may have been cut off


def finish(folder, job, origin):
    """Write `job.count` to the headers, and `origin`, {name: value} of what made the pairs, to `pairs.json`."""
    done = read_journal(folder)
    if missing := job.unfinished(done):
        raise UserError(f"{folder}: block {missing[0]} is missing; run the same command again")
    write_text(folder / JOURNAL, "".join(json.dumps(done[block]) + "\n" for block in sorted(done)))
    for name, layout in job.layouts.items():
        _write(folder / name, npy_header(layout, job.count), 0)
    entries = [entry for block, entry in done.items() if len(job.block_range(block))]
    pairs = sum(entry["pairs"] for entry in entries)  # the last block may hold more pairs than job.count
    write_json(folder / METADATA, {
        "complete": True, "count": job.count, **origin, "nfe_mean": sum(entry["nfe_sum"] for entry in entries) / pairs,
        "nfe_worst": max(entry["nfe_worst"] for entry in entries),
        "z1_rounding": max(entry["z1_rounding"] for entry in entries), "identity": job.identity})


def _write(path, content, offset=None, least=0):
    """Write and flush bytes at `offset` of a file, or its end; it gets at least `least` bytes. OSErrors name it."""
    try:
        with open(path, "ab" if offset is None else "r+b" if path.exists() else "w+b", buffering=0) as file:
            file.seek(0 if offset is None else offset)
            while content:
                content = content[file.write(content):]
            if os.fstat(file.fileno()).st_size < least:
                file.truncate(least)
            os.fsync(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


class InitialPoints:
    """The initial points of pairs by pair number, for a row of `flows.samplers.COUPLINGS`.

    z0, z1 `(n, C, H, W)` and one-hot label `(n, num_classes)`, or None, are float32. available: the largest number of
    pairs, None for no limit. identity: {name: value} of everything they depend on. image_set: the images of the data
    set that the direction uses, or None. Raises UserError for files and fields that do not fit the config.
    """

    def __init__(self, config, coupling, z0_path="", z1_path="", label_path=""):
        settings, shape, closed_form = config.sampling, image_shape(config), coupling.velocity == "closed form"
        self.seed, self.num_classes = config.seed, config.data.num_classes
        self.class_label, self.random_flip = settings.class_label, settings.random_flip
        seeds.index_labels(self.seed, [], self.num_classes, self.class_label)  # refuses a class that does not exist
        if self.num_classes and self.class_label < 0 and closed_form:
            raise UserError("the closed-form velocity of all images has no classes: set config.sampling.class_label, "
                            "or config.data.num_classes 0")
        if self.num_classes and self.class_label < 0 and z1_path and not label_path:
            raise UserError("--z1_path holds images without classes: give --label_path or config.sampling.class_label")
        if label_path and (self.class_label >= 0 or not self.num_classes):
            raise UserError("--label_path and config.sampling.class_label both set the classes: leave one out"
                            if self.num_classes else "--label_path needs the number of classes: set data.num_classes")
        if self.random_flip and (z1_path or (closed_form and coupling.given == "image")):
            raise UserError("sampling.random_flip does not apply to --z1_path and to gt_v_from_z1: leave it out")
        paths = {"z0_path": z0_path, "z1_path": z1_path, "label_path": label_path}
        self.rows = {flag: open_rows(path) for flag, path in paths.items() if path}
        self.identity = {flag: file_digest(paths[flag]) for flag in self.rows}
        self.available = min(map(len, self.rows.values()), default=None)
        if label_path and len(self.rows["label_path"]) != len(self.rows["z1_path"]):
            raise UserError(f"{label_path} has {len(self.rows['label_path'])} labels, but {z1_path} has "
                            f"{len(self.rows['z1_path'])} images: give a label for each image")
        for flag, rows in self.rows.items():
            if flag == "label_path":
                check_labels(rows, label_path, self.num_classes)
            elif rows.shape[1:] != shape or rows.dtype.kind != "f" or not len(rows):
                raise UserError(f"{paths[flag]} holds {len(rows)} {rows.dtype} rows of shape {rows.shape[1:]}; the "
                                f"config needs floating-point rows of shape {shape} (channels, height, width)")
        self.noise, self.image_set = self.rows.get("z0_path"), None
        if self.noise is None and (closed_form or coupling.given != "image"):
            self.noise = NoiseSource(self.seed, shape, settings.init_noise_scale)
            self.identity["noise"] = self.noise.digest()
        from_images = not z1_path and coupling.given != "noise"
        if from_images or closed_form:
            self.image_set = load_images(config)
            if self.class_label >= 0:
                self.image_set = self.image_set.choose(np.flatnonzero(self.image_set.labels == self.class_label),
                                                       f"{self.image_set.source} (class_label {self.class_label})")
            self.identity["images"] = images_digest(self.image_set)
        if from_images:
            self.identity["sampling.random_flip"] = self.random_flip
        if from_images and self.noise is None:  # a second pass over the images gives new pairs only if they are flipped
            self.available = len(self.image_set) * (2 if self.random_flip else 1)

    def z0(self, indices):
        """Return the noise of the pairs `indices`."""
        return as_float(self.noise[np.array(indices)])

    def z1(self, indices):
        """Return the images of the pairs `indices`: pair i has image i mod N; random_flip flips it every other time."""
        if "z1_path" in self.rows:
            return as_float(self.rows["z1_path"][np.array(indices)])
        rounds, numbers = np.divmod(np.array(indices), len(self.image_set))
        images = pixels_to_float(torch.from_numpy(self.image_set.images[numbers]))
        if not self.random_flip:
            return images
        draws = [seeds.index_generator(self.seed, int(k), seeds.FLIP).random() < 0.5 for k in numbers]
        mirrored = torch.from_numpy(np.array(draws) ^ (rounds % 2 == 1))
        return torch.where(mirrored[:, None, None, None], images.flip(-1), images)

    def label(self, indices):
        """Return the classes: those of the file, sampling.class_label, those of the images, or drawn; or None."""
        if not self.num_classes:
            return None
        if "label_path" in self.rows:
            label = self.rows["label_path"][np.array(indices)]
        elif self.image_set is not None and self.class_label < 0:
            label = self.image_set.labels[np.array(indices) % len(self.image_set)]
        else:
            label = seeds.index_labels(self.seed, indices, self.num_classes, self.class_label).numpy()
        return as_one_hot(label, self.num_classes)


def images_digest(image_set):
    """Return a digest of a data set: its shape, 512 evenly spaced images and all labels."""
    images, labels = image_set.images, image_set.labels
    digest = hashlib.sha256(repr(images.shape).encode())
    for part in (images[some_of(len(images), 512)], np.empty(0) if labels is None else labels):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]
