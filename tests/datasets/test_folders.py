"""FFHQ64 and anyone's own images: folders and zips of pictures."""

import threading

import numpy as np
import pytest

from datasets import folders, load_images
from datasets.folders import map_ahead
from runtime.errors import UserError
from tests.datasets.image_files import label_file, make_config, png, random_images, write_folder, write_zip

IMAGES = random_images(5, 3, 64)
FFHQ = {f"00000/img{number:08}.png": png(image) for number, image in enumerate(IMAGES)}


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
    flat = np.full((3, 128, 128), 90, np.uint8)
    write_folder(tmp_path / "thumbnails128x128", {"00000/00000.png": png(flat)})
    found = load_images(make_config(tmp_path, "FFHQ64", tmp_path / "thumbnails128x128", 64))
    assert found.images.shape == (1, 3, 64, 64) and (found.images == 90).all()
    assert found.notes == {"resampled to 64×64 with the lanczos filter": 1}


def test_own_images_of_any_size_take_their_classes_from_sub_folders(tmp_path):
    write_folder(tmp_path / "own", {"dog/wide.png": png(random_images(1, 3, 12)[0][:, :9]),
                                    "cat/inner/grey.png": png(random_images(1, 1, 20)[0]),
                                    "cat/plain.png": png(random_images(1, 3, 8, seed=4)[0])})
    found = load_images(make_config(tmp_path, "custom", tmp_path / "own", 8, num_classes=2))
    assert found.images.shape == (3, 3, 8, 8) and found.class_names == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 1] and found.labels.dtype == np.int64
    np.testing.assert_array_equal(found.images[1], random_images(1, 3, 8, seed=4)[0])
    assert found.notes["grey, repeated into three channels"] == 1


def test_own_images_take_their_classes_from_dataset_json(tmp_path):
    files = {"x/a.png": png(IMAGES[0]), "x/b.png": png(IMAGES[1])}
    write_zip(tmp_path / "own.zip", files | {"dataset.json": label_file({"x/a.png": 4, "x/b.png": 2})})
    found = load_images(make_config(tmp_path, "custom", tmp_path / "own.zip", 64, num_classes=5))
    assert found.labels.tolist() == [4, 2] and len(found.class_names) == 5


def test_a_corrupt_image_among_good_ones_is_named(tmp_path):
    write_folder(tmp_path / "own", {"a.png": png(IMAGES[0]), "b.png": png(IMAGES[1])[:500]})
    with pytest.raises(UserError, match="corrupt image b.png .*skip_corrupt"):
        load_images(make_config(tmp_path, "custom", tmp_path / "own", 64))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_corrupt_images_are_skipped_and_counted_when_asked(tmp_path, capsys):
    files = {f"{kind}/{n}.png": png(IMAGES[n]) for kind in ("x", "y") for n in range(2)}
    write_folder(tmp_path / "own", files | {"x/bad.png": b"oops"})
    config = make_config(tmp_path, "custom", tmp_path / "own", 64, skip_corrupt=True)
    found = load_images(config)
    assert len(found) == 4 and found.labels.tolist() == [0, 0, 1, 1]
    assert len(found.skipped) == 1 and "x/bad.png" in found.skipped[0]
    assert "1 corrupt images skipped, the first x/bad.png" in capsys.readouterr().err
    config.data.skip_corrupt = False
    with pytest.raises(UserError, match="was cached without 1 corrupt images"):
        load_images(config)


def test_only_corrupt_images_is_no_data_set(tmp_path):
    write_folder(tmp_path / "own", {"a.png": b"oops"})
    with pytest.raises(UserError, match="no usable image"):
        load_images(make_config(tmp_path, "custom", tmp_path / "own", 64, skip_corrupt=True))


def test_many_pictures_keep_their_order_and_labels_through_parallel_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "BLOCK", 3)
    images = random_images(50, 1, 4)
    write_folder(tmp_path / "own", {f"{n % 7}/{n:03}.png": png(image) for n, image in enumerate(images)})
    found = load_images(make_config(tmp_path, "custom", tmp_path / "own", 4, channels=1))
    order = sorted(range(50), key=lambda n: (n % 7, n))
    np.testing.assert_array_equal(found.images, images[order])
    assert found.labels.tolist() == [n % 7 for n in order]


def test_decoding_runs_ahead_in_parallel_but_never_far():
    started, lock, most = [], threading.Lock(), 0

    def work(item):
        with lock:
            started.append(item)
        return item

    for done, item in enumerate(map_ahead(work, range(500))):
        assert item == done
        most = max(most, len(started) - done)
    assert most <= 2 * len(folders.os.sched_getaffinity(0)) + 1


def test_an_error_in_one_thread_ends_the_work():
    def fail(item):
        raise UserError(f"item {item}")

    with pytest.raises(UserError, match="item 0"):
        list(map_ahead(fail, range(1000)))
