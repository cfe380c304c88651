"""Image data sets by config: folders and archives of images, classes, parts of sets, and data sets from outside."""

import numpy as np
import pytest

from configs.command_line import parse_command_line
from datasets import ImageSet, create_batches, load_images, sources, subset
from datasets.image_files import FileTree, find_labels
from runtime.terminal import UserError
from tests.datasets.image_files import label_file, make_config, png, random_images, write_folder, write_mnist, write_zip
from tests.helpers import CIFAR10, overrides

IMAGES = random_images(5, 3, 64)
FFHQ = {f"00000/img{number:08}.png": png(image) for number, image in enumerate(IMAGES)}


def load_own(tmp_path, files, size, **data):
    """Load the images of {name: bytes}, written to a folder, as a data set of one's own."""
    write_folder(tmp_path / "own", files)
    return load_images(make_config(tmp_path, "custom", tmp_path / "own", size, **data))


def digits(tmp_path, **data):
    return make_config(tmp_path, "digits", "", 8, **{"channels": 1, **data})


@pytest.mark.parametrize("with_json", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_ffhq64_comes_from_edm_zip_and_from_folder_of_pngs(tmp_path, packed, with_json):
    files = FFHQ | ({"dataset.json": label_file(None)} if with_json else {})
    root = tmp_path / "ffhq-64x64.zip" if packed else tmp_path / "FFHQ64"
    (write_zip if packed else write_folder)(root, files)
    found = load_images(make_config(tmp_path, "FFHQ64", root, 64))
    np.testing.assert_array_equal(found.images, IMAGES)
    assert found.labels is None and found.class_names is None and str(root) in found.source


def test_ffhq_thumbnails_are_halved_with_the_filter_that_is_named(tmp_path):
    write_folder(tmp_path / "thumbnails128x128", {"00000/00000.png": png(np.full((3, 128, 128), 90, np.uint8))})
    found = load_images(make_config(tmp_path, "FFHQ64", tmp_path / "thumbnails128x128", 64))
    assert found.images.shape == (1, 3, 64, 64) and (found.images == 90).all()
    assert found.notes == {"resampled to 64×64 with the lanczos filter": 1}


def test_own_images_of_any_size_take_their_classes_from_sub_folders(tmp_path):
    found = load_own(tmp_path, {"dog/wide.png": png(random_images(1, 3, 12)[0][:, :9]),
                                "cat/inner/grey.png": png(random_images(1, 1, 20)[0]),
                                "cat/plain.png": png(random_images(1, 3, 8, seed=4)[0])}, 8, num_classes=2)
    assert found.images.shape == (3, 3, 8, 8) and found.class_names == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 1] and found.labels.dtype == np.int64
    np.testing.assert_array_equal(found.images[1], random_images(1, 3, 8, seed=4)[0])
    assert found.notes["grey, repeated into three channels"] == 1


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("above", ["", "mydata/", "a/b/"])
def test_own_images_take_their_classes_from_dataset_json_beside_them(tmp_path, packed, above):
    files = {f"{above}x/a.png": png(IMAGES[0]), f"{above}y/b.png": png(IMAGES[1])}
    root = tmp_path / ("own.zip" if packed else "own")
    (write_zip if packed else write_folder)(
        root, files | {f"{above}dataset.json": label_file({"x/a.png": 1, "y/b.png": 0})})
    found = load_images(make_config(tmp_path, "custom", root, 64, num_classes=2))
    assert found.labels.tolist() == [1, 0] and found.class_names == ("0", "1")


@pytest.mark.parametrize(("names", "labels", "class_names"), [
    (["cat/1.png", "cat/x/2.png", "ant/3.png"], [0, 1, 1], ("ant", "cat")),
    (["1.png", "cat/1.png"], None, None), (["1.png"], None, None),
    (["own/cat/1.png", "own/ant/3.png"], [0, 1], ("ant", "cat")),  # zipped with its folder
    (["own/1.png", "own/ant/3.png"], [0, 0], ("own",)),
    (["cat/1.png", "cat/2.png"], [0, 0], ("cat",)),
])
def test_classes_are_the_sub_folders_of_the_folder_that_holds_all_images(tmp_path, names, labels, class_names):
    write_folder(tmp_path, dict.fromkeys(names, b"-"))
    assert find_labels(FileTree(tmp_path)) == (labels, class_names)


