"""The folder that generate_data.py fills: arrays written in place, block by block, consistent at any moment.

A folder holds the arrays, `pairs.json` (what the pairs are) and the journal `blocks.jsonl` (which blocks, fixed ranges
of consecutive pairs, are on disk). All processes append to it, a line after the block's rows have reached the disk.
Until every block is finished the arrays' headers promise no more rows than before, so nobody reads a row that is
missing, and a folder that is being extended stays usable.
"""

import dataclasses
import io
import json
import os
import pathlib
import shutil

import numpy as np

from datasets.batches import check_finite
from runtime.files import file_lock, read_json, read_json_lines, write_json, write_text
from runtime.terminal import UserError

RECORD, JOURNAL, LOCK = "pairs.json", "blocks.jsonl", ".lock"
ARRAYS = ("z0.npy", "z1.npy", "label.npy")
ENTRY = ("block", "pairs", "nfe_sum", "nfe_worst", "z1_rounding")  # the numbers in a line of the journal


@dataclasses.dataclass(frozen=True)
class PairJob:
    """What to make: pairs in blocks.

    layouts: {file name: dtype of a row, such as `np.dtype(("<f4", (3, 32, 32)))`}. identity: {name: value} of all that
    a pair's values depend on.
    """

    count: int
    block_size: int
    layouts: dict
    identity: dict

    def block_range(self, block):
        """Return the pairs of a block, a range."""
        return range(block * self.block_size, min((block + 1) * self.block_size, self.count))

    def unfinished(self, done):
        """Return the blocks that the journal entries `done` lack or have with fewer pairs."""
        blocks = range(-(-self.count // self.block_size))
        return [b for b in blocks if done.get(b, {"pairs": 0})["pairs"] < len(self.block_range(b))]


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
    """Make a locked `folder` ready for `job`; return (number of pairs it already offers, list of unfinished blocks).

    Raises UserError, changing nothing, for a folder of other pairs and for a disk that is too small.
    """
    record, done = read_record(folder), read_journal(folder)
    if record is None and any((folder / name).exists() for name in ARRAYS):
        raise UserError(f"{folder} has arrays but no {RECORD}: another program made them; choose another --data_root")
    if record is not None:
        there, here = record["identity"], json.loads(json.dumps(job.identity))  # as read back: lists for tuples
        differences = [f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
                       for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
        if differences:
            raise UserError(f"{folder} holds other pairs: {'; '.join(differences)}. Give the same values to continue, "
                            "or choose another --data_root or --config.seed")
    _check_arrays(folder, job, done)
    offered = record["count"] if record and record["complete"] else 0
    if offered >= job.count:
        return offered, []
    if record is None:
        write_json(folder / RECORD, {"complete": False, "count": 0, "identity": job.identity})
    for name, layout in job.layouts.items():
        _write(folder / name, npy_header(layout, offered), 0, least=row_offset(layout, job.count))
    return offered, job.unfinished(done)


def read_record(folder):
    """Return the content of `pairs.json`, or None if there is none. Raises UserError if it is damaged."""
    path = pathlib.Path(folder) / RECORD
    record = read_json(path) if path.exists() else None
    if record is not None and not (isinstance(record.get("complete"), bool) and isinstance(record.get("count"), int)
                                   and record["count"] >= 0 and isinstance(record.get("identity"), dict)):
        raise UserError(f"{path} is damaged: delete the folder and make its pairs again")
    return record


def _check_arrays(folder, job, done):
    """Raise UserError if an array lacks finished rows (deleted or cut short), or the disk room for the others."""
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
    """Return {block: its entry} of the journal; of two the one with more pairs, and none of a damaged line."""
    done = {}
    for entry in read_json_lines(folder / JOURNAL):
        if (all(isinstance(entry.get(name), (int, float)) and entry[name] >= 0 for name in ENTRY)
                and entry["pairs"] >= done.get(entry["block"], entry)["pairs"]):
            done[entry["block"]] = entry
    return done


def write_block(folder, job, block, rows, nfe):
    """Write a block's `rows`, {file name: float tensor}, into a prepared folder, and then its line in the journal.

    One-hot labels become class numbers where the layout has numbers. nfe: int64 `(n,)`. Raises UserError for values
    that are not finite.
    """
    indices, stored = job.block_range(block), {}
    for name, values in rows.items():
        if values is not None:
            check_finite(values, indices, f"{name} of pair", "check the checkpoint's weights")
    for name, layout in job.layouts.items():
        values = rows[name] if layout.shape else rows[name].argmax(1)
        with np.errstate(over="ignore"):  # float16 ends at 65504
            stored[name] = np.ascontiguousarray(values.numpy(), dtype=layout.base)
    rounding = float(np.abs(stored["z1.npy"] - rows["z1.npy"].numpy()).max())
    if not np.isfinite(rounding):
        raise UserError("z1 has values beyond the range of float16: use --config.sampling.pair_storage full")
    for name, layout in job.layouts.items():
        _write(folder / name, stored[name].tobytes(), row_offset(layout, indices.start))
    entry = dict(zip(ENTRY, (block, len(indices), int(nfe.sum()), int(nfe.max()), rounding), strict=True))
    _write(folder / JOURNAL, f"\n{json.dumps(entry)}\n".encode())  # the line before may have been cut off


def finish(folder, job, record):
    """Let the arrays' headers promise `job.count` rows, and write `record` with what was measured to `pairs.json`."""
    done = read_journal(folder)
    if missing := job.unfinished(done):
        raise UserError(f"{folder}: block {missing[0]} is missing; run the same command again")
    write_text(folder / JOURNAL, "".join(json.dumps(done[block]) + "\n" for block in sorted(done)))
    for name, layout in job.layouts.items():
        _write(folder / name, npy_header(layout, job.count), 0)
    entries = [entry for block, entry in done.items() if len(job.block_range(block))]
    pairs = sum(entry["pairs"] for entry in entries)  # a last block may hold more than are asked for now
    measured = {"nfe_mean": sum(entry["nfe_sum"] for entry in entries) / pairs,
                "nfe_worst": max(entry["nfe_worst"] for entry in entries),
                "z1_rounding": max(entry["z1_rounding"] for entry in entries)}
    write_json(folder / RECORD, {"complete": True, "count": job.count, **record, **measured, "identity": job.identity})


def _write(path, content, offset=None, least=0):
    """Write `content` to the file at `path` (made if missing), at `offset` or its end, and flush it to the disk.

    The file gets at least `least` bytes. An OSError of a full disk names it.
    """
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
