"""Batches of images: a pure function of seed, update and place, whatever brings them to the device."""

import numpy as np
import pytest
import torch

from datasets import loading
from datasets.augment import TRANSFORMS, Augmentation
from datasets.images import ImageSet
from datasets.loading import DeviceRows, HostRows, ImageBatches, StreamedRows, create_rows
from runtime.errors import UserError
from tests.datasets.image_files import random_images

CPU = torch.device("cpu")
SET = ImageSet(random_images(50, 3, 8), np.arange(50) % 10, None, "fifty images")
ROWS = {"host": lambda: HostRows(SET.images), "device": lambda: DeviceRows(SET.images, CPU),
        "streamed": lambda: StreamedRows(SET.images, CPU)}


def make_batches(rows="host", **options):
    options = {"num_classes": 10, "random_flip": True, **options}
    return ImageBatches(SET, ROWS[rows](), 16, 7, **options)


def test_an_unflipped_batch_is_the_images_of_its_order_with_their_labels():
    source = make_batches(random_flip=False)
    batch, indices = source.batch(5, 0, 16), source.order.indices(5, 0, 16)
    np.testing.assert_allclose(batch.z1.numpy(), SET.images[indices] / 127.5 - 1, atol=1e-6)
    assert torch.equal(batch.label.argmax(1), torch.from_numpy(SET.labels[indices]))
    assert batch.z0 is None and batch.augment_label is None
    assert source.batch(0, 0, 16).z1.shape[1:] == source.shape and len(source) == 50


@pytest.mark.parametrize("rows", ROWS)
def test_processes_and_accumulation_steps_see_parts_of_one_batch(rows):
    whole, parts = make_batches(), make_batches(rows)
    for update in (0, 1, 2, 9, 3):  # in order, then jumps forward and back, as after a restored state
        expected = whole.batch(update, 0, 16)
        found = [parts.batch(update, low, low + 4) for low in (0, 4, 8, 12)]
        assert torch.equal(torch.cat([batch.z1 for batch in found]), expected.z1)
        assert torch.equal(torch.cat([batch.label for batch in found]), expected.label)


def test_augmentation_belongs_to_the_place_in_the_global_batch():
    augmentation = Augmentation(dict.fromkeys(TRANSFORMS, 0.5), 7, 16)
    source = make_batches(augmentation=augmentation)
    whole, part = source.batch(3, 0, 16), source.batch(3, 5, 11)
    torch.testing.assert_close(part.z1, whole.z1[5:11], atol=1e-6, rtol=0)
    assert torch.equal(part.augment_label, whole.augment_label[5:11])
    assert not torch.equal(whole.z1, make_batches().batch(3, 0, 16).z1)
    assert whole.z1.abs().max() <= 1


def test_about_half_of_the_samples_are_flipped_each_on_its_own():
    flipped, plain = make_batches(), make_batches(random_flip=False)
    turned = 0
    for update in range(40):
        a, b = flipped.batch(update, 0, 16).z1, plain.batch(update, 0, 16).z1
        mirrored = (a == b.flip(-1)).flatten(1).all(1)
        assert (mirrored | (a == b).flatten(1).all(1)).all()
        turned += int(mirrored.sum())
    assert 270 < turned < 370  # of 640: mean 320, standard deviation 12.6


def test_streamed_images_are_gathered_one_update_ahead_and_no_further():
    source = make_batches("streamed")
    for update in range(5):
        for low in (0, 8):
            source.batch(update, low, low + 8)
        assert {key[0] for key in source.rows.gathered} == {update + 1}
        assert len(source.rows.gathered) == 2
    source.batch(100, 0, 16)
    assert {key[0] for key in source.rows.gathered} == {101}


@pytest.mark.parametrize(("on_device", "kind"), [("auto", HostRows), ("true", HostRows), ("false", StreamedRows)])
def test_on_a_cpu_images_stay_where_they_are_unless_streaming_is_asked_for(on_device, kind):
    assert isinstance(create_rows(SET.images, CPU, on_device), kind)


def test_a_gpu_keeps_only_images_that_leave_room_for_the_network(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * SET.images.nbytes, 0))
    assert isinstance(create_rows(SET.images, torch.device("cuda"), "auto"), StreamedRows)


def test_images_that_were_told_to_live_on_a_full_gpu_are_one_sentence(monkeypatch):
    def refuse(*words):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loading, "DeviceRows", refuse)
    with pytest.raises(UserError, match="data.on_device true: .* do not fit: .*data.on_device false"):
        create_rows(SET.images, torch.device("cuda"), "true")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("on_device", ["true", "false"])
def test_batches_on_a_gpu_are_those_of_the_cpu(on_device):
    rows = create_rows(SET.images, torch.device("cuda", 0), on_device)
    source, expected = ImageBatches(SET, rows, 16, 7, 10), make_batches(random_flip=False)
    for update in range(3):
        found, wanted = source.batch(update, 4, 12), expected.batch(update, 4, 12)
        assert found.z1.is_cuda and torch.equal(found.label.cpu(), wanted.label)
        torch.testing.assert_close(found.z1.cpu(), wanted.z1, atol=1e-6, rtol=0)


def test_images_are_not_copied_into_memory_before_they_are_asked_for(tmp_path):
    np.save(tmp_path / "images.npy", SET.images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert np.shares_memory(HostRows(mapped).images, mapped) and np.shares_memory(
        StreamedRows(mapped, CPU).images, mapped)
