"""CIFAR-10, MNIST and ImageNet64 in the forms in which they are distributed; files that are hostile or damaged."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import random
import resource
import tarfile
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10

from datasets import load_images
from datasets.sources import IDX_FILES, load_arrays
from metrics.statistics import open_images
from runtime.terminal import UserError
from tests.datasets import image_files as files

FORMS = {"CIFAR10": (32, 3), "ImageNet64": (64, 3)}  # the others: 28×28, grey
CIFAR, CIFAR_LABELS = files.random_images(20, 3, 32), np.arange(20) % 10
DIGITS, DIGIT_LABELS = files.random_images(12, 1, 28), np.arange(12) % 10
IMAGENET = files.random_images(12, 3, 64)
IMAGENET_LABELS = np.array([1, 1000, 5, 5, 7, 2, 3, 4, 9, 10, 11, 12])
IMAGE_FILE, LABEL_FILE = IDX_FILES


def load(tmp_path, dataset, root="data", size=None, channels=None, **data):
    own_size, own_channels = FORMS.get(dataset, (28, 1))
    return load_images(files.make_config(tmp_path, dataset, tmp_path / root, size or own_size,
                                         channels or own_channels, **data))


# CIFAR-10


def write_archive(path):
    """Write the distributed archive of the images."""
    files.write_cifar(path.parent / "unpacked", CIFAR, CIFAR_LABELS)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(path.parent / "unpacked", "cifar-10-batches-py")
    return path


def test_unpacked_batches_of_cifar10_are_found_at_the_root_and_under_it_with_both_names_of_their_classes(tmp_path):
    WRITE["CIFAR10"](tmp_path / "data" / "cifar-10-batches-py")
    for root in ("data", "data/cifar-10-batches-py"):
        found = load(tmp_path, "CIFAR10", root, num_classes=10)
        np.testing.assert_array_equal(found.images, CIFAR)
        np.testing.assert_array_equal(found.labels, CIFAR_LABELS)
        assert found.class_names[3] == "cat" and len(found.class_names) == 10
    for name, label in (("plane", 0), ("car", 1), ("cat", 3)):  # the released names of the first two
        assert load(tmp_path, "CIFAR10", train_subset=name).labels.tolist() == [label] * 2


def test_the_archive_of_cifar10_is_unpacked(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    archive = write_archive(tmp_path / "data" / "cifar-10-python.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    np.testing.assert_array_equal(load(tmp_path, "CIFAR10").images, CIFAR)
    assert len(list((tmp_path / "data/cifar-10-batches-py").iterdir())) == 5


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The archive behind CIFAR-10's URL, served by a local web server."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            """Say nothing."""

    (tmp_path / "web").mkdir()
    archive = write_archive(tmp_path / "web" / "cifar-10-python.tar.gz")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=archive.parent))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    yield archive
    server.shutdown()
    server.server_close()


def test_cifar10_is_downloaded_when_absent(tmp_path, monkeypatch, served):
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(served.read_bytes()).hexdigest())
    np.testing.assert_array_equal(load(tmp_path, "CIFAR10", "new").images, CIFAR)
    assert (tmp_path / "new" / "cifar-10-python.tar.gz").is_file()
    assert sorted(os.listdir(tmp_path / "new")) == [".download.lock", "cifar-10-batches-py", "cifar-10-python.tar.gz"]


def test_a_download_with_the_wrong_digest_is_not_kept(tmp_path, served):
    with pytest.raises(UserError, match="could not be downloaded"):
        load(tmp_path, "CIFAR10", "new")
    assert not (tmp_path / "new/cifar-10-batches-py").exists()


def test_without_network_the_sentence_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(UserError, match="put cifar-10-python.tar.gz or cifar-10-batches-py/ into .*none, or set"):
        load(tmp_path, "CIFAR10", "none")


# MNIST


@pytest.mark.parametrize("inner", ["", "raw", "FashionMNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_gzipped_and_plain_files_are_found_where_torchvision_and_people_put_them(tmp_path, packed, inner):
    files.write_mnist(tmp_path / "data" / inner, DIGITS, DIGIT_LABELS, packed)
    found = load(tmp_path, "FashionMNIST", num_classes=10)
    np.testing.assert_array_equal(found.images, DIGITS)
    np.testing.assert_array_equal(found.labels, DIGIT_LABELS)
    assert found.class_names[9] == "Ankle boot"
    for path in (tmp_path / "data" / inner).glob("*-images-*"):  # a name with a dot, as some have it
        path.rename(path.with_name(path.name.replace("-idx3", ".idx3")))
    np.testing.assert_array_equal(load(tmp_path, "FashionMNIST").images, DIGITS)


def test_mnist_fits_a_colour_network_of_another_size_and_says_so(tmp_path):
    files.write_mnist(tmp_path / "data", np.full((3, 1, 28, 28), 50, np.uint8), DIGIT_LABELS[:3], packed=True)
    found = load(tmp_path, "MNIST", size=32, channels=3)
    assert found.images.shape == (3, 3, 32, 32) and (found.images == 50).all()
    assert found.notes == {"resampled to 32×32 with the lanczos filter": 3, "grey, repeated into three channels": 3}


# ImageNet64


def write_release(folder, npz=False):
    """Write the images as three batches, in the release's form: rows of 3·64·64, labels from 1."""
    folder.mkdir(parents=True)
    for number, rows in enumerate(np.array_split(np.arange(len(IMAGENET)), 3), 1):
        batch = {"data": IMAGENET[rows].reshape(len(rows), -1), "labels": IMAGENET_LABELS[rows].tolist(),
                 "mean": np.zeros(12288)}
        path = folder / f"train_data_batch_{number}"
        if npz:
            np.savez(path.with_suffix(".npz"), **batch)
        else:
            path.write_bytes(pickle.dumps(batch))


