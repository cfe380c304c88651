"""Metrics: Fréchet and kernel distance, precision and recall, Inception score, nearest images."""

import numpy as np
import torch

from metrics.features import full_float32, pixel_features
from runtime.terminal import UserError, print_message, progress_bar

SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance, as in clean-fid
NEIGHBOURS = 3  # of precision and recall
SPLITS = 10  # of the Inception score
INDEFINITE = 1e-4  # allowed negative eigenvalues of a covariance relative to its largest entry: float32 rounding


def compare(samples, reference, extractor, seed, radii=None, progress="auto"):
    """Return {metric name: value}, names as in `extractor.names`, of two `Statistics`.

    Metrics that are not available are None: the kernel distance needs features of the reference, precision and recall
    also their `neighbour_radii`, the Inception score an extractor with classes. seed: of subsets and splits.
    """
    for images, count in (("samples", samples.count), ("reference images", reference.count)):
        if count is not None and count <= extractor.dimension:
            print_message(f"warning: {count} {images} for {extractor.dimension} features: their covariance is singular "
                          "and the Fréchet distance too large (its bias falls as 1 / number); compare it only with "
                          "distances of equally many images, and quote none below 50,000", stderr=True)
    features = samples.features.to(samples.mu.device)
    if extractor.dimension >= 1024:
        print_message(f"the Fréchet distance of {extractor.dimension} features takes some seconds", stderr=True)
    values = {"frechet": frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)}
    if reference.features is not None:
        real = reference.features.to(features.device)
        values["kernel"] = kernel_distance(features, real, torch.Generator().manual_seed(seed), progress=progress)
        if radii is not None:
            values["precision"], values["recall"] = precision_recall(features, real, radii, progress)
    if extractor.probabilities is not None:
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).to(features.device)
        values["inception"], values["inception_std"] = inception_score(extractor.probabilities(features)[order])
    return {name: values.get(key) for key, name in extractor.names.items()}


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Return ‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2(Σ₁Σ₂)^½), a float, never negative.

    `mu*` (D,) and `sigma*` (D, D): tensors or arrays, converted to float64 on the device of `mu1`. With Σ₁ = AAᵀ the
    eigenvalues of Σ₁Σ₂, other than 0, are those of the symmetric AᵀΣ₂A, and the trace of the root is the sum of
    their roots: real and non-negative whatever the rank, where `scipy.linalg.sqrtm` of the non-symmetric Σ₁Σ₂ can
    be complex. Raises UserError as `check_gaussian`.
    Source: Dowson and Landau 1982; Heusel et al. 2017 (arXiv 1706.08500), eq. 6.
    """
    device = mu1.device if torch.is_tensor(mu1) else "cpu"
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(value, dtype=torch.float64, device=device)
                                for value in (mu1, sigma1, mu2, sigma2))
    check_gaussian(mu1, sigma1)
    check_gaussian(mu2, sigma2)
    factor, singular = torch.linalg.cholesky_ex((sigma1 + sigma1.T) / 2)
    if singular:  # A (D, rank) of scaled eigenvectors
        eigenvalues, vectors = torch.linalg.eigh((sigma1 + sigma1.T) / 2)
        kept = eigenvalues > len(sigma1) * torch.finfo(torch.float64).eps * eigenvalues[-1]  # others are rounding
        factor = vectors[:, kept] * eigenvalues[kept].sqrt()
    eigenvalues = torch.linalg.eigvalsh(factor.T @ sigma2 @ factor)
    root_trace = eigenvalues.clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root_trace
    return max(0.0, distance.item())  # rounding leaves about -1e-12 between equal Gaussians


def check_gaussian(mu, sigma, name="statistics for the Fréchet distance"):
    """Raise UserError unless mu (D,) and sigma (D, D), float64 tensors, are a mean and a covariance, up to rounding."""
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"{name}: mu has shape {tuple(mu.shape)} and sigma {tuple(sigma.shape)}; they must be (D,) and "
                        "(D, D), the mean and the covariance of D features")
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise UserError(f"{name}: mu or sigma holds NaN or infinite numbers")
    allowed = INDEFINITE * sigma.abs().max()
    indefinite = sigma.any() and torch.linalg.cholesky_ex(sigma + allowed * torch.eye(len(mu)).to(sigma)).info
    if indefinite or (sigma - sigma.T).abs().max() > allowed:
        raise UserError(f"{name}: sigma is not symmetric or has negative eigenvalues, so it is not a covariance")


@full_float32()
def kernel_distance(features1, features2, generator, subsets=SUBSETS, subset_size=SUBSET_SIZE, progress="false"):
    """Return the unbiased squared MMD with the kernel (x·y/D + 1)³, the mean over random subsets, a float.

    `features*` (N, D) float32; `generator`, on the CPU, draws the subsets (without replacement, at most
    `subset_size` from each). It is KID on Inception features. Source: Bińkowski et al. 2018 (arXiv 1801.01401).
    """
    size = min(len(features1), len(features2), subset_size)
    # rows whose products are x·y/D + 1
    scaled = [torch.nn.functional.pad(f / f.shape[1] ** 0.5, (0, 1), value=1.0) for f in (features1, features2)]
    total = torch.zeros((), dtype=torch.float64, device=features1.device)
    for _ in progress_bar(range(subsets), desc="kernel distance", unit="subsets", enabled=progress):
        x, y = (f[torch.randperm(len(f), generator=generator)[:size].to(f.device)] for f in scaled)
        own = [(rows.square().sum(1).double() ** 3).sum() for rows in (x, y)]  # products of each row with itself
        within = _sum_of_cubes(x, x) + _sum_of_cubes(y, y) - own[0] - own[1]
        total += within / (size * (size - 1)) - 2 * _sum_of_cubes(x, y) / size**2
    return (total / subsets).item()


def _sum_of_cubes(x, y):
    """Return the sum of the kernel over all pairs: products in float32, the sum in float64."""
    products = (x @ y.T).double()
    return torch.dot(products.square().flatten(), products.flatten())


@full_float32()
def precision_recall(samples, reference, reference_radii, progress="auto", chunk=2048):
    """Return (precision, recall): the share of samples inside the reference's manifold, and the reverse.

    `samples` (N, D) and `reference` (M, D). A manifold is the union of balls around its points, each reaching to
    the point's k-th nearest other point; `reference_radii` (M,) are those of `neighbour_radii`.
    Rows are compared `chunk` at a time. Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991), eq. 1 and 2.
    """
    inside, covered = 0, torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for part in progress_bar(samples.split(chunk), desc="precision and recall", unit="blocks", enabled=progress):
        reach, distances = _reach(part, samples), torch.cdist(part, reference)
        inside += (distances <= reference_radii).any(1).sum()
        covered |= (distances <= reach[:, None]).any(0)
    return (inside / len(samples)).item(), covered.double().mean().item()


@full_float32()
def neighbour_radii(points, progress="auto", chunk=2048):
    """Return the distance of each of `points` (M, D) to its k-th nearest other point, (M,)."""
    parts = progress_bar(points.split(chunk), desc="neighbours in the reference", unit="blocks", enabled=progress)
    return torch.cat([_reach(part, points) for part in parts])


def _reach(part, points):
    """Return the distances of some of `points` to their k-th nearest other point (the nearest is the point itself)."""
    return torch.cdist(part, points).kthvalue(min(NEIGHBOURS + 1, len(points))).values


def inception_score(probabilities, splits=SPLITS):
    """Return (mean, standard deviation) over `splits` parts of exp(E KL(p(y|x) ‖ p(y))).

    `probabilities` (N, classes), shuffled: parts of one class each would score 1.
    Source: Salimans et al. 2016 (arXiv 1606.03498).
    """
    parts = probabilities.double().tensor_split(min(splits, len(probabilities)))
    divergences = [torch.special.entr(part).sum(1).neg() - torch.xlogy(part, part.mean(0)).sum(1) for part in parts]
    scores = torch.stack([divergence.mean().exp() for divergence in divergences])
    return scores.mean().item(), scores.std(unbiased=False).item()


@full_float32()
def nearest_distances(queries, images, own=None, chunk=8192, progress="false"):
    """Return the Euclidean distance of each query to its nearest image, float32 (N,): 0 for a copy.

    `queries` (N, …), a tensor, and `images` (M, …), an array, are uint8; distances are of their values in [-1, 1].
    `own` (N,): the place in `images` of each query itself, which is left out. The search uses products in float32; the
    distance of what it finds is computed from the difference, so that a copy has distance 0 exactly.
    """
    queries = pixel_features(queries)
    best = torch.full((len(queries),), torch.inf, device=queries.device)
    nearest = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for low in progress_bar(range(0, len(images), chunk), desc="nearest images", unit="blocks", enabled=progress):
        part = _take(images, slice(low, low + chunk), queries.device)
        squared = part.square().sum(1) - 2 * queries @ part.T  # ‖q‖² does not change which is nearest
        if own is not None:
            here = (own >= low) & (own < low + len(part))
            squared[here, own[here] - low] = torch.inf
        least, place = squared.min(1)
        nearest = torch.where(least < best, place + low, nearest)
        best = torch.minimum(least, best)
    return (queries - _take(images, nearest.cpu().numpy(), queries.device)).norm(dim=1)


def _take(images, places, device):
    """Copy some images of a (perhaps read-only, memory-mapped) array to the device, as rows in [-1, 1]."""
    return pixel_features(torch.from_numpy(np.array(images[places])).to(device))
