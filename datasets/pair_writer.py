"""The folder that generate_data.py fills: arrays written in place, block by block, consistent at any moment.

A folder holds the arrays (`z0.npy`, `z1.npy`, `label.npy`), `pairs.json` (what the pairs are) and `blocks.jsonl`
(which blocks are on disk). A block is a fixed range of consecutive pairs. It is finished once its line is in the
journal, and that line is written after the block's rows have reached the disk. Each process appends to a journal of
its own; the main process merges them. Until every block is finished the arrays' headers promise no more rows than
before, so nobody reads a row that is missing, and a folder that is being extended stays usable.
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil

import numpy as np

from runtime.errors import UserError
from runtime.files import file_lock, write_json, write_text

LAYOUT_VERSION = 1
RECORD, JOURNAL, LOCK = "pairs.json", "blocks.jsonl", ".lock"
ARRAYS = ("z0.npy", "z1.npy", "label.npy")
SPARE_BYTES = 1 << 20  # for the journal, the record and the picture
RECORD_TYPES = {"complete": bool, "count": int, "version": int, "identity": dict}
IDENTITY_TYPES = {"seed": int, "sampling.direction": str, "sampling.pair_storage": str,
                  "sampling.init_noise_scale": (int, float)}
ENTRY_TYPES = {"block": int, "pairs": int, "nfe_sum": int, "nfe_worst": int, "z1_rounding": (int, float)}


@dataclasses.dataclass(frozen=True)
class PairJob:
    """What to make: `count` pairs in blocks of `block_size`.

    layouts: {file name: dtype of a row}, such as `np.dtype(("<f4", (3, 32, 32)))`. identity: {name: value} of
    everything that a pair's values depend on.
    """

    count: int
    block_size: int
    layouts: dict
    identity: dict

    def block_range(self, block):
        """Return the pairs of a block, a range."""
        return range(block * self.block_size, min((block + 1) * self.block_size, self.count))

    @property
    def blocks(self):
        """Numbers of all blocks."""
        return range(-(-self.count // self.block_size))

    def unfinished(self, done):
        """Return the blocks that the journal entries `done` lack or have with fewer pairs."""
        return [b for b in self.blocks if done.get(b, {"pairs": 0})["pairs"] < len(self.block_range(b))]


def npy_header(layout, count):
    """Return the npy header of `count` rows. Its length does not depend on `count`, so it can be replaced in place."""
    buffer = io.BytesIO()
    fields = {"descr": layout.base.str, "fortran_order": False, "shape": (count, *layout.shape)}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def row_offset(layout, row):
    """Return the position of `row` in an npy file, in bytes."""
    return len(npy_header(layout, 0)) + row * layout.itemsize


def locked(folder):
    """Keep every other run out of `folder` (made if missing) inside a `with` block."""
    return file_lock(folder / LOCK, "making pairs", f"another run is making pairs in {folder}; wait for it, or choose "
                     "another --data_root or --config.seed")


def prepare(folder, job):
    """Make `folder` ready for `job`; return (number of pairs it already offers, list of unfinished blocks).

    The caller holds the lock. Raises UserError, changing nothing, for a folder of other pairs and for a disk that
    is too small.
    """
    record, done = read_record(folder), read_journals(folder)
    foreign = [name for name in ARRAYS if (folder / name).exists()]
    if record is None and foreign:
        raise UserError(f"{folder} has {foreign[0]} but no {RECORD}: these pairs were not made by this program; "
                        "choose another --data_root or --config.seed")
    if record is not None:
        _require_same(folder, record["identity"], job.identity)
    _require_arrays(folder, job, done)
    offered = record["count"] if record and record["complete"] else 0
    if offered >= job.count:
        return offered, []
    merge_journals(folder)
    if record is None:
        write_json(folder / RECORD, {"complete": False, "count": 0, "version": LAYOUT_VERSION,
                                     "identity": job.identity})
    for name, layout in job.layouts.items():
        with _open(folder / name) as file:
            _write_at(file, npy_header(layout, offered), 0)
            if os.fstat(file.fileno()).st_size < row_offset(layout, job.count):
                file.truncate(row_offset(layout, job.count))
    return offered, job.unfinished(done)


def read_record(folder):
    """Return the content of `pairs.json`, or None if there is none.

    Raises UserError if it is damaged or of another layout version. `identity` of a complete record has at least the
    names of IDENTITY_TYPES.
    """
    path = pathlib.Path(folder) / RECORD
    try:
        record = json.loads(path.read_text())
        _require_types(record, RECORD_TYPES)
        if record["complete"]:
            _require_types(record["identity"], IDENTITY_TYPES)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); delete the folder and make its pairs again") from None
    if record["version"] != LAYOUT_VERSION:
        raise UserError(f"{path} has layout version {record['version']}; this program reads version {LAYOUT_VERSION}")
    return record


def _require_types(values, types):
    """Raise ValueError unless `values` is a dict with a value of its type, not below 0, for each name of `types`."""
    if not isinstance(values, dict):
        raise ValueError(f"a {type(values).__name__} where named values belong")
    for name, kind in types.items():
        value = values.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} is {'missing' if name not in values else repr(value)[:40]}")
        if isinstance(value, (int, float)) and not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}")


def _require_same(folder, there, here):
    """Raise UserError with what differs between the pairs in `folder` and those asked for."""
    here = json.loads(json.dumps(here))  # as it would come back from the file: lists for tuples
    differences = [f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
                   for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if differences:
        raise UserError(f"{folder} holds other pairs: {'; '.join(differences)}. Give the same values to continue, "
                        "or choose another --data_root or --config.seed")


def _require_arrays(folder, job, done):
    """Raise UserError if an array lacks finished rows (somebody deleted or cut it), or the disk room for the others."""
    missing, rows = 0, _rows_written(job, done)
    for name, layout in job.layouts.items():
        path = folder / name
        if rows and (not path.exists() or path.stat().st_size < row_offset(layout, rows)):
            raise UserError(f"{path} is missing or cut short, although {len(done)} blocks are recorded as finished: "
                            f"restore it, or delete {folder} to make its pairs again")
        taken = path.stat().st_blocks * 512 if path.exists() else 0
        missing += max(0, row_offset(layout, job.count) - taken)
    free = shutil.disk_usage(folder).free
    if missing and missing + SPARE_BYTES > free:
        raise UserError(f"{job.count} pairs need another {missing / 1e6:,.1f} MB in {folder}, where {free / 1e6:,.1f} "
                        "MB are free: make room, choose another --data_root, fewer pairs, or "
                        "--config.sampling.pair_storage compact")


def _rows_written(job, done):
    """Return the number of rows up to the last that the journal entries `done` call finished."""
    return max((entry["block"] * job.block_size + entry["pairs"] for entry in done.values()), default=0)


def merge_journals(folder):
    """Replace the processes' journals by one, ordered by block; return {block: its entry}."""
    done = read_journals(folder)
    if done:
        write_text(folder / JOURNAL, "".join(json.dumps(done[block]) + "\n" for block in sorted(done)))
    for path in _process_journals(folder):
        path.unlink()
    return done


