"""Where pairs start: noise, images of a data set or rows of npy files, each a function of the pair's index alone."""

import dataclasses
import hashlib

import numpy as np
import torch

from datasets.batches import one_hot, pixels_to_float
from datasets.pairs import NoiseSource, as_float, open_rows
from datasets.sources import load_images
from runtime import seeds
from runtime.errors import UserError
from runtime.files import file_digest


class InitialPoints:
    """The initial points of pairs by number, in one of the directions of generate_data.py.

    z0(indices), z1(indices), label(indices): of the pairs `indices`, a range: float32 `(n, C, H, W)`, and one-hot
    float32 `(n, num_classes)` or None. available: the largest number of pairs, None for no limit. identity: {name:
    value} of what tells them from others. image_set: the images of the data set that the direction uses, or None.
    """

    def __init__(self, config, z0_path="", z1_path="", label_path=""):
        """Open what `config.sampling.direction` needs; UserError for files and classes that do not fit the config."""
        settings, shape = config.sampling, image_shape(config)
        self.direction, self.seed, self.num_classes = settings.direction, config.seed, config.data.num_classes
        self.class_label, self.random_flip = settings.class_label, settings.random_flip
        self._check_classes(z1_path, label_path)
        self.identity, self.available, self.noise, self.image_set = {}, None, None, None
        self.images = self._open(z1_path, "z1_path", shape) if z1_path else None
        self.label_rows = self._open_labels(label_path) if label_path else None
        if z0_path:
            self.noise = self._open(z0_path, "z0_path", shape)
        elif self.direction != "from_z1":
            scale = 1.0 if self.direction == "gt_v_from_z1" else settings.init_noise_scale
            self.noise = NoiseSource(self.seed, shape, scale)
            self.identity["noise"] = self.noise.digest()
        from_images = self.images is None and self.direction in ("from_z1", "gt_v_from_z1", "random_paired")
        if from_images or self.direction.startswith("gt_v"):
            self.image_set = chosen_images(config)
            self.identity |= {"images": images_digest(self.image_set)}
        if from_images:
            self.identity["sampling.random_flip"] = self.random_flip
        if from_images and self.noise is None:  # the second time round only flips make other pairs
            self._limit(len(self.image_set) * (2 if self.random_flip else 1))

    def z0(self, indices):
        """Return the noise of the pairs `indices`."""
        return as_float(self.noise[np.array(indices)])

    def z1(self, indices):
        """Return the images of the pairs `indices`: pair i starts at image i mod N, the next time round mirrored."""
        if self.images is not None:
            return as_float(self.images[np.array(indices)])
        rounds, numbers = np.divmod(np.array(indices), len(self.image_set))
        images = pixels_to_float(torch.from_numpy(self.image_set.images[numbers]))
        if not self.random_flip:
            return images
        draws = [seeds.index_generator(self.seed, int(k), seeds.FLIP).random() < 0.5 for k in numbers]
        mirrored = torch.from_numpy(np.array(draws) ^ (rounds % 2 == 1))
        return torch.where(mirrored[:, None, None, None], images.flip(-1), images)

    def label(self, indices):
        """Return the classes: of the file, the chosen one, of the images, or drawn; None without classes."""
        if not self.num_classes:
            return None
        if self.label_rows is not None:
            label = self.label_rows[np.array(indices)]
            if label.ndim == 2:
                return as_float(label)
            label = torch.from_numpy(label.astype(np.int64))
        elif self.class_label >= 0:
            label = torch.full((len(indices),), self.class_label)
        elif self.image_set is not None:
            label = torch.from_numpy(self.image_set.labels[np.array(indices) % len(self.image_set)])
        else:
            label = seeds.index_labels(self.seed, indices, self.num_classes)
        return one_hot(label, self.num_classes)

    def _check_classes(self, z1_path, label_path):
        if self.class_label >= self.num_classes and self.class_label >= 0:
            raise UserError(f"config.sampling.class_label is {self.class_label}, but config.data.num_classes is "
                            f"{self.num_classes}")
        if not self.num_classes or self.class_label >= 0:
            return
        if self.direction == "gt_v_from_z0":
            raise UserError("the closed-form velocity of all images knows no classes: choose one with "
                            "config.sampling.class_label, or set config.data.num_classes 0")
        if z1_path and not label_path:
            raise UserError("--z1_path holds images without their classes: give --label_path, or choose one class with "
                            "config.sampling.class_label")

    def _limit(self, count):
        self.available = count if self.available is None else min(count, self.available)

    def _open(self, path, flag, shape):
        """Return the rows of the npy file that `flag` names."""
        rows = open_rows(path)
        if rows.shape[1:] != shape or rows.dtype.kind != "f":
            raise UserError(f"{path} holds {rows.dtype} rows of shape {rows.shape[1:]}; the config asks for "
                            f"floating-point rows of shape {shape} (channels, height, width)")
        self.identity[flag] = file_digest(path)
        self._limit(len(rows))
        return rows

    def _open_labels(self, path):
        """Return the rows of the npy file of labels."""
        rows, advice = open_rows(path), f"but config.data.num_classes is {self.num_classes}"
        numbers = rows.ndim == 1 and rows.dtype.kind in "iu"
        if not numbers and rows.shape[1:] != (self.num_classes,):
            raise UserError(f"{path} holds {rows.dtype} labels of shape {rows.shape[1:]}, {advice}: class numbers (N,) "
                            "or one-hot rows (N, num_classes) are needed")
        if numbers and len(rows) and (rows.min() < 0 or rows.max() >= self.num_classes):
            raise UserError(f"{path} has classes {rows.min()} to {rows.max()}, {advice}")
        self.identity["label_path"] = file_digest(path)
        self._limit(len(rows))
        return rows


def image_shape(config):
    """Return the shape (C, H, W) of the config's images."""
    return config.data.num_channels, config.data.image_size, config.data.image_size


def chosen_images(config):
    """Return the `ImageSet` of the config, and only the class `sampling.class_label` if one is set."""
    image_set = load_images(config)
    if config.sampling.class_label < 0:
        return image_set
    chosen = np.flatnonzero(image_set.labels == config.sampling.class_label)
    if not len(chosen):
        raise UserError(f"config.sampling.class_label {config.sampling.class_label}: {image_set.source} has no image "
                        "of this class")
    return dataclasses.replace(image_set, images=image_set.images[chosen], labels=image_set.labels[chosen])


def images_digest(image_set):
    """Return a digest of a data set: its shape, 512 images all over it and all its labels."""
    images, labels = image_set.images, image_set.labels
    digest = hashlib.sha256(repr(images.shape).encode())
    some = images[np.unique(np.linspace(0, len(images) - 1, 512).round().astype(np.int64))]
    for part in (some, np.empty(0) if labels is None else labels):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]
