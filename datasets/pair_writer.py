"""The folder that generate_data.py fills: arrays written where they will stay, block by block, safe at any moment.

A folder holds the arrays (`z0.npy`, `z1.npy`, `label.npy`), `pairs.json` (what the pairs are) and `blocks.jsonl`
(which blocks are on disk). A block is a fixed range of consecutive pairs. It counts as finished once its line is in
the journal, and the line is written after the block's rows have reached the disk. Each process appends to a journal
of its own; the main process joins them. Until all is finished the arrays' headers promise no more rows than there
were before, so nobody reads a row that is not there, and a folder that is being extended stays usable as it was.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import shutil

import numpy as np

from datasets.npy_rows import header_bytes
from runtime.errors import UserError
from runtime.files import write_json, write_text

LAYOUT_VERSION = 1
RECORD, JOURNAL, LOCK = "pairs.json", "blocks.jsonl", ".lock"
ARRAYS = ("z0.npy", "z1.npy", "label.npy")
SPARE_BYTES = 1 << 20  # for the journal, the record and the picture


@dataclasses.dataclass(frozen=True)
class ArrayLayout:
    """One array of a folder: shape of a row and type."""

    shape: tuple
    dtype: str

    @property
    def row_bytes(self):
        """Bytes of one row."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def offset(self, row):
        """Place of `row` in the file, in bytes."""
        return len(header_bytes(0, self.shape, self.dtype)) + row * self.row_bytes