def read_journals(folder):
    """Return {block: its entry} of all journals in `folder`; of two entries for a block the one with more pairs.

    A line that is cut off, damaged or lacks a field counts for nothing: its block is made again.
    """
    done = {}
    for path in [folder / JOURNAL, *_process_journals(folder)]:
        text = path.read_text(errors="replace") if path.exists() else ""
        for line in text.split("\n")[:-1]:  # what follows the last newline was cut off
            with contextlib.suppress(ValueError, RecursionError):
                entry = json.loads(line)
                _require_types(entry, ENTRY_TYPES)
                if entry["pairs"] >= done.get(entry["block"], entry)["pairs"]:
                    done[entry["block"]] = entry
    return done


def _process_journals(folder):
    return sorted(folder.glob("blocks.process*.jsonl"))


class BlockWriter(contextlib.ExitStack):
    """Writes one process's blocks into a prepared folder; a context manager."""

    def __init__(self, folder, job, rank):
        """Open the arrays in `folder` and the journal of process `rank`."""
        super().__init__()
        self.folder, self.job = folder, job
        self.files = {name: self.enter_context(_open(folder / name)) for name in job.layouts}
        self.journal = self.enter_context(_open(folder / f"blocks.process{rank}.jsonl"))

    def write(self, block, rows, nfe):
        """Write a block's `rows`, {file name: float tensor}, and then its line in the journal.

        One-hot labels become class numbers where the layout has numbers. nfe: int64 `(n,)`. Raises UserError for
        values that are not finite. On a full disk (OSError) what was finished stays finished.
        """
        indices = self.job.block_range(block)
        for name, values in rows.items():
            bad = [] if values is None else (~values.isfinite().flatten(1).all(1)).nonzero()
            if len(bad):
                raise UserError(f"{name} of pair {indices[int(bad[0])]} is not finite; check the checkpoint's weights")
        stored = {name: _as_stored(rows[name], layout) for name, layout in self.job.layouts.items()}
        rounding = float(np.abs(stored["z1.npy"] - rows["z1.npy"].numpy()).max())
        if not np.isfinite(rounding):
            raise UserError("z1 has values beyond the range of float16: use --config.sampling.pair_storage full")
        entry = {"block": block, "pairs": len(indices), "nfe_sum": int(nfe.sum()), "nfe_worst": int(nfe.max()),
                 "z1_rounding": rounding}
        for name, layout in self.job.layouts.items():
            _write_at(self.files[name], stored[name].reshape(-1).view(np.uint8), row_offset(layout, indices.start))
        for file in self.files.values():
            os.fsync(file)
        _write_at(self.journal, (json.dumps(entry) + "\n").encode(), os.fstat(self.journal.fileno()).st_size)
        os.fsync(self.journal)


