"""A folder of pairs must survive any stop, refuse other pairs and never promise a row that is not there."""

import dataclasses
import json
import resource
import shutil

import numpy as np
import pytest
import torch

from datasets.pair_writer import PairJob, finish, locked, npy_header, prepare, write_block
from datasets.pairs import read_metadata
from runtime.terminal import UserError

SHAPE = (1, 2, 2)
LAYOUTS = {name: np.dtype(("<f4", SHAPE)) for name in ("z0.npy", "z1.npy")}


def job(count, layouts=LAYOUTS, **identity):
    return PairJob(count, 4, layouts, {"seed": 0, "tuple": (1, 2)} | identity)


def rows_of(block, length=4):
    """Rows whose values tell their index."""
    indices = torch.arange(block * 4, block * 4 + length, dtype=torch.float32)[:, None, None, None]
    return {"z0.npy": indices.expand(-1, *SHAPE), "z1.npy": -indices.expand(-1, *SHAPE)}


def write(folder, work, blocks):
    for block in blocks:
        length = len(work.block_range(block))
        write_block(folder, work, block, rows_of(block, length), torch.full((length,), 10 + block))


def begin(folder, work, blocks):
    """Prepare a folder and write some blocks."""
    prepare(folder, work)
    write(folder, work, blocks)


def make(folder, work):
    with locked(folder):
        _, todo = prepare(folder, work)
        write(folder, work, todo)
        if todo:
            finish(folder, work, {})


def first_values(folder, name="z0.npy"):
    return np.load(folder / name)[:, 0, 0, 0].tolist()


def test_the_arrays_are_plain_npy_files_without_rows_beyond_the_count(tmp_path):
    make(tmp_path, job(10))
    assert first_values(tmp_path) == list(range(10))
    assert first_values(tmp_path, "z1.npy") == [-float(i) for i in range(10)]
    assert (tmp_path / "z0.npy").stat().st_size == 128 + 10 * 16


def test_a_folder_promises_nothing_until_all_is_there(tmp_path):
    begin(tmp_path, job(10), [0, 2])
    assert not read_metadata(tmp_path)["complete"] and len(np.load(tmp_path / "z0.npy")) == 0
    with pytest.raises(UserError, match="block 1 is missing"):
        finish(tmp_path, job(10), {})
    assert prepare(tmp_path, job(10)) == (0, [1])


def test_extending_keeps_the_folder_usable_and_redoes_at_most_the_last_block(tmp_path):
    make(tmp_path, job(10))
    assert prepare(tmp_path, job(20)) == (10, [2, 3, 4])
    assert first_values(tmp_path) == list(range(10)) and read_metadata(tmp_path)["complete"]
    make(tmp_path, job(20))
    assert first_values(tmp_path) == list(range(20))
    assert prepare(tmp_path, job(5)) == (20, [])  # fewer than there are leave the folder as it is
    assert first_values(tmp_path) == list(range(20))


def test_fewer_pairs_make_an_unfinished_folder_usable_and_lose_no_finished_block(tmp_path):
    begin(tmp_path, job(20), [0, 1, 4])
    assert prepare(tmp_path, job(8)) == (0, [])
    finish(tmp_path, job(8), {})
    assert first_values(tmp_path) == list(range(8))
    assert prepare(tmp_path, job(20)) == (8, [2, 3])


def test_a_journal_line_that_was_cut_off_or_garbled_counts_for_nothing(tmp_path):
    begin(tmp_path, job(20), [0, 1, 2, 3])
    journal = tmp_path / "blocks.jsonl"
    lines = journal.read_text().split("\n\n")
    journal.write_text(lines[0] + "\n" + "\0" * 40 + "\n" + lines[2] + "\n" + lines[3][:-2])
    assert prepare(tmp_path, job(20)) == (0, [1, 3, 4])


@pytest.mark.parametrize("line", [b"[]", b"7", b"\xff", b'{"block": 0, "pairs": 4}', b"[" * 100_000, b'{"block": "0"}',
                                  b'{"block": -1, "pairs": 4, "nfe_sum": 1, "nfe_worst": 1, "z1_rounding": 0}',
                                  b'{"block": 0, "pairs": 4, "nfe_sum": NaN, "nfe_worst": 1, "z1_rounding": 0}'])
def test_a_damaged_journal_makes_its_blocks_again(tmp_path, line):
    prepare(tmp_path, job(8))
    (tmp_path / "blocks.jsonl").write_bytes(line + b"\n")
    assert prepare(tmp_path, job(8)) == (0, [0, 1])


def test_blocks_may_be_finished_in_any_order(tmp_path):
    begin(tmp_path, job(20), [0, 2, 4, 1, 3])
    finish(tmp_path, job(20), {})
    assert first_values(tmp_path) == list(range(20))
    metadata = json.loads((tmp_path / "pairs.json").read_text())
    assert metadata["nfe_mean"] == 12 and metadata["nfe_worst"] == 14
    blocks = [json.loads(line)["block"] for line in (tmp_path / "blocks.jsonl").read_text().splitlines()]
    assert blocks == [0, 1, 2, 3, 4]


