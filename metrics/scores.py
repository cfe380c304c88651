"""Kernel distance, precision and recall, Inception score: what needs the features themselves."""

import torch

SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance, as clean-fid and its predecessors
NEIGHBOURS = 3  # of precision and recall
SPLITS = 10  # of the Inception score


def kernel_distance(features1, features2, generator, subsets=SUBSETS, subset_size=SUBSET_SIZE):
    """Return the unbiased squared MMD with the kernel (x·y/D + 1)³, the mean over random subsets, a float.

    `features*` (N, D) float32; `generator`, on the CPU, draws the subsets (without replacement, at most
    `subset_size` from each). It is KID on Inception features. Source: Bińkowski et al. 2018 (arXiv 1801.01401).
    """
    size = min(len(features1), len(features2), subset_size)
    scaled1, scaled2 = _with_one(features1), _with_one(features2)
    total = torch.zeros((), dtype=torch.float64, device=features1.device)
    for _ in range(subsets):
        x, y = (f[torch.randperm(len(f), generator=generator)[:size].to(f.device)] for f in (scaled1, scaled2))
        within = _sum_of_cubes(x, x) + _sum_of_cubes(y, y) - _sum_of_own(x) - _sum_of_own(y)
        total += within / (size * (size - 1)) - 2 * _sum_of_cubes(x, y) / size**2
    return (total / subsets).item()


def _with_one(features):
    """Return rows whose products are x·y/D + 1."""
    return torch.nn.functional.pad(features / features.shape[1] ** 0.5, (0, 1), value=1.0)


def _sum_of_cubes(x, y):
    """Return the sum of the kernel over all pairs: products in float32, the sum in float64."""
    products = (x @ y.T).double()
    return torch.dot(products.square().flatten(), products.flatten())


def _sum_of_own(x):
    """Return the sum of the kernel of each row with itself."""
    return (x.square().sum(1).double() ** 3).sum()


def precision_recall(samples, reference, neighbours=NEIGHBOURS, chunk=2048):
    """Return (precision, recall): the share of samples inside the reference's manifold, and the reverse.

    `samples` (N, D) and `reference` (M, D). A manifold is the union of balls around its points, each reaching to
    the point's k-th nearest other point. Rows are compared `chunk` at a time.
    Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991), eq. 1 and 2.
    """
    radii = _radii(reference, neighbours, chunk)
    precision = _share_inside(samples, reference, radii, chunk)
    recall = _share_inside(reference, samples, _radii(samples, neighbours, chunk), chunk)
    return precision, recall


def _radii(points, neighbours, chunk):
    """Return the distance of each point to its k-th nearest other point (itself is the nearest of all)."""
    return torch.cat([
        torch.cdist(part, points).kthvalue(min(neighbours + 1, len(points))).values for part in points.split(chunk)
    ])


def _share_inside(queries, points, radii, chunk):
    inside = [(torch.cdist(part, points) <= radii).any(1) for part in queries.split(chunk)]
    return torch.cat(inside).double().mean().item()


def inception_score(probabilities, splits=SPLITS):
    """Return (mean, standard deviation) over `splits` stretches of exp(E KL(p(y|x) ‖ p(y))).

    `probabilities` (N, classes), in the order of the samples. Source: Salimans et al. 2016 (arXiv 1606.03498).
    """
    splits = min(splits, len(probabilities))
    scores = []
    for part in probabilities.double().tensor_split(splits):
        divergence = torch.special.entr(part).sum(1).neg() - torch.xlogy(part, part.mean(0)).sum(1)
        scores.append(divergence.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(unbiased=False).item()
