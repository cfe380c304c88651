"""The Fréchet distance at Inception's 2048 dimensions: ours against the matrix root that clean-fid and others take.

    OMP_NUM_THREADS=1 python -m benchmarks.frechet | tee benchmarks/frechet.txt

Processor seconds of one thread, medians of five alternating rounds. Means and covariances in float64 are of 5,000
vectors (full rank) and of 1,000 (rank deficient), whose variances decay as those of Inception features do.
"""

import statistics
import time

import numpy as np
import scipy.linalg
import torch

from metrics.scores import frechet_distance

DIMENSION, ROUNDS = 2048, 5


def moments(seed, samples):
    """Return mean and covariance of random vectors."""
    generator, rotation = np.random.default_rng(seed), np.random.default_rng(9).standard_normal((DIMENSION, DIMENSION))
    scale = (1 + np.arange(DIMENSION)) ** -0.7
    vectors = (generator.standard_normal((samples, DIMENSION)) + 0.1 * seed) * scale @ np.linalg.qr(rotation)[0]
    return vectors.mean(0), np.cov(vectors, rowvar=False)


def by_matrix_root(mu1, sigma1, mu2, sigma2):
    """Return the distance by scipy's root of Σ₁Σ₂, real part only: clean-fid's formula, without its second attempt."""
    root = np.real(scipy.linalg.sqrtm(sigma1 @ sigma2))
    return np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root)


if __name__ == "__main__":
    print(f"torch {torch.__version__}, numpy {np.__version__}, scipy {scipy.__version__}, {DIMENSION} dimensions")
    for samples in (5000, 1000):
        given, times, values = (*moments(0, samples), *moments(1, samples)), {}, {}
        for call in ROUNDS * (frechet_distance, by_matrix_root):
            started = time.process_time()
            values[call] = call(*given)
            times.setdefault(call, []).append(time.process_time() - started)
        ours, theirs = (statistics.median(times[call]) for call in (frechet_distance, by_matrix_root))
        print(f"{samples} vectors: ours {ours:.2f} s (distance {values[frechet_distance]}), matrix root {theirs:.2f} s "
              f"(distance {values[by_matrix_root]}), matrix root / ours {theirs / ours:.2f}", flush=True)