def test_other_pairs_are_refused_with_all_that_differs_and_stay_as_they_are(tmp_path):
    make(tmp_path, job(8, checkpoint="aa", tol=0.1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="pairs: the content of --ckpt_path differs; tol is 0.1 there and None here"):
        prepare(tmp_path, job(12, checkpoint="bb"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_unfinished_folder_names_the_checkpoint_it_was_begun_with(tmp_path):
    prepare(tmp_path, dataclasses.replace(job(8, checkpoint="aa"), checkpoint="a.pth"))
    with pytest.raises(UserError, match="other pairs, made with a.pth: the content of --ckpt_path differs. Give"):
        prepare(tmp_path, dataclasses.replace(job(8, checkpoint="bb"), checkpoint="b.pth"))


@pytest.mark.parametrize(("left", "message"), [
    ("z0.npy", "has arrays but no pairs.json: another program made them"),  # and its pairs are not written over
    ("pairs.json", "z1.npy is missing or cut short, although 2 blocks"),
])
def test_a_folder_of_which_a_part_is_deleted_is_refused(tmp_path, left, message):
    make(tmp_path, job(8))
    for name in {"z0.npy": ["pairs.json", "blocks.jsonl"], "pairs.json": ["z1.npy"]}[left]:
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, job(12))


@pytest.mark.parametrize("content", ["", "[]", "{\"count\": 3}", "\0\0\0", "[" * 100_000, "{",
    '{"complete": true, "count": -1, "version": 1, "identity": {}}', '{"complete": 1, "count": 1, "version": 1}',
    '{"complete": true, "count": "1", "version": 1, "identity": {}}'])
def test_damaged_metadata_is_named(tmp_path, content):
    (tmp_path / "pairs.json").write_text(content)
    with pytest.raises(UserError, match="pairs.json is damaged"):
        prepare(tmp_path, job(8))


def test_two_runs_cannot_write_one_folder(tmp_path):
    with (locked(tmp_path / "0"), pytest.raises(UserError, match="another run is making pairs in"),
          locked(tmp_path / "0")):
        pass
    with locked(tmp_path / "0"):  # and the lock ends with its holder
        pass


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2 * 10**6))
    with pytest.raises(UserError, match="100000 pairs need another 3.2 MB .* where 2.0 MB are free"):
        prepare(tmp_path, job(100000))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("limit", "name"), [(200, "z0.npy"), (230, "z0.npy"), (410, "blocks.jsonl")])
def test_a_disk_that_fills_up_is_named_and_loses_nothing_that_was_finished(tmp_path, limit, name):
    """The file size limit stands for the full disk: both make a write fail half-way."""
    work = job(20)
    begin(tmp_path, work, [0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}/{name}'"):
            write(tmp_path, work, [1, 2, 1, 2, 1])
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}/z0.npy'"):
            prepare(tmp_path, job(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    todo = prepare(tmp_path, work)[1]
    assert 0 not in todo
    write(tmp_path, work, todo)
    finish(tmp_path, work, {})
    assert first_values(tmp_path) == list(range(20))


def test_compact_arrays_hold_half_floats_and_class_numbers_and_the_loss_is_measured(tmp_path):
    compact = job(4, layouts={"z1.npy": np.dtype(("<f2", SHAPE)), "label.npy": np.dtype("<i4")})
    prepare(tmp_path, compact)
    rows = {"z1.npy": torch.full((4, *SHAPE), 0.1), "label.npy": torch.eye(4)[[2, 0, 1, 3]]}
    write_block(tmp_path, compact, 0, rows, torch.zeros(4, dtype=torch.int64))
    finish(tmp_path, compact, {})
    assert np.load(tmp_path / "label.npy").tolist() == [2, 0, 1, 3]
    assert np.load(tmp_path / "z1.npy").dtype == np.float16
    rounding = json.loads((tmp_path / "pairs.json").read_text())["z1_rounding"]
    assert rounding == pytest.approx(float(np.float32(0.1)) - float(np.float16(0.1)), abs=1e-9) and rounding > 1e-5


@pytest.mark.parametrize(("dtype", "value", "sentence"), [
    ("<f4", float("inf"), "z1.npy of pair 10 is not finite"), ("<f4", float("nan"), "z1.npy of pair 10 is not finite"),
    ("<f2", 1e5, "beyond the range of float16")])
def test_a_pair_that_is_not_finite_where_it_is_stored_is_named_and_not_written(tmp_path, dtype, value, sentence):
    work, rows = job(12, layouts=LAYOUTS | {"z1.npy": np.dtype((dtype, SHAPE))}), rows_of(2)
    prepare(tmp_path, work)
    rows["z1.npy"] = rows["z1.npy"].clone()
    rows["z1.npy"][2, 0, 1, 1] = value
    with pytest.raises(UserError, match=sentence):
        write_block(tmp_path, work, 2, rows, torch.zeros(4, dtype=torch.int64))
    assert prepare(tmp_path, work) == (0, [0, 1, 2])


def test_a_header_can_be_replaced_where_it_stands(tmp_path):
    layout, rows = np.dtype(("<f4", (3, 4, 4))), np.ones((50, 3, 4, 4), np.float32)
    np.save(tmp_path / "rows.npy", rows)
    short, long = npy_header(layout, 20), npy_header(layout, 10**12)
    assert len(short) == len(long) == (tmp_path / "rows.npy").stat().st_size - rows.nbytes
    with open(tmp_path / "rows.npy", "r+b") as opened:
        opened.write(short)
    assert np.load(tmp_path / "rows.npy").shape == (20, 3, 4, 4)