def _as_stored(rows, layout):
    """Return a tensor as an array in the layout's type; one-hot labels become numbers where the layout has numbers."""
    with np.errstate(over="ignore"):  # float16 ends at 65504
        return np.ascontiguousarray(rows.numpy() if layout.shape else rows.argmax(1).numpy(), dtype=layout.base)


def finish(folder, job, record):
    """Let the arrays' headers promise `job.count` rows, and write `record` with what was measured to `pairs.json`.

    The caller holds the lock and every block is in the journals, which are merged.
    """
    done = merge_journals(folder)
    if missing := job.unfinished(done):
        raise UserError(f"{folder}: block {missing[0]} is missing; run the same command again")
    for name, layout in job.layouts.items():
        with _open(folder / name) as file:
            file.truncate(row_offset(layout, _rows_written(job, done)))
            _write_at(file, npy_header(layout, job.count), 0)
            os.fsync(file)
    entries = [done[block] for block in job.blocks]
    pairs = sum(entry["pairs"] for entry in entries)  # a last block may hold more than are asked for now
    measured = {"nfe_mean": sum(entry["nfe_sum"] for entry in entries) / pairs,
                "nfe_worst": max(entry["nfe_worst"] for entry in entries),
                "z1_rounding": max(entry["z1_rounding"] for entry in entries)}
    write_json(folder / RECORD, {"complete": True, "count": job.count, "version": LAYOUT_VERSION, **record,
                                 **measured, "identity": job.identity})


def _open(path):
    """Return the file at `path`, made if missing, for writing in place."""
    return open(path, "r+b", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o644))


def _write_at(file, content, offset):
    """Write all of `content` (bytes) at `offset`."""
    content = memoryview(content)
    while len(content):
        try:
            written = os.pwrite(file.fileno(), content, offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file.name)) from None
        content, offset = content[written:], offset + written
