"""The images of a study: one part to train on, another held out, and a classifier in whose features samples are
measured."""

import dataclasses
import io
import pathlib
import warnings
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.neural_network import MLPClassifier
from torch import nn

from configs.default import get_default_config
from datasets import load_images, pixels_to_float
from metrics.scores import frechet_distance, nearest_distances, precision_recall
from runtime.errors import UserError
from runtime.files import atomic_path
from runtime.progress import progress_bar

HIDDEN = (128, 64)  # of the perceptron; its features are the last
CLASSIFIERS = pathlib.Path(__file__).parent / "classifiers"
FASHION_ROOTS = ("/usr/share/datasets/fashion-mnist", "data/FashionMNIST")
DATE = (2000, 1, 1, 0, 0, 0)  # of files in the archives, so that the same images make the same bytes


@dataclasses.dataclass(frozen=True)
class Split:
    """Images uint8 (N, C, H, W) and labels (N,) to train on, and as many held out as are measured."""

    train: np.ndarray
    train_labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray


def find_fashion():
    """Return the folder of Fashion-MNIST's IDX files, or None."""
    return next((root for root in FASHION_ROOTS if list(pathlib.Path(root).glob("**/train-images*"))), None)


def load(images, dataset, root=""):
    """Return the images and labels of a data set at the size of an `Images`."""
    config = get_default_config()
    config.data.dataset, config.data.data_root = dataset, str(root)
    config.data.image_size, config.data.num_channels, config.training.progress = images.size, images.channels, "auto"
    found = load_images(config)
    return found.images, found.labels


def split(images, cifar_root="data/cifar10-jpeg"):
    """Return the `Split` of an `Images`: CIFAR-10's own; elsewhere even places train and odd places are held out.

    Raises UserError when Fashion-MNIST's or CIFAR-10's files are absent.
    """
    if images.name == "cifar":
        archives = [pathlib.Path(cifar_root, f"cifar10-jpeg-{part}.zip") for part in ("train", "test")]
        for path in archives:
            if not path.is_file():
                raise UserError(f"no {path}: name the folder of CIFAR-10's images (zips of class folders, "
                                f"{archives[0].name} and {archives[1].name}) with --cifar_root")
        (train, train_labels), (test, test_labels) = (load(images, "custom", path) for path in archives)
        places = np.arange(images.measured) * len(test) // images.measured
        return Split(train, train_labels, test[places], test_labels[places])
    if images.name == "fashion" and find_fashion() is None:
        raise UserError(f"no Fashion-MNIST in {' or '.join(FASHION_ROOTS)}: put its IDX files there")
    dataset, root = ("FashionMNIST", find_fashion()) if images.name == "fashion" else ("digits", "")
    found, labels = load(images, dataset, root)
    held_out = slice(1, 2 * images.measured, 2)
    return Split(found[::2], labels[::2], found[held_out], labels[held_out])


def write_archives(folder, found):
    """Write train.zip and held_out.zip of PNGs, which the scripts read as custom images, unless they are there."""
    for name, images in (("train", found.train), ("held_out", found.held_out)):
        path = pathlib.Path(folder, f"{name}.zip")
        if path.exists():
            continue
        with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for number, image in enumerate(images):
                png = io.BytesIO()
                Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(png, "PNG")
                archive.writestr(zipfile.ZipInfo(f"{number:05d}.png", DATE), png.getvalue())


class Perceptron:
    """scikit-learn's multilayer perceptron as arrays: `features` (N, 64), `probabilities` (N, classes)."""

    def __init__(self, arrays):
        self.weights, self.biases = ([arrays[f"{kind}{i}"] for i in range(len(HIDDEN) + 1)]
                                     for kind in ("weight", "bias"))
        self.accuracy = float(arrays["accuracy"])

    def features(self, images):
        """Return the last hidden layer, float64, of uint8 images (N, 1, H, W)."""
        values = images.reshape(len(images), -1).astype(np.float64) / 255
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            values = np.maximum(values @ weight + bias, 0)
        return values

    def probabilities(self, features):
        """Return the class probabilities of features."""
        return torch.from_numpy(features @ self.weights[-1] + self.biases[-1]).softmax(1).numpy()


def train_perceptron(found):
    """Return the arrays of a perceptron trained on the training part; early stopping decides, not convergence."""
    pixels = found.train.reshape(len(found.train), -1) / 255
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = MLPClassifier(HIDDEN, early_stopping=True, random_state=0, max_iter=300).fit(
            pixels, found.train_labels)
    held_out = found.held_out.reshape(len(found.held_out), -1) / 255
    arrays = {f"weight{i}": w.astype(np.float32) for i, w in enumerate(fitted.coefs_)}
    arrays |= {f"bias{i}": b.astype(np.float32) for i, b in enumerate(fitted.intercepts_)}
    return arrays | {"accuracy": np.array(fitted.score(held_out, found.held_out_labels))}


class Residual(nn.Module):
    """x + two convolutions with batch norm, at half the resolution and twice the width where `stride` is 2."""

    def __init__(self, width, out, stride):
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, out, 3, stride, 1, bias=False),
                                  nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, out, 3, 1, 1, bias=False))
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x):
        return self.shortcut(x) + self.body(x)


