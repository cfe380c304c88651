"""All metrics of one set of samples against one reference."""

import sys

import torch

from metrics.features import full_float32
from metrics.frechet import frechet_distance
from metrics.scores import inception_score, kernel_distance, precision_recall


def compare(samples, reference, extractor, device, seed):
    """Return {metric name: value}, names as in `extractor.names`, of two `Statistics`.

    None stands for what the reference does not allow: kernel distance, precision and recall need its features,
    the Inception score an extractor with classes. `seed` draws the subsets of the kernel distance.
    """
    warn_of_few(samples, extractor)
    values = {"frechet": frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)}
    features = samples.features.to(device)
    if reference.features is not None:
        real = reference.features.to(device)
        with full_float32():
            values["kernel"] = kernel_distance(features, real, torch.Generator().manual_seed(seed))
            values["precision"], values["recall"] = precision_recall(features, real)
    if extractor.probabilities is not None:
        values["inception"], values["inception_std"] = inception_score(extractor.probabilities(features))
    return {name: values.get(key) for key, name in extractor.names.items()}


def warn_of_few(samples, extractor):
    """Say on stderr that a covariance of fewer samples than features is singular and the distance too large."""
    if samples.count <= extractor.dimension:
        print(
            f"warning: {samples.count} samples for {extractor.dimension} features: their covariance is singular and "
            "the Fréchet distance comes out too large (its bias falls as 1 / samples); compare it only with "
            "distances of equally many samples, and quote none below 50,000",
            file=sys.stderr,
        )
