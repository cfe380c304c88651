"""Files damaged at random: read as something, or one sentence; never a traceback. DAMAGES=1000 tries more."""

import os
import random

import numpy as np
import pytest
from PIL import Image

from datasets import load_images
from metrics.statistics import open_images
from runtime.terminal import UserError
from tests.datasets import image_files as files
from tests.datasets.image_files import random_images

FILES = {f"{k}/{n}.png": files.png(random_images(1, 3, 8, n)[0]) for k in "ab" for n in range(3)}
LABELS = {"dataset.json": files.label_file({name: 0 for name in FILES})}
DAMAGES = int(os.environ.get("DAMAGES", "12"))  # of each kind


def make_image(root, draw):
    kind = draw.choice(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
    picture = Image.fromarray(random_images(1, 3, 8)[0].transpose(1, 2, 0)).convert(draw.choice(["RGB", "L"]))
    files.write_folder(root, {f"a.{kind.lower()}": files.encode(picture, kind)})


def make_npz_batch(root, draw):
    root.mkdir()
    np.savez_compressed(root / "train_data_batch_1.npz", data=random_images(2, 3, 64).reshape(2, -1), labels=[1, 2])


def make_array(root, draw):
    images = random_images(5, 3, 8).astype(draw.choice(["u1", "<f4", ">f4", "f8", "f2", "g"]))
    draw.choice([np.save, np.savez, np.savez_compressed])(root, images)


KINDS = {  # how the files are made, the data set, and the size of its images
    "image": (make_image, "custom", 8),
    "folder": (lambda root, draw: files.write_folder(root, FILES | LABELS), "custom", 8),
    "zip": (lambda root, draw: files.write_zip(root.with_suffix(".zip"), FILES | LABELS), "custom", 8),
    "idx": (lambda root, draw: files.write_mnist(root, random_images(9, 1, 28), np.arange(9), draw.random() < 0.5),
            "MNIST", 28),
    "pickle": (lambda root, draw: files.write_cifar(root, random_images(10, 3, 32), np.arange(10)), "CIFAR10", 32),
    "npz batch": (make_npz_batch, "ImageNet64", 64),
    "array": (make_array, "custom", 8),
    "cache": (lambda root, draw: files.write_folder(root, FILES), "custom", 8),
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
