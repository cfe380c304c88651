"""Image sets by config, and parts of them."""

import numpy as np
import pytest

from datasets import create_batches, load_images, subset
from datasets.images import ImageSet, data_root
from runtime.errors import UserError
from tests.datasets.image_files import make_config, png, random_images, write_folder

SET = ImageSet(random_images(30, 1, 4), np.arange(30) % 3, ("ant", "bee", "cat", "dodo"), "thirty images")


def test_subset_all_is_the_whole_set():
    assert subset(SET, "all", 0) is SET


def test_subset_by_class_name_is_that_class():
    part = subset(SET, "bee", 0)
    np.testing.assert_array_equal(part.images, SET.images[1::3])
    assert set(part.labels) == {1} and part.class_names == SET.class_names


def test_random_subset_is_drawn_by_the_seed_without_repetition():
    first, again, other = subset(SET, "random_12", 5), subset(SET, "random_12", 5), subset(SET, "random_12", 6)
    np.testing.assert_array_equal(first.images, again.images)
    assert len(np.unique(first.images.reshape(12, -1), axis=0)) == 12
    assert not np.array_equal(first.images, other.images)
    places = [int(np.flatnonzero((SET.images == image).all((1, 2, 3)))[0]) for image in first.images]
    np.testing.assert_array_equal(first.labels, SET.labels[places])


@pytest.mark.parametrize(("name", "message"), [
    ("random_31", "from 1 to 30"), ("random_0", "from 1 to 30"), ("random_x", "from 1 to 30"),
    ("cow", "no such class; choose all, random_N or one of ant, bee, cat, dodo"), ("dodo", "no image of this class")])
def test_an_impossible_subset_is_one_sentence(name, message):
    with pytest.raises(UserError, match=f"sampling.train_subset {name}: .*{message}"):
        subset(SET, name, 0)


def test_a_set_without_labels_has_no_class_subsets():
    with pytest.raises(UserError, match="no such class"):
        subset(ImageSet(SET.images, None, None, "thirty images"), "cat", 0)


def test_data_root_has_a_default_and_an_older_name(tmp_path):
    config = make_config(tmp_path, "FFHQ64", "", 64)
    assert str(data_root(config)) == "data/FFHQ64"
    config.data.custom_data_root = "older"
    assert str(data_root(config)) == "older"
    config.data.data_root = "newer"
    assert str(data_root(config)) == "newer"


def test_digits_need_no_files_and_keep_their_values(tmp_path):
    found = load_images(make_config(tmp_path, "digits", "", 8, channels=1, num_classes=10))
    assert found.images.shape == (1797, 1, 8, 8) and found.images.max() == 255 and found.images[0, 0, 0, 2] == 80
    assert found.labels[:4].tolist() == [0, 1, 2, 3] and found.class_names == tuple("0123456789")
    assert not (tmp_path / "cache").exists()


def test_classes_without_labels_are_refused(tmp_path):
    write_folder(tmp_path / "own", {"a.png": png(random_images(1, 3, 8)[0])})
    with pytest.raises(UserError, match="data.num_classes 2: .*own has no labels"):
        load_images(make_config(tmp_path, "custom", tmp_path / "own", 8, num_classes=2))


def test_more_labels_than_classes_are_refused(tmp_path):
    with pytest.raises(UserError, match="data.num_classes 9: .*labels up to 9; set data.num_classes 10"):
        load_images(make_config(tmp_path, "digits", "", 8, channels=1, num_classes=9))


def test_two_channels_are_refused(tmp_path):
    with pytest.raises(UserError, match="data.num_channels 2"):
        load_images(make_config(tmp_path, "digits", "", 8, channels=2))


def test_fewer_images_than_a_batch_are_refused(tmp_path):
    write_folder(tmp_path / "own", {f"{n}.png": png(random_images(1, 3, 8)[0]) for n in range(3)})
    config = make_config(tmp_path, "custom", tmp_path / "own", 8)
    with pytest.raises(UserError, match="own has 3 images, fewer than training.batch_size 128"):
        create_batches(config, "cpu")
    config.training.batch_size = 3
    assert create_batches(config, "cpu").batch(0, 0, 3).z1.shape == (3, 3, 8, 8)


def test_batches_follow_the_config(tmp_path):
    config = make_config(tmp_path, "digits", "", 8, channels=1, num_classes=10, use_aug=True, on_device="false")
    batch = create_batches(config, "cpu").batch(0, 0, 128)
    assert batch.label.shape == (128, 10) and batch.augment_label.shape[0] == 128
    config.seed += 1
    assert not batch.z1.equal(create_batches(config, "cpu").batch(0, 0, 128).z1)
