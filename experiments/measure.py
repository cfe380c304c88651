"""The figures of samples: Fréchet distances to images held out from training, and whether training images come back."""

import json
import pathlib

import numpy as np
import torch

from experiments.images import load_classifier, split
from experiments.steps import EVALUATE, LOOK, MEASURED, PAIRS, TRAIN
from metrics.frechet import frechet_distance
from metrics.neighbours import nearest_distances
from metrics.results import read_results

REPLAYS = 8  # times that training images are drawn for the reference row


class Yardstick:
    """What samples of an `Images` are held against."""

    def __init__(self, images):
        self.halves = split(images)
        self.classifier = load_classifier(images, self.halves)
        self.spaces = {"feature_distance": self.classifier.features, "pixel_distance": pixels}
        self.reference = {name: gaussian(space(self.halves.held_out)) for name, space in self.spaces.items()}

    def measure(self, samples):
        """Return the figures of uint8 samples (N, 1, H, W), N a multiple of the number of images held out.

        The distances are means over groups as large as the set of held-out images, since a Fréchet distance falls
        with the number of samples; `nearest` is the median distance in [-1, 1] to the nearest training image.
        """
        groups = samples.reshape(-1, *self.halves.held_out.shape)
        figures = {name: float(np.mean([frechet_distance(*gaussian(space(group)), *self.reference[name])
                                        for group in groups])) for name, space in self.spaces.items()}
        nearest = nearest_distances(torch.from_numpy(samples), self.halves.train)
        return figures | {"nearest": nearest.median().item()}

    def references(self):
        """Return {name: figures} of real images: training images each once, and drawn again and again (replayed)."""
        count, train, random = len(self.halves.held_out), self.halves.train, np.random.default_rng(0)
        once = random.permutation(len(train))[:count]
        replayed = random.integers(len(train), size=REPLAYS * count)
        held_out = nearest_distances(torch.from_numpy(np.array(self.halves.held_out)), train).median().item()
        return {"real against real": self.measure(np.array(train[once])) | {"nearest": held_out},
                "training images replayed": self.measure(np.array(train[replayed]))}


def pixels(images):
    """Return the pixels as rows of numbers in [-1, 1], float64."""
    return images.reshape(len(images), -1).astype(np.float64) / 127.5 - 1


def gaussian(rows):
    """Return mean and covariance of rows of features (N, D)."""
    return rows.mean(0), np.cov(rows, rowvar=False)


def figures_of(step, root, yardstick):
    """Return the figures of a finished step for its row of the table; `yardstick(images)` gives a `Yardstick`."""
    folder = pathlib.Path(root, step.place)
    if step.kind == TRAIN:
        last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
        return {"loss": last["loss"]}
    if step.kind == PAIRS:
        about = json.loads((folder / str(step.seed) / "pairs.json").read_text())
        return {"nfe": about["nfe_mean"]}
    flow = pathlib.Path(root, dict(step.needs)["flow"].place)
    if step.kind == LOOK:
        entries = json.loads((flow / "eval_sample/checkpoint_1/samples.json").read_text())
        return {"straightness": entries[-1]["straightness"]}
    assert step.kind == EVALUATE
    sampler, steps = sampler_of(step)
    results = read_results(flow / "eval/results.jsonl")
    result = [r for r in results if (r["sampler"], r["sample_N"]) == (sampler, steps)]
    figures = {name: result[-1][name] for name in ("nfe", "parameters", "gmacs", "latency_ms")}
    samples = np.load(flow / f"eval/checkpoint_1_{sampler}{f'-{steps}' if steps else ''}.npy")
    assert len(samples) == MEASURED * step.images.measured
    return figures | yardstick(step.images).measure(samples)


def sampler_of(step):
    """Return (sampler, number of steps or None) of an evaluation."""
    fields = dict(zip(step.words, step.words[1:], strict=False))
    steps = fields.get("--config.sampling.sample_N")
    return fields["--config.sampling.use_ode_sampler"], steps and int(steps)