@pytest.mark.parametrize("npz", [True, False])
def test_the_downsampled_release_is_read_pickled_and_as_npz(tmp_path, npz):
    write_release(tmp_path / "data", npz)
    found = load(tmp_path, "ImageNet64")
    np.testing.assert_array_equal(found.images, IMAGENET)
    np.testing.assert_array_equal(found.labels, IMAGENET_LABELS - 1)
    assert len(found.class_names) == 1000


def test_the_release_is_found_in_the_folders_that_its_archives_make(tmp_path):
    write_release(tmp_path / "data" / "Imagenet64_train_part1")
    os.makedirs(tmp_path / "data" / "Imagenet64_train_part2")
    os.rename(tmp_path / "data" / "Imagenet64_train_part1" / "train_data_batch_3",
              tmp_path / "data" / "Imagenet64_train_part2" / "train_data_batch_3")
    np.testing.assert_array_equal(load(tmp_path, "ImageNet64").images, IMAGENET)


def test_the_release_can_be_halved_by_areas(tmp_path):
    write_release(tmp_path / "data")
    found = load(tmp_path, "ImageNet64", size=32).images
    means = IMAGENET.reshape(12, 3, 32, 2, 32, 2).mean((3, 5))
    assert np.abs(found - means).max() <= 1


def test_an_edm_zip_has_its_classes_in_dataset_json(tmp_path):
    names = [f"00000/img{number:08}.png" for number in range(4)]
    images = {name: files.png(image) for name, image in zip(names, IMAGENET[:4], strict=True)}
    labels = dict(zip(names, [999, 0, 5, 5], strict=True))
    files.write_zip(tmp_path / "imagenet-64x64.zip", images | {"dataset.json": files.label_file(labels)})
    found = load(tmp_path, "ImageNet64", "imagenet-64x64.zip")
    np.testing.assert_array_equal(found.images, IMAGENET[:4])
    assert found.labels.tolist() == [999, 0, 5, 5]


@pytest.mark.parametrize("inner", ["", "train/"])
def test_a_tree_of_jpegs_is_cropped_and_averaged_with_classes_by_folder(tmp_path, inner):
    photo = Image.new("RGB", (300, 128), (0, 0, 0))
    photo.paste((200, 100, 50), (86, 0, 214, 128))  # the central square
    jpeg = files.encode(photo, "JPEG", quality=95)
    names = ("n01440764/a.JPEG", "n01443537/b.JPEG", "n01443537/c.JPEG")
    files.write_folder(tmp_path / "data", {inner + name: jpeg for name in names})
    found = load(tmp_path, "ImageNet64")
    assert found.labels.tolist() == [0, 1, 1] and found.class_names == ("n01440764", "n01443537")
    centre = found.images[0][:, 2:-2, 2:-2].astype(int)
    assert np.abs(centre - np.array([200, 100, 50])[:, None, None]).max() <= 5
    assert found.notes == {"cropped to the central square": 3, "resampled to 64×64 with the area filter": 3}


# Files that are missing, damaged or hold something else


def batch(labels, width=3072, dtype=np.uint8):
    """Return a pickled batch of two black images."""
    return pickle.dumps({"data": np.zeros((2, width), dtype), "labels": labels})


def npz(**arrays):
    np.savez(written := io.BytesIO(), **arrays)
    return written.getvalue()


WRITE = {"CIFAR10": lambda folder: files.write_cifar(folder, CIFAR, CIFAR_LABELS), "ImageNet64": write_release,
         "MNIST": lambda folder: files.write_mnist(folder, DIGITS, DIGIT_LABELS, packed=False),
         "ImageNet64 npz": functools.partial(write_release, npz=True)}
