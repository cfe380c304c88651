"""Starting points of pairs: what they may be is tested through generate_data.py; here, what they cost and remember."""

import os

import numpy as np
import torch

from datasets import ImageSet
from datasets.pair_starts import ImageStarts, NoiseStarts, images_digest


def resident_memory():
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as opened:
        return int(opened.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_images_that_were_read_do_not_stay_in_memory(tmp_path):
    np.save(tmp_path / "images.npy", np.ones((20_000, 3, 32, 32), np.uint8))
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    starts = ImageStarts(ImageSet(images, None, None, "ones"), seed=0, random_flip=False, repeats=True)
    starts.take(range(100))
    before = resident_memory()
    for first in range(0, 20_000, 100):
        assert torch.equal(starts.take(range(first, first + 100))[:, 0, 0, 0], torch.full((100,), 1 / 127.5 - 1))
    assert resident_memory() - before < 20e6, "61 MB of images were read"


def test_another_image_or_label_or_noise_has_another_digest():
    images, labels = np.zeros((10, 1, 2, 2), np.uint8), np.zeros(10, np.int64)
    digests = {images_digest(images, labels), images_digest(images, None), images_digest(images[:9], labels[:9])}
    images[3, 0, 1, 1] = 1
    digests.add(images_digest(images, labels))
    labels[5] = 1
    digests.add(images_digest(images, labels))
    assert len(digests) == 5
    noise = {str(NoiseStarts(seed, shape).identity()) for seed in (0, 1) for shape in ((1, 2, 2), (1, 2, 3))}
    assert len(noise) == 4