@pytest.mark.parametrize(("content", "message"), [
    (b"not json", "not of the form"), (b"[]", "not of the form"), (b"{}", "not of the form"),
    (b"[" * 100000, "not of the form"), (b'{"labels": [[["a.png"], 1]]}', "not of the form"),
    (b'{"labels": 3}', "not of the form"), (label_file({"b.png": 1}), "the label None"),
    (label_file({"a.png": -1}), "the label -1"), (label_file({"a.png": 1.5}), "the label 1.5"),
    (label_file({"a.png": True}), "the label True"), (label_file({"a.png": 10**9}), "the label 1000000000"),
    (b'{"labels": [["a.png", 1], ["a.png", 2]]}', "gives a.png the labels 1 and 2"),
])
def test_a_wrong_dataset_json_is_one_sentence_and_one_without_labels_gives_none(tmp_path, content, message):
    write_folder(tmp_path, {"a.png": b"-", "dataset.json": label_file(None)})
    assert find_labels(FileTree(tmp_path)) == (None, None)
    write_folder(tmp_path, {"dataset.json": content})
    with pytest.raises(UserError, match=message):
        find_labels(FileTree(tmp_path))


@pytest.mark.parametrize(("files", "data", "message"), [
    ({"a.png": png(IMAGES[0]), "b.png": png(IMAGES[1])[:500]}, {}, "corrupt image b.png .*skip_corrupt"),
    ({"a.png": b"oops"}, {"skip_corrupt": True}, "no usable image"),
    ({"a.png": png(IMAGES[0])}, {"num_classes": 2}, "data.num_classes 2: .*own has no labels"),
    ({"a.png": png(IMAGES[0])}, {"channels": 2}, "data.num_channels 2"),
    ({f"{split}/{k}/a.png": png(IMAGES[k]) for split in ("train", "val") for k in (0, 1)}, {"num_classes": 2},
     "sub-folders train: 2, val: 2, which are splits: set data.data_root"),
])
def test_images_that_make_no_data_set_are_refused(tmp_path, files, data, message):
    with pytest.raises(UserError, match=message):
        load_own(tmp_path, files, 64, **data)
    assert "corrupt" not in message or not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_corrupt_images_are_skipped_and_counted_when_asked(tmp_path, capsys):
    files = {f"{kind}/{n}.png": png(IMAGES[n]) for kind in ("x", "y") for n in range(2)}
    found = load_own(tmp_path, files | {"x/bad.png": b"oops"}, 64, skip_corrupt=True)
    assert len(found) == 4 and found.labels.tolist() == [0, 0, 1, 1]
    assert len(found.skipped) == 1 and "x/bad.png" in found.skipped[0]
    assert "1 images: skipped, the first: corrupt image x/bad.png in" in capsys.readouterr().err
    with pytest.raises(UserError, match="was cached without 1 images, the first: corrupt image x/bad.png"):
        load_images(make_config(tmp_path, "custom", tmp_path / "own", 64))


def test_many_images_keep_their_order_and_labels_through_parallel_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FILES_AT_ONCE", 3)
    images = random_images(50, 1, 4)
    files = {f"{n % 7}/{n:03}.png": png(image) for n, image in enumerate(images)}
    found = load_own(tmp_path, files, 4, channels=1)
    order = sorted(range(50), key=lambda n: (n % 7, n))
    np.testing.assert_array_equal(found.images, images[order])
    assert found.labels.tolist() == [n % 7 for n in order]


SET = ImageSet(random_images(30, 1, 4), np.arange(30) % 3, ("ant", "bee", "cat", "dodo"), "thirty images")


def test_subset_all_is_the_whole_set_and_one_by_class_name_is_that_class():
    assert subset(SET, "all") is SET
    part = subset(SET, "bee")
    np.testing.assert_array_equal(part.images, SET.images[1::3])
    assert set(part.labels) == {1} and part.class_names == SET.class_names


def test_random_subset_is_drawn_without_repetition_and_always_the_same():
    first, again = subset(SET, "random_12"), subset(SET, "random_12")
    np.testing.assert_array_equal(first.images, again.images)
    assert len(np.unique(first.images.reshape(12, -1), axis=0)) == 12
    places = [int(np.flatnonzero((SET.images == image).all((1, 2, 3)))[0]) for image in first.images]
    np.testing.assert_array_equal(first.labels, SET.labels[places])


