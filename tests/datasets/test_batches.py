"""Batches of images: a pure function of seed, update and place, whatever brings them to the device."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datasets import ImageSet, batches
from datasets.batches import Batches, EndlessOrder, copy_to_device, pixels_to_float
from runtime.terminal import UserError
from tests.datasets.image_files import random_images
from tests.helpers import config_of

CPU = torch.device("cpu")
SET = ImageSet(random_images(50, 3, 8), np.arange(50) % 10, None, "fifty images")


def make_batches(on_device="auto", mirror=True, use_aug=False):
    config = config_of(training__batch_size=16, seed=7, data__on_device=on_device, data__use_aug=use_aug,
                       data__num_classes=10)
    return Batches(SET, EndlessOrder(50, 7), config, CPU, mirror)


def test_an_unflipped_batch_is_the_images_of_its_order_with_their_labels():
    source = make_batches(mirror=False)
    batch, indices = source.batch(5, 0, 16), source.order.at(np.arange(80, 96))
    np.testing.assert_allclose(batch.z1.numpy(), SET.images[indices] / 127.5 - 1, atol=1e-6)
    assert torch.equal(batch.label, torch.eye(10)[SET.labels[indices]])
    assert batch.z0 is None
    assert source.batch(0, 0, 16).z1.shape[1:] == source.shape and len(source) == 50


@pytest.mark.parametrize("on_device", ["auto", "true"])
def test_processes_and_accumulation_steps_see_parts_of_one_batch(on_device):
    whole, parts = make_batches(use_aug=True), make_batches(on_device, use_aug=True)
    for update in (0, 1, 2, 9, 3):  # in order, then jumps forward and back, as after a restored state
        expected = whole.batch(update, 0, 16)
        found = [parts.batch(update, low, low + 4) for low in (0, 4, 8, 12)]
        assert torch.equal(torch.cat([batch.z1 for batch in found]), expected.z1)
        assert torch.equal(torch.cat([batch.label for batch in found]), expected.label)


def transformed(source):
    """Return how many samples of 2,000 are upside down (first axis) and mirrored (second axis)."""
    plain, counts = make_batches(mirror=False), np.zeros((2, 2), int)
    for update in range(125):
        found, images = source.batch(update, 0, 16).z1, plain.batch(update, 0, 16).z1
        for upside_down, mirrored in np.ndindex(2, 2):
            expected = images.flip([-2] * upside_down + [-1] * mirrored)
            counts[upside_down, mirrored] += int((found == expected).flatten(1).all(1).sum())
    assert counts.sum() == 2000
    return counts


def test_use_aug_turns_six_percent_upside_down_beside_mirroring_half():
    counts = transformed(make_batches(mirror=False, use_aug=True))
    assert 80 < counts[1].sum() < 160  # mean 120, standard deviation 10.6
    assert 900 < counts[:, 1].sum() < 1100 and counts.min() > 30


def test_about_half_of_the_samples_are_mirrored():
    counts = transformed(make_batches())
    assert 900 < counts[0, 1] < 1100 and not counts[1].any()  # mean 1000, standard deviation 22


def test_a_gpu_keeps_only_images_that_leave_room_for_the_network(monkeypatch):
    monkeypatch.setattr(batches, "copy_to_device", lambda samples, device: {"z1": device.type})
    for free, resident in ((3, None), (5, {"z1": "cuda"})):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free * SET.images.nbytes, 0))
        assert Batches(SET, EndlessOrder(50, 7), config_of(), "cuda").resident == resident


def test_images_that_live_on_the_device_are_copied_whole(monkeypatch):
    monkeypatch.setattr(batches, "COPIED_AT_ONCE", 7)
    whole = copy_to_device(SET, CPU)
    assert torch.equal(whole["z1"], torch.from_numpy(SET.images))
    assert torch.equal(whole["label"], torch.from_numpy(SET.labels))


def test_images_that_were_told_to_live_on_a_full_gpu_are_one_sentence(monkeypatch):
    def refuse(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(batches, "copy_to_device", refuse)
    with pytest.raises(UserError, match="data.on_device true: .* do not fit: set it false"):
        make_batches("true")


def test_all_pixel_values_fill_the_range_and_come_back():
    values = torch.arange(256, dtype=torch.uint8)
    scaled = pixels_to_float(values)
    assert scaled[0] == -1 and scaled[255] == 1 and scaled.dtype == torch.float32
    assert torch.equal(((scaled + 1) * 127.5).round().to(torch.uint8), values)


counts, sizes = st.integers(1, 40), st.integers(1, 50)


@given(counts, sizes, st.integers(0, 2**63))
def test_every_epoch_shows_each_sample_once(count, batch_size, seed):
    parts = np.split(np.arange(3 * count), range(batch_size, 3 * count, batch_size))
    stream = np.concatenate([EndlessOrder(count, seed).at(part) for part in parts])
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(counts, sizes, st.data())
def test_any_division_of_a_batch_gives_the_same_samples(count, batch_size, data):
    endless, update = EndlessOrder(count, 3), data.draw(st.integers(0, 10**6))
    positions = update * batch_size + np.arange(batch_size)
    cuts = sorted(data.draw(st.lists(st.integers(0, batch_size), max_size=4)))
    parts = [endless.at(part) for part in np.split(positions, cuts)]
    np.testing.assert_array_equal(np.concatenate(parts), endless.at(positions))


def test_position_of_a_long_run_is_found_without_walking_there(monkeypatch):
    drawn, draw = [], batches._permutation.__wrapped__
    monkeypatch.setattr(batches, "_permutation", lambda *arguments: drawn.append(arguments) or draw(*arguments))
    EndlessOrder(1000, 0).at(128 * 10**9 + np.arange(128))
    assert len(drawn) <= 2  # at most the epochs that this batch touches


def test_epochs_and_seeds_have_different_orders():
    orders = [EndlessOrder(50, seed).at(50 * epoch + np.arange(50)).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(map(tuple, orders))) == 4


def test_order_stays_the_same_across_versions():
    """A run that is resumed after an upgrade must go on with the same samples."""
    endless = EndlessOrder(10, 42)
    assert endless.at(np.arange(10)).tolist() == [3, 1, 7, 8, 6, 5, 9, 4, 0, 2]
    assert endless.at(np.arange(70, 80)).tolist() == [6, 2, 8, 7, 9, 1, 0, 5, 4, 3]
