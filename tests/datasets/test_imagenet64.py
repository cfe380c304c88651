"""ImageNet64 from the downsampled release, an EDM-style zip and a class-per-folder tree."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from datasets import load_images
from runtime.terminal import UserError
from tests.datasets.image_files import encode, label_file, make_config, png, random_images, write_folder, write_zip

IMAGES, LABELS = random_images(12, 3, 64), np.array([1, 1000, 5, 5, 7, 2, 3, 4, 9, 10, 11, 12])


def load(tmp_path, root, size=64):
    return load_images(make_config(tmp_path, "ImageNet64", root, size))


def write_release(folder, npz=False, labels=LABELS):
    """Write the images as three batches, in the release's form: rows of 3·64·64, labels from 1."""
    folder.mkdir(parents=True)
    for number, rows in enumerate(np.array_split(np.arange(len(IMAGES)), 3), 1):
        batch = {"data": IMAGES[rows].reshape(len(rows), -1), "labels": labels[rows].tolist(), "mean": np.zeros(12288)}
        path = folder / f"train_data_batch_{number}"
        if npz:
            np.savez(path.with_suffix(".npz"), **batch)
        else:
            path.write_bytes(pickle.dumps(batch))


@pytest.mark.parametrize("npz", [True, False])
def test_the_downsampled_release_is_read_pickled_and_as_npz(tmp_path, npz):
    write_release(tmp_path / "data", npz)
    found = load(tmp_path, tmp_path / "data")
    np.testing.assert_array_equal(found.images, IMAGES)
    np.testing.assert_array_equal(found.labels, LABELS - 1)
    assert len(found.class_names) == 1000


def test_the_release_is_found_in_the_folders_that_its_archives_make(tmp_path):
    write_release(tmp_path / "data" / "Imagenet64_train_part1")
    os.makedirs(tmp_path / "data" / "Imagenet64_train_part2")
    os.rename(tmp_path / "data" / "Imagenet64_train_part1" / "train_data_batch_3",
              tmp_path / "data" / "Imagenet64_train_part2" / "train_data_batch_3")
    np.testing.assert_array_equal(load(tmp_path, tmp_path / "data").images, IMAGES)


def test_the_release_can_be_halved_by_areas(tmp_path):
    write_release(tmp_path / "data")
    found = load(tmp_path, tmp_path / "data", size=32).images
    means = IMAGES.reshape(12, 3, 32, 2, 32, 2).mean((3, 5))
    assert np.abs(found - means).max() <= 1


def test_a_missing_batch_between_others_is_named(tmp_path):
    write_release(tmp_path / "data")
    os.remove(tmp_path / "data" / "train_data_batch_2")
    with pytest.raises(UserError, match="lacks train_data_batch_2"):
        load(tmp_path, tmp_path / "data")


@pytest.mark.parametrize("label", [0, 1001])
@pytest.mark.parametrize("npz", [True, False])
def test_labels_outside_1_to_1000_are_refused(tmp_path, npz, label):
    labels = LABELS.copy()
    labels[-1] = label
    write_release(tmp_path / "data", npz, labels)
    with pytest.raises(UserError, match=f"train_data_batch_3.* the first wrong one {label}; .* from 1 to 1000"):
        load(tmp_path, tmp_path / "data")


@pytest.mark.parametrize("name", ["train_data_batch_1", "train_data_batch_1.npz"])
def test_a_damaged_or_foreign_batch_is_named(tmp_path, name):
    for content in (b"oops", pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2]})):
        write_folder(tmp_path / "data", {name: content})
        with pytest.raises(UserError, match=f"{name} is no"):
            load(tmp_path, tmp_path / "data")


def test_an_npz_with_pickled_objects_is_not_executed(tmp_path):
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "train_data_batch_1.npz", data=np.array([object()], dtype=object), labels=[1])
    with pytest.raises(UserError, match="no readable npz"):
        load(tmp_path, tmp_path / "data")


def test_an_edm_zip_has_its_classes_in_dataset_json(tmp_path):
    names = [f"00000/img{number:08}.png" for number in range(4)]
    files = {name: png(image) for name, image in zip(names, IMAGES[:4], strict=True)}
    labels = dict(zip(names, [999, 0, 5, 5], strict=True))
    write_zip(tmp_path / "imagenet-64x64.zip", files | {"dataset.json": label_file(labels)})
    found = load(tmp_path, tmp_path / "imagenet-64x64.zip")
    np.testing.assert_array_equal(found.images, IMAGES[:4])
    assert found.labels.tolist() == [999, 0, 5, 5]


@pytest.mark.parametrize("inner", ["", "train/"])
def test_a_tree_of_jpegs_is_cropped_and_averaged_with_classes_by_folder(tmp_path, inner):
    photo = Image.new("RGB", (300, 128), (0, 0, 0))
    photo.paste((200, 100, 50), (86, 0, 214, 128))  # the central square
    jpeg = encode(photo, "JPEG", quality=95)
    write_folder(tmp_path / "data", {f"{inner}n01440764/a.JPEG": jpeg, f"{inner}n01443537/b.JPEG": jpeg,
                                     f"{inner}n01443537/c.JPEG": jpeg})
    found = load(tmp_path, tmp_path / "data")
    assert found.labels.tolist() == [0, 1, 1] and found.class_names == ("n01440764", "n01443537")
    centre = found.images[0][:, 2:-2, 2:-2].astype(int)
    assert np.abs(centre - np.array([200, 100, 50])[:, None, None]).max() <= 5
    assert found.notes == {"cropped to the central square": 3, "resampled to 64×64 with the area filter": 3}


def test_a_missing_path_says_what_belongs_there(tmp_path):
    with pytest.raises(UserError, match="nothing at .*none: put train_data_batch_1 … 10 .*data_root"):
        load(tmp_path, tmp_path / "none")