@pytest.mark.parametrize(("name", "labels", "message"), [
    ("random_31", True, "from 1 to 30"), ("random_0", True, "from 1 to 30"), ("random_x", True, "from 1 to 30"),
    ("cow", True, "no such class; choose all, random_N or one of ant, bee, cat, dodo"), ("cat", False, "no such class"),
    ("dodo", True, "has no image")])
def test_an_impossible_subset_is_one_sentence(name, labels, message):
    with pytest.raises(UserError, match=f"data.train_subset {name}.*{message}"):
        subset(SET if labels else ImageSet(SET.images, None, None, "thirty images"), name)


@pytest.mark.parametrize("field", ["data.train_subset", "sampling.train_subset"])
def test_training_sees_the_class_that_is_asked_for_by_either_name(tmp_path, field):
    config = digits(tmp_path, num_classes=10)
    config[field.split(".")[0]].train_subset = "7"
    source = create_batches(config, "cpu")
    assert len(source) == 179 and (source.batch(0, 0, 128).label.argmax(1) == 7).all()


def test_two_subsets_that_contradict_each_other_are_refused(tmp_path):
    config = digits(tmp_path, train_subset="7")
    config.sampling.train_subset = "random_5"
    with pytest.raises(UserError, match="data.train_subset is 7, but sampling.train_subset, .* random_5"):
        load_images(config)


def test_data_root_has_a_default_and_an_older_name(tmp_path):
    config = make_config(tmp_path, "FFHQ64", "", 64)
    for root, older in (("data/FFHQ64", ""), ("older", "older")):
        config.data.custom_data_root = older
        with pytest.raises(UserError, match=f"nothing at {root}: put"):
            load_images(config)
    config.data.data_root = "newer"
    with pytest.raises(UserError, match="nothing at newer: put"):
        load_images(config)


def test_digits_need_no_files_and_keep_their_values(tmp_path):
    found = load_images(digits(tmp_path, num_classes=10))
    assert found.images.shape == (1797, 1, 8, 8) and found.images.max() == 255 and found.images[0, 0, 0, 2] == 80
    assert found.labels[:4].tolist() == [0, 1, 2, 3] and found.class_names == tuple("0123456789")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("classes", [9, 20])
def test_another_number_of_classes_than_there_are_is_refused(tmp_path, classes):
    said = f"data.num_classes {classes}: .*images of 10 classes .0: 178, .*: set it to their number"
    with pytest.raises(UserError, match=said):
        load_images(digits(tmp_path, num_classes=classes))


def test_fewer_images_than_a_batch_are_refused(tmp_path):
    config = digits(tmp_path, num_classes=10)
    config.training.batch_size = 1798
    with pytest.raises(UserError, match="digits.* has 1797 images, fewer than training.batch_size 1798"):
        create_batches(config, "cpu")
    config.training.batch_size = 1797
    assert create_batches(config, "cpu").batch(0, 0, 3).z1.shape == (3, 1, 8, 8)


def test_batches_follow_the_config(tmp_path):
    config = digits(tmp_path, num_classes=10, use_aug=True, on_device="false")
    source = create_batches(config, "cpu")
    assert source.resident is None and len(source.flips) == 2
    batch = source.batch(0, 0, 128)
    assert batch.label.shape == (128, 10)
    config.seed += 1
    assert not batch.z1.equal(create_batches(config, "cpu").batch(0, 0, 128).z1)


@pytest.mark.parametrize(("arguments", "mirrored", "said"), [
    ([], False, "not mirrored"), (["--config.data.random_flip", "true"], True, "are mirrored")])
def test_mnist_on_the_cifar10_config_is_mirrored_on_request_and_says_so(tmp_path, capsys, arguments, mirrored, said):
    write_mnist(tmp_path / "data", random_images(200, 1, 28), np.arange(200) % 10, packed=False)
    fields = overrides(data__dataset="MNIST", data__data_root=tmp_path / "data", data__num_channels=1,
                       data__cache_dir=tmp_path / "cache")
    config, _, _ = parse_command_line(["train.py", "--config", CIFAR10, *fields, *arguments])
    assert len(create_batches(config, "cpu").flips) == mirrored
    assert said in capsys.readouterr().err