class ConvolutionalClassifier(nn.Module):
    """A small residual network of three stages; its features are the 4·width channel means before the last layer."""

    def __init__(self, images, classes):
        super().__init__()
        width, blocks = images.classifier, [nn.Conv2d(images.channels, images.classifier, 3, 1, 1, bias=False)]
        for out, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            blocks += [Residual(width, out, stride), Residual(out, out, 1)]
            width = out
        self.body = nn.Sequential(*blocks, nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, classes)
        self.register_buffer("accuracy", torch.zeros(()))

    def forward(self, x):
        return self.head(self.body(x))

    @torch.no_grad()
    def features(self, images):
        """Return the features, float64 (N, 4·width), of uint8 images (N, C, H, W)."""
        device = self.head.weight.device
        parts = [self.body(pixels_to_float(torch.from_numpy(part).to(device)))
                 for part in np.array_split(images, -(-len(images) // 500))]
        return torch.cat(parts).double().cpu().numpy()

    @torch.no_grad()
    def probabilities(self, features):
        """Return the class probabilities of features."""
        return self.head(torch.from_numpy(features).to(self.head.weight)).softmax(1).double().cpu().numpy()


def train_convolutional(images, found, device):
    """Return a `ConvolutionalClassifier` trained on the training part, mirrored and shifted at random."""
    torch.manual_seed(0)
    batch = min(128, len(found.train) // 4)
    net = ConvolutionalClassifier(images, int(found.train_labels.max()) + 1)
    net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = images.epochs * (len(found.train) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps)
    random, shift = np.random.default_rng(0), images.size // 8
    with progress_bar(total=steps, desc="classifier", unit="updates") as bar:
        for order in (random.permutation(len(found.train)) for _ in range(images.epochs)):
            for places in np.split(order[: len(order) // batch * batch], len(order) // batch):
                x = pixels_to_float(torch.from_numpy(found.train[np.sort(places)]).to(device))
                y = torch.from_numpy(found.train_labels[np.sort(places)]).to(device)
                down, right = random.integers(0, 2 * shift + 1, 2)
                x = F.pad(x, [shift] * 4, mode="reflect")[..., down : down + images.size, right : right + images.size]
                x = x.flip(3) if random.integers(2) else x
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    loss = F.cross_entropy(net(x.contiguous(memory_format=torch.channels_last)), y, label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update(1)
    net.eval()
    correct = net.probabilities(net.features(found.held_out)).argmax(1) == found.held_out_labels
    net.accuracy.fill_(correct.mean())
    return net


def load_classifier(images, found, folder):
    """Return the classifier of an `Images`, trained once: figures in the features of two cannot be compared.

    Those of the grey sets are kept in the repository, those of the others in `folder`.
    """
    if not images.classifier:
        path = CLASSIFIERS / f"{images.name}.npz"
        if not path.exists():
            with atomic_path(path) as temporary:
                np.savez_compressed(temporary, **train_perceptron(found))
        with np.load(path) as arrays:
            return Perceptron(arrays)
    path = pathlib.Path(folder, f"classifier_{images.classifier}_{images.size}_{images.epochs}.pth")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not path.exists():
        net = train_convolutional(images, found, device)
        with atomic_path(path) as temporary:
            torch.save(net.state_dict(), temporary)
    net = ConvolutionalClassifier(images, int(found.train_labels.max()) + 1)
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.to(device).eval()


class Reference:
    """The held-out images of an `Images`, with which samples are compared, and the classifier that does it."""

    def __init__(self, images, folder, cifar_root):
        self.images, self.split = images, split(images, cifar_root)
        self.classifier = load_classifier(images, self.split, folder)
        self.features = self.classifier.features(self.split.held_out)

    def measure(self, samples):
        """Return the figures of uint8 samples (N, C, H, W), N a multiple of the number of images held out.

        Distances are means over groups as large as the held-out set, since a Fréchet distance falls with the number
        of samples. `nearest` is the median distance in [-1, 1] to the nearest training image, `recognised` the share
        of samples of which the classifier is at least 80 % sure.
        """
        found = [self._measure(group) for group in samples.reshape(-1, *self.split.held_out.shape)]
        figures = {name: float(np.mean([group[name] for group in found])) for name in found[0]}
        return figures | {"nearest": nearest_distances(torch.from_numpy(samples), self.split.train).median().item()}

    def _measure(self, group):
        features = self.classifier.features(group)
        precision, recall = precision_recall(torch.from_numpy(features), torch.from_numpy(self.features))
        return {"feature_distance": frechet_distance(*gaussian(features), *gaussian(self.features)),
                "pixel_distance": frechet_distance(*gaussian(pixels(group)), *gaussian(pixels(self.split.held_out))),
                "precision": precision, "recall": recall,
                "recognised": float((self.classifier.probabilities(features).max(1) >= 0.8).mean())}

    def real(self):
        """Return the figures of as many training images, each once: no model should be expected below them."""
        places = np.random.default_rng(0).permutation(len(self.split.train))[: self.images.measured]
        nearest = nearest_distances(torch.from_numpy(np.array(self.split.held_out)), self.split.train).median().item()
        return self.measure(np.array(self.split.train[np.sort(places)])) | {"nearest": nearest}


def pixels(images):
    """Return the pixels as rows of numbers in [-1, 1], float64."""
    return pixels_to_float(torch.from_numpy(images.reshape(len(images), -1)), torch.float64).numpy()


def gaussian(rows):
    """Return mean and covariance of rows of features (N, D)."""
    return rows.mean(0), np.cov(rows, rowvar=False)
