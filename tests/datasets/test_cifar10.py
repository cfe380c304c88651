"""CIFAR-10 in the forms in which it is distributed."""

import functools
import hashlib
import http.server
import os
import pickle
import tarfile
import threading

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from datasets import load_images
from runtime.terminal import UserError
from tests.datasets.image_files import make_config, random_images, write_cifar

IMAGES, LABELS = random_images(20, 3, 32), np.arange(20) % 10


def load(tmp_path, root, **data):
    return load_images(make_config(tmp_path, "CIFAR10", root, 32, **data))


def write_archive(path):
    """Write the distributed archive of the images."""
    write_cifar(path.parent / "unpacked", IMAGES, LABELS)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(path.parent / "unpacked", "cifar-10-batches-py")
    return path


def test_unpacked_batches_are_found_at_the_root_and_under_it(tmp_path):
    write_cifar(tmp_path / "data" / "cifar-10-batches-py", IMAGES, LABELS)
    for root in (tmp_path / "data", tmp_path / "data" / "cifar-10-batches-py"):
        found = load(tmp_path, root, num_classes=10)
        np.testing.assert_array_equal(found.images, IMAGES)
        np.testing.assert_array_equal(found.labels, LABELS)
        assert found.class_names[3] == "cat" and len(found.class_names) == 10


def test_an_archive_that_is_there_is_unpacked(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    archive = write_archive(tmp_path / "data" / "cifar-10-python.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    np.testing.assert_array_equal(load(tmp_path, tmp_path / "data").images, IMAGES)
    assert len(list((tmp_path / "data/cifar-10-batches-py").iterdir())) == 5


def test_a_missing_batch_is_named(tmp_path):
    write_cifar(tmp_path / "data", IMAGES, LABELS, batches=3)
    with pytest.raises(UserError, match="data_batch_4 is no readable .*No such file"):
        load(tmp_path, tmp_path / "data")


@pytest.mark.parametrize(("content", "message"), [
    ([1, 2], "is no batch of images"), ({"data": 3, "labels": []}, "is no batch of images"),
    ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "is no batch of images"),
    ({"data": np.zeros((2, 3072), np.float32), "labels": [1, 1]}, "is no batch of images"),
    ({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 10]}, "the first wrong one 10; .* from 0 to 9"),
    ({"data": np.zeros((2, 3072), np.uint8), "labels": ["a", "b"]}, "the first wrong one a"),
])
def test_a_batch_with_other_content_is_named(tmp_path, content, message):
    write_cifar(tmp_path / "data", IMAGES, LABELS)
    (tmp_path / "data" / "data_batch_2").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=f"data_batch_2.*{message}"):
        load(tmp_path, tmp_path / "data")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The archive behind CIFAR-10's URL, served by a local web server."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words):
            """Say nothing."""

    (tmp_path / "web").mkdir()
    archive = write_archive(tmp_path / "web" / "cifar-10-python.tar.gz")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=archive.parent))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    yield archive
    server.shutdown()
    server.server_close()


def test_it_is_downloaded_when_absent(tmp_path, monkeypatch, served):
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(served.read_bytes()).hexdigest())
    np.testing.assert_array_equal(load(tmp_path, tmp_path / "new").images, IMAGES)
    assert (tmp_path / "new" / "cifar-10-python.tar.gz").is_file()
    assert sorted(os.listdir(tmp_path / "new")) == [".download.lock", "cifar-10-batches-py", "cifar-10-python.tar.gz"]


def test_a_download_with_the_wrong_digest_is_not_kept(tmp_path, served):
    with pytest.raises(UserError, match="could not be downloaded"):
        load(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new/cifar-10-batches-py").exists()


def test_without_network_the_sentence_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(UserError, match="put cifar-10-python.tar.gz or cifar-10-batches-py/ into .*none, or set"):
        load(tmp_path, tmp_path / "none")
