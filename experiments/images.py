"""The images of a study, for training and held out, and the classifier in whose features samples are measured."""

import io
import pathlib
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from configs.default import get_default_config
from datasets import load_images, pixels_to_float
from metrics.scores import frechet_distance, nearest_distances, neighbour_radii, precision_recall
from runtime.files import atomic_path
from runtime.terminal import progress_bar

DATE = (2000, 1, 1, 0, 0, 0)  # of files in archives, so that equal images give equal bytes


def split(images, cifar_root):
    """Return (images uint8 (N, C, H, W), labels (N,)) for training, and the same of images.measured held-out images."""
    def load(dataset, root=""):
        config = get_default_config()
        config.data.dataset, config.data.data_root = dataset, root
        config.data.image_size, config.data.num_channels = images.size, images.channels
        found = load_images(config)
        return found.images, found.labels

    if images.name == "cifar":
        train, (test, labels) = (load("custom", f"{cifar_root}/cifar10-jpeg-{part}.zip") for part in ("train", "test"))
        places = np.arange(images.measured) * len(test) // images.measured
        return train, (test[places], labels[places])
    found, labels = load("FashionMNIST" if images.name == "fashion" else "digits")
    held_out = slice(1, 2 * images.measured, 2)  # odd indices; CIFAR-10 has its own split
    return (found[::2], labels[::2]), (found[held_out], labels[held_out])


def write_archive(path, images):
    """Write a zip of PNGs, which the scripts read as custom images, unless it exists."""
    if not path.exists():
        with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for number, image in enumerate(images):
                png = io.BytesIO()
                Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(png, "PNG")
                archive.writestr(zipfile.ZipInfo(f"{number:05d}.png", DATE), png.getvalue())


class Perceptron:
    """The classifier of a grey set, in classifiers/ (distances in features of different ones are not comparable).

    scikit-learn's MLPClassifier((128, 64), early_stopping=True, random_state=0, max_iter=300) of pixels / 255.
    """

    def __init__(self, path):
        with np.load(path) as arrays:
            self.layers = [(arrays[f"weight{i}"], arrays[f"bias{i}"]) for i in range(3)]

    def features(self, images):
        """Return the last hidden layer, float64 (N, 64), of uint8 images (N, 1, H, W)."""
        values = images.reshape(len(images), -1).astype(np.float64) / 255
        for weight, bias in self.layers[:-1]:
            values = np.maximum(values @ weight + bias, 0)
        return values

    def probabilities(self, features):
        """Return the class probabilities (N, classes) of features."""
        weight, bias = self.layers[-1]
        return torch.from_numpy(features @ weight + bias).softmax(1).numpy()


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
        self.register_buffer("accuracy", torch.zeros(()))  # on the held-out images

    @torch.no_grad()
    def features(self, images):
        """Return the features, float64 (N, 4·width), of uint8 images (N, C, H, W)."""
        parts = [self.body(pixels_to_float(part.to(self.head.weight.device)))
                 for part in torch.from_numpy(images).split(500)]
        return torch.cat(parts).double().cpu().numpy()

    @torch.no_grad()
    def probabilities(self, features):
        """Return the class probabilities (N, classes), float64, of features."""
        return self.head(torch.from_numpy(features).to(self.head.weight)).softmax(1).double().cpu().numpy()

    def fit(self, images, labels, epochs):
        """Train on uint8 images (N, C, H, W) and labels (N,), with random flips and shifts."""
        self.to(memory_format=torch.channels_last)
        batch, device = min(128, len(images) // 4), self.head.weight.device
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        steps, size = len(images) // batch, images.shape[-1]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=epochs * steps)
        random, shift = np.random.default_rng(0), size // 8
        for number in progress_bar(range(epochs * steps), desc="classifier", unit="updates"):
            if number % steps == 0:
                order = random.permutation(len(images))[: steps * batch].reshape(steps, batch)
            places = np.sort(order[number % steps])
            x = pixels_to_float(torch.from_numpy(images[places]).to(device))
            down, right = random.integers(0, 2 * shift + 1, 2)
            x = F.pad(x, [shift] * 4, mode="reflect")[..., down : down + size, right : right + size]
            x = x.flip(3) if random.integers(2) else x
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = self.head(self.body(x.contiguous(memory_format=torch.channels_last)))
                loss = F.cross_entropy(logits, torch.from_numpy(labels[places]).to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self.to(memory_format=torch.contiguous_format)


class Reference:
    """The held-out images of an `Images`, and the classifier in whose features samples are compared with them."""

    def __init__(self, images, folder, cifar_root):
        """Write train.zip and held_out.zip, which the scripts read, into `folder`, unless they exist."""
        (self.train, train_labels), (self.held_out, labels) = split(images, cifar_root)
        for name in ("train", "held_out"):
            write_archive(folder / f"{name}.zip", getattr(self, name))
        if not images.classifier:
            self.classifier = Perceptron(pathlib.Path(__file__).parent / "classifiers" / f"{images.name}.npz")
        else:
            path = folder / f"classifier_{images.classifier}_{images.size}_{images.epochs}.pth"
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            torch.manual_seed(0)
            self.classifier = net = ConvolutionalClassifier(images, int(train_labels.max()) + 1).to(device)
            if path.exists():
                net.load_state_dict(torch.load(path, map_location=device, weights_only=True))
                net.eval()
            else:
                net.fit(self.train, train_labels, images.epochs)
                found = net.eval().probabilities(net.features(self.held_out)).argmax(1)
                net.accuracy.fill_((found == labels).mean())
                with atomic_path(path) as temporary:
                    torch.save(net.state_dict(), temporary)
        self.features = self.classifier.features(self.held_out)

    def measure(self, samples):
        """Return the metrics of uint8 samples (N, C, H, W), N a multiple of the number of held-out images.

        They are means over groups as large as the held-out set, since distances depend on the number of samples.
        nearest: median distance to the nearest training image. recognised: share with a class probability of 0.8.
        """
        found = []
        for group in samples.reshape(-1, *self.held_out.shape):
            features = self.classifier.features(group)
            real = torch.from_numpy(self.features)
            precision, recall = precision_recall(torch.from_numpy(features), real, neighbour_radii(real))
            found.append({"feature_distance": distance(features, self.features),
                          "pixel_distance": distance(pixels(group), pixels(self.held_out)),
                          "precision": precision, "recall": recall,
                          "recognised": float((self.classifier.probabilities(features).max(1) >= 0.8).mean())})
        figures = {name: float(np.mean([group[name] for group in found])) for name in found[0]}
        return figures | {"nearest": nearest_distances(torch.from_numpy(samples), self.train).median().item()}

    def real(self):
        """Return the metrics of as many training images, the best that a model can be expected to reach."""
        places = np.random.default_rng(0).permutation(len(self.train))[: len(self.held_out)]
        nearest = nearest_distances(torch.from_numpy(self.held_out), self.train).median().item()
        return self.measure(self.train[np.sort(places)]) | {"nearest": nearest}


def pixels(images):
    """Return uint8 images (N, C, H, W) as rows of pixels (N, C·H·W) in [-1, 1], float64."""
    return pixels_to_float(torch.from_numpy(images).flatten(1), torch.float64).numpy()


def distance(a, b):
    """Return the Fréchet distance of two arrays of features (N, D)."""
    return frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