@dataclasses.dataclass(frozen=True)
class Task:
    """What there is to make: `count` pairs in blocks of `block_size`; `available` is the most there can be.

    layouts: {file name: ArrayLayout}. identity: {name: value} of everything that a pair's values depend on.
    """

    count: int
    block_size: int
    available: int | None
    layouts: dict
    identity: dict

    def block_range(self, block):
        """Return the pairs of a block: the last one is made whole, as far as there are starting points."""
        high = (block + 1) * self.block_size
        return range(block * self.block_size, high if self.available is None else min(high, self.available))

    def kept(self, block):
        """Return how many pairs of a block belong to the task."""
        return min(len(self.block_range(block)), self.count - block * self.block_size)

    @property
    def blocks(self):
        """Numbers of all blocks."""
        return range(-(-self.count // self.block_size))


@contextlib.contextmanager
def locked(folder):
    """Keep every other run out of `folder` (made if missing); the kernel lets go of it however the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is making pairs in {folder}; wait for it, or choose another --data_root "
                            "or --config.seed") from None
        yield


def prepare(folder, task):
    """Make `folder` ready for `task`; return (pairs it already offers, list of blocks that are not finished).

    The caller holds the lock. Raises UserError, changing nothing, for a folder of other pairs and for a disk that
    is too small.
    """
    record = _read_own_record(folder)
    offered = record["count"] if record and record["complete"] else 0
    if record is not None:
        _require_same(folder, record["identity"], task.identity)
    done = read_journals(folder)
    _require_arrays(folder, task, done)
    if offered >= task.count:
        return offered, []
    _require_space(folder, task)
    with room_errors(folder):
        join_journals(folder)
        if record is None:
            write_json(folder / RECORD, {"complete": False, "count": 0, "version": LAYOUT_VERSION,
                                         "identity": task.identity})
        for name, layout in task.layouts.items():
            with _opened(folder / name) as file:
                _write_at(file, header_bytes(offered, layout.shape, layout.dtype), 0)
                if os.fstat(file).st_size < layout.offset(task.count):
                    os.ftruncate(file, layout.offset(task.count))
    return offered, [block for block in task.blocks if not _is_done(task, done, block)]


def _is_done(task, done, block):
    return done.get(block, {}).get("pairs", 0) >= task.kept(block)


def read_record(folder):
    """Return the content of `pairs.json`, or None if there is none; raises UserError if it cannot be read."""
    path = pathlib.Path(folder) / RECORD
    try:
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or not {"complete", "count", "version", "identity"} <= record.keys():
            raise ValueError("fields are missing")
    except FileNotFoundError:
        return None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete the folder and make its pairs again") from None
    if record["version"] != LAYOUT_VERSION:
        raise UserError(f"{path} has layout version {record['version']}; this program knows version {LAYOUT_VERSION}")
    return record


def is_unfinished(folder):
    """Return whether pairs in `folder` are still being made, or were until something stopped it."""
    record = read_record(folder)
    return not record["complete"] if record else bool(read_journals(folder))


def _read_own_record(folder):
    """Return the folder's record, None for a folder without pairs; raise for pairs that came from elsewhere."""
    record = read_record(folder)
    strange = [name for name in ARRAYS if (folder / name).exists()]
    if record is None and strange:
        raise UserError(f"{folder} has {strange[0]} but no {RECORD}: these pairs were not made by this program; "
                        "choose another --data_root or --config.seed")
    return record


def _require_same(folder, there, here):
    """Raise UserError with what differs between the pairs in `folder` and those asked for."""
    here = json.loads(json.dumps(here))  # as it would come back from the file: lists for tuples
    differences = [f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
                   for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if differences:
        raise UserError(f"{folder} holds other pairs: {'; '.join(differences)}. Give the same values to continue, "
                        "or choose another --data_root or --config.seed")


def _require_arrays(folder, task, done):
    """Raise UserError if an array lacks rows that the journals call finished (somebody deleted or cut it)."""
    rows = max((entry["block"] * task.block_size + entry["pairs"] for entry in done.values()), default=0)
    for name, layout in task.layouts.items():
        path = folder / name
        if rows and (not path.exists() or path.stat().st_size < layout.offset(rows)):
            raise UserError(f"{path} is missing or cut short, although {len(done)} blocks are recorded as finished: "
                            f"restore it, or delete {folder} to make its pairs again")


def _require_space(folder, task):
    """Raise UserError if the disk cannot hold what is still missing of the arrays."""
    missing = SPARE_BYTES
    for name, layout in task.layouts.items():
        taken = (folder / name).stat().st_blocks * 512 if (folder / name).exists() else 0
        missing += max(0, layout.offset(task.count) - taken)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise UserError(f"{task.count} pairs need another {missing / 1e6:,.1f} MB in {folder}, where {free / 1e6:,.1f} "
                        "MB are free: make room, choose another --data_root, fewer pairs, or "
                        "--config.sampling.pair_storage compact")


def join_journals(folder):
    """Return {block: its journal entry}, and leave one journal, ordered by block, in place of the processes' own.

    A line that a killed process left half-written is no entry.
    """
    done = read_journals(folder)
    text = "".join(json.dumps(done[block]) + "\n" for block in sorted(done))
    if done:
        write_text(folder / JOURNAL, text)
    for path in _process_journals(folder):
        path.unlink()
    return done


def read_journals(folder):
    """Return {block: its journal entry} of all journals in `folder`; of two entries the one with more pairs."""
    done = {}
    for path in [folder / JOURNAL, *_process_journals(folder)]:
        text = path.read_text() if path.exists() else ""
        for line in text.split("\n")[:-1]:  # what follows the last newline was cut off
            with contextlib.suppress(ValueError, KeyError, TypeError):  # not on disk when the power failed: not done
                entry = json.loads(line)
                if entry["pairs"] >= done.get(entry["block"], entry)["pairs"]:
                    done[entry["block"]] = entry
    return done


def pairs_of_this_session(folder, task):
    """Return about how many pairs all processes have finished since the journals were joined."""
    lines = sum(path.read_bytes().count(b"\n") for path in _process_journals(folder))
    return lines * task.block_size


def _process_journals(folder):
    return sorted(folder.glob("blocks.process*.jsonl"))


class BlockWriter:
    """Writes one process's blocks into a prepared folder."""

    def __init__(self, folder, task, rank):
        """Open the arrays in `folder` and the journal of process `rank`."""
        self.folder, self.task = folder, task
        with contextlib.ExitStack() as stack:
            self.files = {name: stack.enter_context(_opened(folder / name)) for name in task.layouts}
            self.journal = stack.enter_context(_opened(folder / f"blocks.process{rank}.jsonl"))
            self.stack = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stack.close()

    def write(self, block, rows, nfe):
        """Write a block's `rows`, {file name: tensor}, and then its line in the journal.

        Rows beyond the task's count are left out; labels are one-hot and stored as the layout says. nfe: int64
        `(n,)`. Raises UserError when the disk is full: what was finished before stays finished.
        """
        kept, first = self.task.kept(block), block * self.task.block_size
        entry = {"block": block, "pairs": kept, "nfe_sum": int(nfe[:kept].sum()), "nfe_worst": int(nfe[:kept].max())}
        stored = {name: _as_stored(rows[name][:kept].numpy(), layout) for name, layout in self.task.layouts.items()}
        entry["z1_rounding"] = float(np.abs(stored["z1.npy"] - rows["z1.npy"][:kept].numpy()).max())
        if not np.isfinite(entry["z1_rounding"]):
            raise UserError("z1 has values beyond the range of float16: use --config.sampling.pair_storage full")
        with room_errors(self.folder):
            for name, layout in self.task.layouts.items():
                _write_at(self.files[name], stored[name].reshape(-1).view(np.uint8), layout.offset(first))
            for file in self.files.values():
                os.fsync(file)
            _write_at(self.journal, (json.dumps(entry) + "\n").encode(), os.fstat(self.journal).st_size)
            os.fsync(self.journal)


def _as_stored(rows, layout):
    """Return an array in the layout's type; one-hot labels become numbers where the layout has numbers."""
    if layout.shape == ():
        rows = rows.argmax(1)
    with np.errstate(over="ignore"):  # float16 ends at 65504
        return np.ascontiguousarray(rows, dtype=layout.dtype)


def require_finite(indices, *arrays):
    """Raise UserError naming the first of the pairs `indices` that is NaN or infinite in one of the tensors."""
    for rows in arrays:
        bad = (~rows.isfinite().flatten(1).all(1)).nonzero()
        if len(bad):
            raise UserError(f"pair {indices[int(bad[0])]} is not finite; check the checkpoint's weights")


def finish(folder, task, record):
    """Let the arrays' headers promise `task.count` rows and write `record` as the folder's record.

    The caller holds the lock and every block is in the journals; they are joined.
    """
    with room_errors(folder):
        done = join_journals(folder)
        absent = [block for block in task.blocks if not _is_done(task, done, block)]
        if absent:
            raise UserError(f"{folder}: block {absent[0]} is missing; run the same command again")
        rows = max(entry["block"] * task.block_size + entry["pairs"] for entry in done.values())
        for name, layout in task.layouts.items():
            with _opened(folder / name) as file:
                os.ftruncate(file, layout.offset(rows))
                _write_at(file, header_bytes(task.count, layout.shape, layout.dtype), 0)
                os.fsync(file)
        write_json(folder / RECORD, {"complete": True, "count": task.count, "version": LAYOUT_VERSION, **record,
                                     **_statistics([done[block] for block in task.blocks]), "identity": task.identity})


def _statistics(entries):
    """Return the mean and worst number of evaluations of a pair, and the largest change of a z1 value by storing."""
    pairs = sum(entry["pairs"] for entry in entries)
    return {"nfe_mean": sum(entry["nfe_sum"] for entry in entries) / pairs,
            "nfe_worst": max(entry["nfe_worst"] for entry in entries),
            "z1_rounding": max(entry["z1_rounding"] for entry in entries)}


@contextlib.contextmanager
def room_errors(folder):
    """Turn a full disk into one sentence for the user."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f"no room in {folder} ({error.strerror}): the blocks that were finished are safe; make room "
                        "and run the same command again, or ask for no more pairs than are finished") from None


@contextlib.contextmanager
def _opened(path):
    """Yield a descriptor for writing `path`, which is made if missing."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield file
    finally:
        os.close(file)


def _write_at(file, content, offset):
    """Write all of `content` (bytes) at `offset`."""
    content = memoryview(content)
    while len(content):
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written
