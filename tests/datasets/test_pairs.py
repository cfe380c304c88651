"""Batches of stored pairs: which pair stands where, what files are accepted, and what is found wrong in them."""

import fractions
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datasets import create_batches
from datasets.batches import EndlessOrder
from datasets.pairs import MixedOrder, NoiseSource, PairSet, open_pairs, open_rows
from runtime.seeds import index_noise
from runtime.terminal import UserError
from tests.helpers import config_of

SHAPE = (1, 8, 8)


def make_config(root, **fields):
    return config_of(data__dataset="digits", data__image_size=8, data__num_channels=1, training__batch_size=8,
                     data__reflow_data_root=str(root), **fields)


def with_real_pairs(root, labels=None, **fields):
    """Write twenty pairs, 0 to 19, and as many real ones, from 500; return their config."""
    for name, first in (("pairs", 0), ("real", 500)):
        save_pairs(root / name / "0", first=first, labels=labels)
    return make_config(root / "pairs", data__real_pairs_root=str(root / "real"), **fields)


def save_pairs(folder, count=20, first=0, labels=None, z0=None, z1=None):
    """Files as the released code writes them; the first value of z0 and of z1 tells the pair."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(first).normal(size=(count, *SHAPE)).astype(np.float32)
    images = np.tanh(noise)
    noise[:, 0, 0, 0] = images[:, 0, 0, 0] = (np.arange(count) + first) / 1000
    np.save(folder / "z0.npy", noise if z0 is None else z0)
    np.save(folder / "z1.npy", images if z1 is None else z1)
    if labels is not None:
        np.save(folder / "label.npy", labels)


def take(root, indices, **fields):
    """z0 and z1 of pairs of all folders under `root`."""
    taken = PairSet(open_pairs(root, make_config(root, **fields)), 0).take(np.array(indices))
    assert set(taken) == {"z0", "z1"}
    return taken["z0"], taken["z1"]


def pair_numbers(images):
    return (images[:, 0, 0, 0] * 1000).round().int().tolist()


def test_several_seeds_add_up_in_the_order_of_their_numbers(tmp_path):
    save_pairs(tmp_path / "10", count=5, first=100)
    save_pairs(tmp_path / "2", count=20)
    (tmp_path / "notes").mkdir()
    assert len(PairSet(open_pairs(tmp_path, make_config(tmp_path)), 0)) == 25
    z0, z1 = take(tmp_path, [24, 0, 20, 19])
    assert pair_numbers(z0) == pair_numbers(z1) == [104, 0, 100, 19]


def test_every_epoch_has_every_pair_once_and_z0_stays_with_its_z1(tmp_path):
    save_pairs(tmp_path / "0", count=16)
    save_pairs(tmp_path / "1", count=8, first=50)
    batches = create_batches(make_config(tmp_path), "cpu")
    epochs = [[], []]
    for update in range(6):
        batch = batches.batch(update, 0, 8)
        assert pair_numbers(batch.z0) == pair_numbers(batch.z1)
        epochs[update // 3] += pair_numbers(batch.z0)
    assert sorted(epochs[0]) == sorted(epochs[1]) == [*range(16), *range(50, 58)]
    assert epochs[0] != epochs[1]
    assert len(batches) == 24 and tuple(batches.shape) == SHAPE


@pytest.mark.parametrize("fields", [{}, {"flow__h_flip": True}, {"flow__real_data_share": 0.3},
                                    {"data__use_aug": True, "flow__h_flip": True}])
def test_a_sample_depends_on_its_place_alone_not_on_slices_or_history(tmp_path, fields):
    config = with_real_pairs(tmp_path, **fields)
    whole = create_batches(config, "cpu")
    expected = [whole.batch(update, 0, 8) for update in range(6)]
    slices = create_batches(config, "cpu")
    for update in (5, 2, 3):
        parts = [slices.batch(update, low, high) for low, high in ((6, 8), (0, 1), (1, 6))]
        for name in ("z0", "z1"):
            joined = torch.cat([getattr(parts[i], name) for i in (1, 2, 0)])
            assert torch.equal(joined, getattr(expected[update], name))


def test_h_flip_flips_z0_and_z1_together_each_sample_on_its_own(tmp_path):
    save_pairs(tmp_path / "0")
    plain = create_batches(make_config(tmp_path), "cpu")
    flipping = create_batches(make_config(tmp_path, flow__h_flip=True), "cpu")
    flips = []
    for update in range(4):
        a, b = plain.batch(update, 0, 8), flipping.batch(update, 0, 8)
        for k in range(8):
            flips.append(torch.equal(b.z0[k], a.z0[k].flip(-1)))
            wanted = (a.z0[k].flip(-1), a.z1[k].flip(-1)) if flips[-1] else (a.z0[k], a.z1[k])
            assert torch.equal(b.z0[k], wanted[0]) and torch.equal(b.z1[k], wanted[1])
        assert 0 < sum(flips[-8:]) < 8, "a whole batch was flipped, or none of it"
    assert 8 <= sum(flips) <= 24


def test_use_aug_flips_z0_and_z1_of_a_pair_alike(tmp_path):
    save_pairs(tmp_path / "0")
    batch = create_batches(make_config(tmp_path, data__use_aug=True), "cpu").batch(0, 0, 8)
    # z1 is tanh(z0) except for the pixel that tells the pair.
    different = (batch.z1 - batch.z0.tanh()).abs().flatten(1) > 1e-5
    assert (different.sum(1) <= 1).all()


@given(share=st.fractions(0, 1, max_denominator=50), first=st.integers(0, 10**9), count=st.integers(1, 300))
def test_every_stretch_of_samples_has_its_share_of_real_pairs_and_uses_each_in_turn(share, first, count):
    found = MixedOrder(50, 30, share, 7).at(np.arange(first, first + count))
    real = found[found >= 50] - 50
    assert abs(len(real) - count * share) < 1
    before = int(fractions.Fraction(first) * share)
    np.testing.assert_array_equal(real, EndlessOrder(30, 7).at(before + np.arange(len(real))))
    generated = EndlessOrder(50, 7).at(first - before + np.arange(count - len(real)))
    np.testing.assert_array_equal(found[found < 50], generated)


def test_the_share_of_real_pairs_is_that_of_the_config(tmp_path):
    batches = create_batches(with_real_pairs(tmp_path, flow__real_data_share=0.25), "cpu")
    numbers = [pair_numbers(batches.batch(update, 0, 8).z0) for update in range(10)]
    assert [sum(n >= 500 for n in batch) for batch in numbers] == [2] * 10
    real = [n for batch in numbers for n in batch if n >= 500]
    assert sorted(real) == list(range(500, 520)), "twenty real samples are the twenty real pairs"


@pytest.mark.parametrize("form", ["one-hot", "numbers"])
def test_labels_come_with_their_pairs(tmp_path, form):
    classes = np.arange(20) % 3
    labels = np.eye(3, dtype=np.float32)[classes] if form == "one-hot" else classes
    save_pairs(tmp_path / "0", labels=labels)
    batch = create_batches(make_config(tmp_path, data__num_classes=3), "cpu").batch(0, 0, 8)
    assert batch.label.dtype == torch.float32
    assert batch.label.argmax(1).tolist() == [n % 3 for n in pair_numbers(batch.z0)]
    assert torch.equal(batch.label.sum(1), torch.ones(8))
    assert create_batches(make_config(tmp_path), "cpu").batch(0, 0, 8).label is None  # unconditional training


@pytest.mark.parametrize("arrays, sentence", [
    ({}, "has no label.npy"),
    ({"labels": np.eye(4, dtype=np.float32)[np.zeros(20, dtype=int)]}, r"labels of shape \(20, 4\)"),
    ({"labels": np.arange(20) // 6},
     "label.npy has int64 labels of shape .20,., the first wrong one 3; .* from 0 to 2"),
    ({"labels": np.full(20, -1)}, "the first wrong one -1"),
    ({"labels": np.zeros((20, 3, 2))}, r"labels of shape \(20, 3, 2\)"),
    ({"labels": np.full((20, 3), 0.5, dtype=np.float32)}, r"the first wrong one \[0.5 0.5 0.5\]"),
    ({"labels": np.zeros((19, 3))}, "label.npy has rows .19, 3., those of z1.npy .20, 1, 8, 8."),
    ({"z0": np.zeros((19, *SHAPE))}, "z0.npy has rows .19, 1, 8, 8., those of z1.npy .20,"),
    ({"z0": np.zeros((20, 1, 8, 4))}, r"z0.npy has rows \(20, 1, 8, 4\)"),
    ({"z1": np.zeros((20, 64)), "z0": np.zeros((20, 64))}, r"images \(N, C, H, W\) are needed"),
    ({"z1": np.zeros((0, *SHAPE)), "z0": np.zeros((0, *SHAPE))}, "has shape .0, 1, 8, 8."),
    ({"z1": np.zeros((20, 3, 8, 8)), "z0": np.zeros((20, 3, 8, 8))},
     "num_channels and config.data.image_size ask for"),
])
def test_labels_and_arrays_that_do_not_fit_are_refused(tmp_path, arrays, sentence):
    save_pairs(tmp_path / "0", **arrays)
    with pytest.raises(UserError, match=sentence):
        open_pairs(tmp_path, make_config(tmp_path, data__num_classes=3))


def write_metadata(folder, count, seed=7, direction="from_z0", storage="full", scale=1.0, **more):
    identity = {"seed": seed, "sampling.direction": direction, "sampling.pair_storage": storage,
                "sampling.init_noise_scale": scale, "checkpoint": "a"} | more
    (folder / "pairs.json").write_text(json.dumps({
        "complete": True, "count": count, "version": 1, "identity": identity, "nfe_mean": 7.0,
        "software": {"numpy": "2.0"}}))


def save_compact(folder, digest, scale=1.0):
    folder.mkdir()
    np.save(folder / "z1.npy", np.linspace(-1, 1, 10 * 64).reshape(10, *SHAPE).astype(np.float16))
    write_metadata(folder, 10, storage="compact", scale=scale, noise=digest)


def test_compact_storage_draws_z0_again_and_widens_z1(tmp_path):
    save_compact(tmp_path / "7", digest=NoiseSource(7, SHAPE).digest(), scale=2.0)
    z0, z1 = take(tmp_path, [9, 4])
    assert torch.equal(z0, 2 * index_noise(7, [9, 4], SHAPE))
    assert z1.dtype == torch.float32
    np.testing.assert_array_equal(z1, np.load(tmp_path / "7/z1.npy")[[9, 4]].astype(np.float32))


def test_compact_pairs_whose_noise_would_come_out_otherwise_are_refused(tmp_path):
    save_compact(tmp_path / "7", digest="0123456789abcdef")
    with pytest.raises(UserError, match="7 is compact, but its noise cannot be drawn again.*made with .*numpy.*2.0"):
        open_pairs(tmp_path, make_config(tmp_path))


@pytest.mark.parametrize("metadata, said", [
    ('{"complete": false, "count": 0, "version": 1, "identity": {}}', "/1 is unfinished"),
    (None, "/1 holds the same pairs as .*/0:")])
def test_an_unfinished_folder_and_one_folder_twice_are_refused_by_name(tmp_path, metadata, said):
    save_pairs(tmp_path / "0")
    save_pairs(tmp_path / "1")
    if metadata:
        (tmp_path / "1/pairs.json").write_text(metadata)
    with pytest.raises(UserError, match=said):
        open_pairs(tmp_path, make_config(tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["z0", "z1"])
def test_a_value_that_is_not_finite_is_found_with_its_pair(tmp_path, name, value):
    arrays = {"z0": np.random.default_rng(0).normal(size=(20, *SHAPE)).astype(np.float32),
              "z1": np.zeros((20, *SHAPE), np.float32)}
    arrays[name][13, 0, 5, 5] = value
    save_pairs(tmp_path / "0", **arrays)
    with pytest.raises(UserError, match=f"{name} of pair 13 is not finite"):
        open_pairs(tmp_path, make_config(tmp_path))


def test_right_pairs_of_a_rough_flow_are_not_called_swapped(tmp_path, capsys):
    z0 = np.random.default_rng(0).normal(size=(200, *SHAPE)).astype(np.float32)
    smooth = (z0 + np.roll(z0, 1, -1) + np.roll(z0, 1, -2) + np.roll(z0, (1, 1), (-1, -2))) / 2
    save_pairs(tmp_path / "0", z0=0.93 * z0, z1=np.where(smooth > 2.2, smooth, np.tanh(smooth)))  # some reach beyond 1
    open_pairs(tmp_path, make_config(tmp_path))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("change, said", [
    (lambda z0, z1: (z1, z0), "swapped?"),
    (lambda z0, z1: (z0, z0), "swapped?"),
    (lambda z0, z1: (0.85 * z0, z1), "z0 has standard deviation 0.8.. instead of 1"),
    (lambda z0, z1: (z0, (z1 + 1) / 2), r"all values of z1 lie in 0.00 to 1.00; images are in \[-1, 1\]"),
    (lambda z0, z1: (z0, 0 * z1), "every value of z1 is 0: its images were never written"),
    (lambda z0, z1: (z0, 127.5 * z1 + 127.5), r"z1 ranges from 0.00 to 255.00, ..% of it beyond"),
])
def test_unlikely_values_are_said_in_one_sentence_on_stderr(tmp_path, capsys, monkeypatch, change, said):
    z0 = np.random.default_rng(0).normal(size=(200, *SHAPE)).astype(np.float32)
    z1 = np.tanh(3 * (z0 + np.roll(z0, 1, -1) + np.roll(z0, 1, -2)))
    z0, z1 = change(z0, z1)
    save_pairs(tmp_path / "0", z0=z0, z1=z1)
    open_pairs(tmp_path, make_config(tmp_path))
    sentence = capsys.readouterr().err
    assert re.fullmatch(rf"warning: .*/0: .*{said}.*; training uses the values as they are\n", sentence), sentence
    monkeypatch.setenv("RANK", "1")
    open_pairs(tmp_path, make_config(tmp_path))
    assert capsys.readouterr().err == "", "once, not once a process"


@pytest.mark.parametrize("other, said", [
    ({"checkpoint": "b"}, "checkpoint is b there and a in .*/0"),
    ({"direction": "random_paired", "checkpoint": None}, "sampling.direction is random_paired there and from_z0 in"),
    ({"scale": 0.9}, "sampling.init_noise_scale is 0.9 there and 1.0 in"),
])
def test_pairs_of_another_origin_are_refused_with_folder_and_field(tmp_path, other, said):
    for seed, fields in enumerate(({}, other)):
        save_pairs(tmp_path / str(seed), first=seed)
        write_metadata(tmp_path / str(seed), 20, seed=seed, **fields)
    with pytest.raises(UserError, match=f"/1 holds pairs of another origin, .*{said}"):
        open_pairs(tmp_path, make_config(tmp_path))


def test_real_pairs_of_another_checkpoint_are_refused(tmp_path):
    config = with_real_pairs(tmp_path, flow__real_data_share=0.5)
    write_metadata(tmp_path / "pairs/0", 20)
    write_metadata(tmp_path / "real/0", 20, direction="from_z1", checkpoint="b")
    with pytest.raises(UserError, match="real/0 holds pairs of another origin, keep them apart: checkpoint is b there"):
        create_batches(config, "cpu")
    write_metadata(tmp_path / "real/0", 20, direction="from_z1")
    assert len(create_batches(config, "cpu")) == 20


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", np.longdouble, "<f2"])
def test_numbers_of_any_width_and_byte_order_are_read(tmp_path, dtype):
    z0 = np.random.default_rng(0).normal(size=(20, *SHAPE)).astype(dtype)
    save_pairs(tmp_path / "0", z0=z0, z1=np.asfortranarray(np.tanh(z0)))
    read = take(tmp_path, [3, 17])
    np.testing.assert_array_equal(read[0], z0[[3, 17]].astype(np.float32))
    np.testing.assert_array_equal(read[1], np.tanh(z0)[[3, 17]].astype(np.float32))


@pytest.mark.parametrize("content", [b"", b"not an npy file", b"\x93NUMPY\x01\x00\xff\xff{'descr'", b"PK\x03\x04",
    b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f4', 'fortran_order': False, 'shape': (40, 10), }     {eN\n    ",
    b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f4', 'fortran_order': False, 'shape': (-5, 1, 8, 8), }   \n",
    b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f4', 'fortran_order': False, 'shape': (10**30, 1, 8, 8)}\n",
    b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f4', 'fortran_order': False, 'shape': (20, 1, 8, 8), }   \n"])
def test_what_is_no_npy_file_or_is_cut_short_is_named(tmp_path, content):
    (tmp_path / "rows.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"rows.npy cannot be read as an npy file \(.*cut short, damaged"):
        open_rows(tmp_path / "rows.npy")


@pytest.mark.parametrize("array", [np.array(["a"]), np.array(1.0), np.array([1j])])
def test_arrays_without_rows_of_numbers_are_refused(tmp_path, array):
    np.save(tmp_path / "rows.npy", array)
    with pytest.raises(UserError, match="rows.npy holds .*an npy array of numbers"):
        open_rows(tmp_path / "rows.npy")


def test_pairs_that_stay_on_the_device_give_the_batches_of_those_on_disk(tmp_path):
    config = with_real_pairs(tmp_path, np.arange(20) % 3, flow__real_data_share=0.3, data__num_classes=3,
                             data__on_device="false")
    disk = create_batches(config, "cpu")
    config.data.on_device = "true"
    resident = create_batches(config, "cpu")
    assert resident.resident and not disk.resident
    for update in range(4):
        a, b = disk.batch(update, 1, 7), resident.batch(update, 1, 7)
        assert torch.equal(a.z0, b.z0) and torch.equal(a.z1, b.z1) and torch.equal(a.label, b.label)


def test_folders_without_pairs_are_refused(tmp_path):
    for root in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match=f"{root} holds no pairs"):
            open_pairs(root, make_config(tmp_path))
    save_pairs(tmp_path / "0")
    (tmp_path / "0/z0.npy").unlink()
    with pytest.raises(UserError, match="z0.npy does not exist"):
        open_pairs(tmp_path, make_config(tmp_path))


def test_fewer_pairs_than_a_batch_are_refused(tmp_path):
    save_pairs(tmp_path / "0", count=7)
    with pytest.raises(UserError, match="holds 7 pairs, fewer than training.batch_size 8"):
        create_batches(make_config(tmp_path), "cpu")