NO_BATCH, FIRST = "data_batch_2 is not a batch of images", "train_data_batch_1"


@pytest.mark.parametrize(("dataset", "name", "content", "message"), [
    ("CIFAR10", "data_batch_4", None, "data_batch_4 is not a readable .*No such file"),
    ("CIFAR10", "data_batch_2", pickle.dumps([1, 2]), NO_BATCH),
    ("CIFAR10", "data_batch_2", pickle.dumps({"data": 3, "labels": []}), NO_BATCH),
    ("CIFAR10", "data_batch_2", batch([1]), NO_BATCH),
    ("CIFAR10", "data_batch_2", batch([1, 1], dtype=np.float32), NO_BATCH),
    ("CIFAR10", "data_batch_2", batch([1, 10]), "data_batch_2.* the first wrong one 10; .* from 0 to 9"),
    ("CIFAR10", "data_batch_2", batch(["a", "b"]), "data_batch_2.* the first wrong one a"),
    ("MNIST", LABEL_FILE, None, f"lacks {LABEL_FILE}: put"),
    ("MNIST", IMAGE_FILE, b"", "not an IDX file"),
    ("MNIST", IMAGE_FILE, files.idx_bytes(DIGIT_LABELS.astype(np.uint8)), "not an IDX file"),
    ("MNIST", IMAGE_FILE, files.idx_bytes(DIGITS[:, 0])[:-1], "should hold 9408 values and holds 9407"),
    ("MNIST", IMAGE_FILE, gzip.compress(files.idx_bytes(DIGITS[:, 0]), mtime=0)[:-20], "damaged gzip"),
    ("MNIST", LABEL_FILE, files.idx_bytes(DIGIT_LABELS[:5].astype(np.uint8)), "12 images, .* 5 labels"),
    ("MNIST", LABEL_FILE, files.idx_bytes((DIGIT_LABELS + 1).astype(np.uint8)), "the first wrong one 10; .* 0 to 9"),
    ("ImageNet64", "train_data_batch_2", None, "lacks train_data_batch_2"),
    ("ImageNet64", FIRST, b"oops", f"{FIRST} is not a"),
    ("ImageNet64", FIRST, batch([1, 2]), f"{FIRST} is not a"),
    ("ImageNet64", FIRST, batch([0, 5], 12288), f"{FIRST}.* the first wrong one 0; .* from 1 to 1000"),
    ("ImageNet64 npz", f"{FIRST}.npz", b"oops", f"{FIRST}.npz is not a"),
    ("ImageNet64 npz", f"{FIRST}.npz", batch([1, 2]), f"{FIRST}.npz is not a"),
    ("ImageNet64 npz", f"{FIRST}.npz", npz(data=np.zeros((2, 12288), np.uint8), labels=[5, 1001]),
     f"{FIRST}.* the first wrong one 1001; .* from 1 to 1000"),
    ("ImageNet64 npz", f"{FIRST}.npz", npz(data=np.array([object()], dtype=object), labels=[1]), "not a readable npz"),
])
def test_a_missing_damaged_or_foreign_file_is_one_sentence(tmp_path, dataset, name, content, message):
    WRITE[dataset](tmp_path / "data")
    path = tmp_path / "data" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(tmp_path, dataset.split()[0])


# Pickles: no code that a batch may hold is run


@pytest.fixture(scope="module")
def load_pickle(tmp_path_factory):
    """Read bytes as the file of a batch."""
    path = tmp_path_factory.mktemp("pickles") / "batch_1"

    def write_and_load(data):
        path.write_bytes(data)
        return load_arrays(path)

    return write_and_load


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_containers_come_through_every_protocol(load_pickle, protocol):
    content = {"data": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": [1, 2, 3], "mean": np.float64(0.5),
               "name": "training batch", "pair": (None, True, b"\xff\0")}
    found = load_pickle(pickle.dumps(content, protocol))
    np.testing.assert_array_equal(found.pop("data"), content.pop("data"))
    assert found == content


