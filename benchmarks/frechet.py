"""The Fréchet distance at Inception's 2048 dimensions: ours against the matrix root that clean-fid and others take.

    python benchmarks/frechet.py | tee benchmarks/frechet.txt

Both get the same statistics in float64 and one thread each; the figures are processor seconds, so that the machine's
load changes little. `full rank`: means and covariances of 5,000 vectors with decaying variances, as of Inception
features; `rank deficient`: of 1,000 vectors, where the root is of a singular matrix. Runs alternate.
"""

import argparse
import os
import pathlib
import platform
import statistics
import sys
import time

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402
import scipy.linalg  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from metrics.scores import frechet_distance  # noqa: E402

DIMENSION = 2048


def moments(seed, samples):
    """Return mean and covariance of random vectors whose variances decay as those of Inception features do."""
    generator, rotation = np.random.default_rng(seed), np.random.default_rng(9).standard_normal((DIMENSION, DIMENSION))
    scale = (1 + np.arange(DIMENSION)) ** -0.7
    vectors = (generator.standard_normal((samples, DIMENSION)) + 0.1 * seed) * scale @ np.linalg.qr(rotation)[0]
    return vectors.mean(0), np.cov(vectors, rowvar=False)


def by_matrix_root(mu1, sigma1, mu2, sigma2):
    """Return the distance by scipy's root of Σ₁Σ₂, real part only: clean-fid's formula, without its second attempt."""
    root = np.real(scipy.linalg.sqrtm(sigma1 @ sigma2))
    return np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root)


def main():
    """Print seconds and values of both for each kind of statistics, and the ratios of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{platform.machine()}, torch {torch.__version__}, numpy {np.__version__}, scipy {scipy.__version__}, "
          f"1 thread, {DIMENSION} dimensions, medians of {rounds} alternating rounds; processor seconds", flush=True)
    for kind, samples in (("full rank", 5000), ("rank deficient", 1000)):
        given, times, values = (*moments(0, samples), *moments(1, samples)), {}, {}
        for _ in range(rounds):
            for call in (frechet_distance, by_matrix_root):
                started = time.process_time()
                values[call] = call(*given)
                times.setdefault(call, []).append(time.process_time() - started)
        ours, theirs = (statistics.median(times[call]) for call in (frechet_distance, by_matrix_root))
        print(f"{kind}: ours {ours:.2f} (distance {values[frechet_distance]}), matrix root {theirs:.2f} (distance "
              f"{values[by_matrix_root]}), matrix root / ours {theirs / ours:.2f}", flush=True)


if __name__ == "__main__":
    main()
