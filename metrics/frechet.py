"""The Fréchet distance between two Gaussians, by the eigenvalues of a symmetric matrix, not by a matrix root."""

import torch

from runtime.errors import UserError


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Return ‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2(Σ₁Σ₂)^½), a float, never negative.

    `mu*` (D,) and `sigma*` (D, D): tensors or arrays, taken in float64 on the device of `mu1`. With Σ₁ = AAᵀ the
    eigenvalues of Σ₁Σ₂, other than 0, are those of the symmetric AᵀΣ₂A, and the trace of the root is the sum of
    their roots: real and non-negative whatever the rank, where `scipy.linalg.sqrtm` of the non-symmetric Σ₁Σ₂ can
    come out complex. Raises UserError when dimensions differ or a number is not finite.
    Source: Dowson and Landau 1982; Heusel et al. 2017 (arXiv 1706.08500), eq. 6.
    """
    device = mu1.device if torch.is_tensor(mu1) else "cpu"
    mu1, sigma1, mu2, sigma2 = (
        torch.as_tensor(value, dtype=torch.float64, device=device) for value in (mu1, sigma1, mu2, sigma2)
    )
    _check(mu1, sigma1, mu2, sigma2)
    factor = _factor(sigma1)
    eigenvalues = torch.linalg.eigvalsh(factor.T @ sigma2 @ factor)
    root_trace = eigenvalues.clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root_trace
    return max(0.0, distance.item())  # rounding leaves about -1e-12 between equal Gaussians


def _factor(sigma):
    """Return A (D, rank) with A Aᵀ = Σ: Cholesky's factor, or scaled eigenvectors where Σ is not of full rank."""
    sigma = (sigma + sigma.T) / 2
    lower, failed = torch.linalg.cholesky_ex(sigma)
    if not failed:
        return lower
    eigenvalues, vectors = torch.linalg.eigh(sigma)
    kept = eigenvalues > len(sigma) * torch.finfo(sigma.dtype).eps * eigenvalues[-1]  # the others are rounding
    return vectors[:, kept] * eigenvalues[kept].sqrt()


def _check(mu1, sigma1, mu2, sigma2):
    """Refuse statistics that cannot be compared, or that hold NaN."""
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != (*mu1.shape, *mu1.shape):
        raise UserError(
            f"the two sets of statistics have different dimensions: mu {tuple(mu1.shape)} and sigma "
            f"{tuple(sigma1.shape)} against mu {tuple(mu2.shape)} and sigma {tuple(sigma2.shape)}; "
            "both must come from the same feature extractor"
        )
    if not all(value.isfinite().all() for value in (mu1, sigma1, mu2, sigma2)):
        raise UserError("the statistics for the Fréchet distance hold NaN or infinite numbers: some image or file does")
