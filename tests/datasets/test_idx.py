"""MNIST and Fashion-MNIST as IDX files."""

import gzip
import os

import numpy as np
import pytest

from datasets import load_images
from datasets.sources import IDX_FILES
from runtime.terminal import UserError
from tests.datasets.image_files import idx_bytes, make_config, random_images, write_mnist

IMAGE_FILE, LABEL_FILE = IDX_FILES
IMAGES, LABELS = random_images(12, 1, 28), np.arange(12) % 10


def load(tmp_path, dataset="MNIST", size=28, channels=1, **data):
    return load_images(make_config(tmp_path, dataset, tmp_path / "data", size, channels, **data))


@pytest.mark.parametrize("inner", ["", "raw", "FashionMNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_gzipped_and_plain_files_are_found_where_torchvision_and_people_put_them(tmp_path, packed, inner):
    write_mnist(tmp_path / "data" / inner, IMAGES, LABELS, packed)
    found = load(tmp_path, "FashionMNIST", num_classes=10)
    np.testing.assert_array_equal(found.images, IMAGES)
    np.testing.assert_array_equal(found.labels, LABELS)
    assert found.class_names[9] == "Ankle boot"


def test_names_with_a_dot_are_accepted(tmp_path):
    write_mnist(tmp_path / "data", IMAGES, LABELS, packed=False)
    os.rename(tmp_path / "data" / IMAGE_FILE, tmp_path / "data" / "train-images.idx3-ubyte")
    assert len(load(tmp_path)) == 12


def test_mnist_fits_a_colour_network_of_another_size_and_says_so(tmp_path):
    write_mnist(tmp_path / "data", np.full((3, 1, 28, 28), 50, np.uint8), LABELS[:3], packed=True)
    found = load(tmp_path, size=32, channels=3)
    assert found.images.shape == (3, 3, 32, 32) and (found.images == 50).all()
    assert found.notes == {"resampled to 32×32 with the lanczos filter": 3, "grey, repeated into three channels": 3}


def test_a_missing_file_and_a_missing_folder_say_what_belongs_there(tmp_path):
    with pytest.raises(UserError, match=f"nothing at .*data: put {IMAGE_FILE} and {LABEL_FILE}"):
        load(tmp_path)
    write_mnist(tmp_path / "data", IMAGES, LABELS, packed=True)
    os.remove(tmp_path / "data" / (LABEL_FILE + ".gz"))
    with pytest.raises(UserError, match=f"lacks {LABEL_FILE}: put"):
        load(tmp_path)


@pytest.mark.parametrize(("name", "data", "message"), [
    (IMAGE_FILE, b"", "no IDX file"), (IMAGE_FILE, idx_bytes(LABELS.astype(np.uint8)), "no IDX file"),
    (IMAGE_FILE, idx_bytes(IMAGES[:, 0])[:-1], "should hold 9408 values and holds 9407"),
    (IMAGE_FILE, gzip.compress(idx_bytes(IMAGES[:, 0]), mtime=0)[:-20], "damaged gzip"),
    (LABEL_FILE, idx_bytes(LABELS[:5].astype(np.uint8)), "12 images, .* 5 labels"),
    (LABEL_FILE, idx_bytes((LABELS + 1).astype(np.uint8)), "the first wrong one 10; .* from 0 to 9"),
])
def test_a_damaged_or_foreign_file_is_one_sentence(tmp_path, name, data, message):
    write_mnist(tmp_path / "data", IMAGES, LABELS, packed=False)
    (tmp_path / "data" / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        load(tmp_path)
