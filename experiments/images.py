"""The images of a study: one half to train on, images held out, and the classifier whose features are measured in."""

import dataclasses
import io
import pathlib
import zipfile

import numpy as np
from PIL import Image
from sklearn.neural_network import MLPClassifier

from configs.rectified_flow.digits_rf_gaussian import get_config
from datasets import load_images
from runtime.errors import UserError
from runtime.files import atomic_path

HIDDEN = (128, 64)  # of the classifier; its features are the last
CLASSIFIERS = pathlib.Path(__file__).parent / "classifiers"
FASHION_ROOTS = ("/usr/share/datasets/fashion-mnist", "data/FashionMNIST")
DATE = (2000, 1, 1, 0, 0, 0)  # of files in the archives, so that the same images make the same bytes


def find_fashion():
    """Return the folder of Fashion-MNIST's IDX files, or None."""
    return next((root for root in FASHION_ROOTS if list(pathlib.Path(root).glob("**/train-images*"))), None)


@dataclasses.dataclass(frozen=True)
class Halves:
    """Images uint8 (N, 1, H, W) and labels (N,) of the training half and of as many held out as are measured."""

    train: np.ndarray
    train_labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray


def split(images):
    """Return the `Halves` of an `Images`: even places train, odd places are held out.

    Raises UserError when Fashion-MNIST's files are absent.
    """
    config = get_config()
    config.data.image_size, config.training.progress = images.size, "false"
    if images.name == "fashion":
        root = find_fashion()
        if root is None:
            raise UserError(f"no Fashion-MNIST in {' or '.join(FASHION_ROOTS)}: install Debian's "
                            "dataset-fashion-mnist, or put its IDX files there")
        config.data.dataset, config.data.data_root = "FashionMNIST", root
    found = load_images(config)
    held_out = slice(1, 2 * images.measured, 2)
    return Halves(found.images[::2], found.labels[::2], found.images[held_out], found.labels[held_out])


def write_archives(folder, halves):
    """Write train.zip and held_out.zip of PNGs, which the scripts read as custom images, unless they are there."""
    for name, images in (("train", halves.train), ("held_out", halves.held_out)):
        path = pathlib.Path(folder, f"{name}.zip")
        if path.exists():
            continue
        with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for number, image in enumerate(images):
                png = io.BytesIO()
                Image.fromarray(image[0]).save(png, "PNG")
                archive.writestr(zipfile.ZipInfo(f"{number:05d}.png", DATE), png.getvalue())


class Classifier:
    """A multilayer perceptron (scikit-learn's) as three arrays of weights and three of biases, and its accuracy."""

    def __init__(self, weights, biases, accuracy):
        self.weights, self.biases, self.accuracy = weights, biases, accuracy

    def features(self, images):
        """Return the last hidden layer, float64 (N, 64), of uint8 images (N, 1, H, W)."""
        values = images.reshape(len(images), -1).astype(np.float64) / 255
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            values = np.maximum(values @ weight + bias, 0)
        return values

    def classes(self, images):
        """Return the most likely class of each image, (N,)."""
        return (self.features(images) @ self.weights[-1] + self.biases[-1]).argmax(1)


def train_classifier(halves):
    """Return a `Classifier` trained on the training half; its accuracy is that on the images held out."""
    pixels = halves.train.reshape(len(halves.train), -1) / 255
    fitted = MLPClassifier(HIDDEN, early_stopping=True, random_state=0, max_iter=300).fit(pixels, halves.train_labels)
    classifier = Classifier([w.astype(np.float32) for w in fitted.coefs_],
                            [b.astype(np.float32) for b in fitted.intercepts_], 0.0)
    classifier.accuracy = float((classifier.classes(halves.held_out) == halves.held_out_labels).mean())
    return classifier


def load_classifier(images, halves, folder=CLASSIFIERS):
    """Return the `Classifier` of an `Images`: the one in the repository, or a new one, which is kept there.

    It is kept since figures in the features of two classifiers cannot be compared.
    """
    path = pathlib.Path(folder, f"{images.name}.npz")
    if path.exists():
        with np.load(path) as arrays:
            layers = range(len(HIDDEN) + 1)
            return Classifier([arrays[f"weight{i}"] for i in layers], [arrays[f"bias{i}"] for i in layers],
                              float(arrays["accuracy"]))
    classifier = train_classifier(halves)
    arrays = {f"weight{i}": w for i, w in enumerate(classifier.weights)}
    arrays |= {f"bias{i}": b for i, b in enumerate(classifier.biases)}
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, accuracy=classifier.accuracy, **arrays)
    return classifier
