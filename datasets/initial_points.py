"""Where pairs start: noise, images of a data set or rows of npy files, each a function of the pair's index alone."""

import hashlib

import numpy as np
import torch

from datasets.batches import check_labels, pixels_to_float, some_of
from datasets.pairs import NoiseSource, as_float, as_one_hot, image_shape, open_rows
from datasets.sources import load_images
from runtime import seeds
from runtime.files import file_digest
from runtime.terminal import UserError


class InitialPoints:
    """The initial points of pairs by number, in one of the directions of generate_data.py.

    z0, z1 `(n, C, H, W)` and one-hot label `(n, num_classes)`, or None, are float32. available: the largest number of
    pairs, None for no limit. identity: {name: value} of what tells them from others. image_set: the images of the data
    set that the direction uses, or None. Raises UserError for files and classes that do not fit the config.
    """

    def __init__(self, config, z0_path="", z1_path="", label_path=""):
        settings = config.sampling
        self.direction, self.seed, self.num_classes = settings.direction, config.seed, config.data.num_classes
        self.class_label, self.random_flip = settings.class_label, settings.random_flip
        if self.class_label >= self.num_classes:
            raise UserError(f"sampling.class_label {self.class_label}: config.data.num_classes is {self.num_classes}")
        if self.num_classes and self.class_label < 0 and self.direction == "gt_v_from_z0":
            raise UserError("the closed-form velocity of all images knows no classes: set config.sampling.class_label, "
                            "or config.data.num_classes 0")
        if self.num_classes and self.class_label < 0 and z1_path and not label_path:
            raise UserError("--z1_path holds images without classes: give --label_path or config.sampling.class_label")
        paths = {"z0_path": z0_path, "z1_path": z1_path, "label_path": label_path}
        self.rows = {flag: open_rows(path) for flag, path in paths.items() if path}
        self.identity = {flag: file_digest(paths[flag]) for flag in self.rows}
        self.available = min(map(len, self.rows.values()), default=None)
        shape = image_shape(config)
        for flag, rows in self.rows.items():
            if flag == "label_path":
                check_labels(rows, label_path, self.num_classes)
            elif rows.shape[1:] != shape or rows.dtype.kind != "f":
                raise UserError(f"{paths[flag]} holds {rows.dtype} rows of shape {rows.shape[1:]}; the config asks for "
                                f"floating-point rows of shape {shape} (channels, height, width)")
        self.noise, self.image_set = self.rows.get("z0_path"), None
        if self.noise is None and self.direction != "from_z1":
            scale = 1.0 if self.direction == "gt_v_from_z1" else settings.init_noise_scale
            self.noise = NoiseSource(self.seed, shape, scale)
            self.identity["noise"] = self.noise.digest()
        from_images = not z1_path and self.direction in ("from_z1", "gt_v_from_z1", "random_paired")
        if from_images or self.direction.startswith("gt_v"):
            self.image_set = chosen_images(config)
            self.identity["images"] = images_digest(self.image_set)
        if from_images:
            self.identity["sampling.random_flip"] = self.random_flip
        if from_images and self.noise is None:  # the second time round only flips make other pairs
            self.available = len(self.image_set) * (2 if self.random_flip else 1)

    def z0(self, indices):
        """Return the noise of the pairs `indices`."""
        return as_float(self.noise[np.array(indices)])

    def z1(self, indices):
        """Return the images of the pairs `indices`: pair i starts at image i mod N, the next time round mirrored."""
        if "z1_path" in self.rows:
            return as_float(self.rows["z1_path"][np.array(indices)])
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
        if "label_path" in self.rows:
            label = self.rows["label_path"][np.array(indices)]
        elif self.class_label >= 0:
            label = np.full(len(indices), self.class_label)
        elif self.image_set is not None:
            label = self.image_set.labels[np.array(indices) % len(self.image_set)]
        else:
            label = seeds.index_labels(self.seed, indices, self.num_classes).numpy()
        return as_one_hot(label, self.num_classes)


def chosen_images(config):
    """Return the `ImageSet` of the config; only the class `sampling.class_label`, if one is set."""
    image_set, label = load_images(config), config.sampling.class_label
    if label < 0:
        return image_set
    return image_set.choose(np.flatnonzero(image_set.labels == label), f"{image_set.source} (class_label {label})")


def images_digest(image_set):
    """Return a digest of a data set: its shape, 512 images all over it and all its labels."""
    images, labels = image_set.images, image_set.labels
    digest = hashlib.sha256(repr(images.shape).encode())
    for part in (images[some_of(len(images), 512)], np.empty(0) if labels is None else labels):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]