def test_a_batch_that_python_2_pickled_has_text_keys(load_pickle):
    """Protocol 2 of Python 2: byte strings for texts and for the array's memory, numpy's old module names."""
    data = (b"\x80\x02}(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            b"(K\x01K\x02K\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
            b"K\x00tb\x89U\x06\x01\x02\x03\x04\x05\xfftbU\x06labels](K\x07K\x08eu.")
    found = load_pickle(data)
    assert found["labels"] == [7, 8] and found["data"].tolist() == [[1, 2, 3], [4, 5, 255]]


class Attack:
    """Calls a function when a plain unpickler reads it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, print, getattr, np.load, np.frombuffer])
def test_no_function_is_called(load_pickle, tmp_path, function):
    mark = tmp_path / "was here"
    for protocol in (0, 2, 4):
        data = pickle.dumps({"data": Attack(function, f"touch '{mark}'")}, protocol)
        with pytest.raises(UserError, match="batch_1 is not a readable npz or pickle of arrays .it names"):
            load_pickle(data)
    assert not mark.exists()
    with pytest.raises(UserError, match="rot13"):  # another codec of byte strings than latin1
        load_pickle(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.")


@pytest.mark.parametrize("data", [b")r\x81\x00\x86\x30.", b"\x80\x05\x96\x00\x00\x00\x00\x01\x00\x00\x00."])
def test_a_few_bytes_take_no_gigabytes(load_pickle, data):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(UserError):
        load_pickle(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**20  # KiB


@given(st.binary(max_size=60), st.integers(0, 200))
def test_damaged_pickles_end_in_one_sentence(load_pickle, noise, cut):
    good = pickle.dumps({"data": np.zeros((2, 3), np.uint8), "labels": [0, 1]}, 2)
    for data in (noise, good[:cut] + noise):
        try:
            load_pickle(data)
        except UserError as error:
            assert "batch_1" in str(error)


# Files damaged at random are read as something, or refused in one sentence; never a traceback

IMAGE_FILES = {f"{k}/{n}.png": files.png(files.random_images(1, 3, 8, n)[0]) for k in "ab" for n in range(3)}
LABEL_FILES = {"dataset.json": files.label_file({name: 0 for name in IMAGE_FILES})}
DAMAGES = int(os.environ.get("DAMAGES", "12"))  # of each kind; more for a long form of the test


def make_image(root, draw):
    kind = draw.choice(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
    image = Image.fromarray(files.random_images(1, 3, 8)[0].transpose(1, 2, 0)).convert(draw.choice(["RGB", "L"]))
    files.write_folder(root, {f"a.{kind.lower()}": files.encode(image, kind)})


def make_npz_batch(root, draw):
    root.mkdir()
    np.savez_compressed(root / "train_data_batch_1.npz", data=IMAGENET[:2].reshape(2, -1), labels=[1, 2])


def make_array(root, draw):
    images = files.random_images(5, 3, 8).astype(draw.choice(["u1", "<f4", ">f4", "f8", "f2", "g"]))
    draw.choice([np.save, np.savez, np.savez_compressed])(root, images)


KINDS = {  # how the files are made, the data set, and the size of its images
    "image": (make_image, "custom", 8),
    "folder": (lambda root, draw: files.write_folder(root, IMAGE_FILES | LABEL_FILES), "custom", 8),
    "zip": (lambda root, draw: files.write_zip(root.with_suffix(".zip"), IMAGE_FILES | LABEL_FILES), "custom", 8),
    "idx": (lambda root, draw: files.write_mnist(root, DIGITS, DIGIT_LABELS, draw.random() < 0.5), "MNIST", 28),
    "pickle": (lambda root, draw: WRITE["CIFAR10"](root), "CIFAR10", 32),
    "npz batch": (make_npz_batch, "ImageNet64", 64),
    "array": (make_array, "custom", 8),
    "cache": (lambda root, draw: files.write_folder(root, IMAGE_FILES), "custom", 8),
}


def damage(path, draw):
    """Cut a file, or change some of its bytes."""
    data = bytearray(path.read_bytes())
    if draw.random() < 0.3:
        del data[draw.randrange(len(data)):]
    for _ in range(draw.choice([1, 2, 30]) if data else 0):
        data[draw.randrange(len(data))] = draw.choice([0, 255, draw.randrange(256)])
    path.write_bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused_in_one_sentence(tmp_path, kind):
    make, dataset, size = KINDS[kind]
    refused = 0
    for number in range(DAMAGES):
        draw, folder = random.Random(f"{kind} {number}"), tmp_path / str(number)
        folder.mkdir()
        make(folder / "files", draw)
        root = next(folder.iterdir())
        config = files.make_config(folder, dataset, root, size, channels=1 if dataset == "MNIST" else 3)
        if kind == "cache":
            load_images(config)
        written = [path for path in (folder / "cache" if kind == "cache" else folder).rglob("*") if path.is_file()]
        damage(draw.choice([path for path in written if path.stat().st_size]), draw)
        try:
            if kind != "array":
                load_images(config)
            if dataset == "custom":
                source = open_images(root, config)
                source.read(range(len(source)))
        except UserError:
            refused += 1
    assert refused or kind == "cache"  # of which what is damaged is made again
