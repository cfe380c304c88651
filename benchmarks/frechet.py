"""The Fréchet distance at Inception's 2048 dimensions: ours against clean-fid's.

    python benchmarks/frechet.py | tee benchmarks/frechet.txt

Both get the same statistics in float64 and one thread each, and the figures are processor seconds: so what else the
machine does changes little (with two threads on two busy cores, each waits for the other at every step of an
eigenvalue decomposition, and seconds tell about the machine's load). `full rank`: means and covariances of 5,000
vectors with decaying variances, as of Inception features; `rank deficient`: of 1,000 vectors, where clean-fid's matrix
root is of a singular matrix. Runs alternate; medians of --rounds of them (one of clean-fid takes half a minute).
"""

import argparse
import os
import pathlib
import platform
import statistics
import sys
import time
import warnings

THREADS = 1
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = str(THREADS)

import cleanfid.fid  # noqa: E402
import numpy as np  # noqa: E402
import scipy  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from metrics.scores import frechet_distance  # noqa: E402

DIMENSION = 2048


def main():
    """Print seconds and values of both for each kind of statistics, and the ratios of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")
    frechet_distance(np.zeros(8), np.eye(8), np.ones(8), np.eye(8))  # whatever is loaded on first use
    print(f"{platform.machine()}, torch {torch.__version__}, numpy {np.__version__}, scipy {scipy.__version__}, "
          f"{THREADS} thread, {DIMENSION} dimensions, medians of {rounds} alternating rounds; processor seconds",
          flush=True)
    for kind, samples in (("full rank", 5000), ("rank deficient", 1000)):
        given = (*moments(0, samples), *moments(1, samples))
        times = {"ours": [], "clean-fid": []}
        for _ in range(rounds):
            values = {name: timed(call, given, times[name]) for name, call in
                      (("ours", frechet_distance), ("clean-fid", clean_fid))}
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        print(f"{kind}: ours {medians['ours']:.2f} (distance {values['ours']}), clean-fid {medians['clean-fid']:.2f} "
              f"(distance {values['clean-fid']}), clean-fid / ours {medians['clean-fid'] / medians['ours']:.2f}",
              flush=True)


def moments(seed, samples):
    """Return mean and covariance of random vectors whose variances decay as those of Inception features do."""
    generator = np.random.default_rng(seed)
    scale = (1 + np.arange(DIMENSION)) ** -0.7
    rotation = np.linalg.qr(np.random.default_rng(9).standard_normal((DIMENSION, DIMENSION)))[0]
    vectors = (generator.standard_normal((samples, DIMENSION)) + 0.1 * seed) * scale @ rotation
    return vectors.mean(0), np.cov(vectors, rowvar=False)


def clean_fid(*given):
    """Return clean-fid's distance, or what it says when it gives up."""
    try:
        return cleanfid.fid.frechet_distance(*given)
    except ValueError as error:
        return str(error)


def timed(call, given, times):
    """Return the value of a call and append its processor seconds to `times`."""
    started = time.process_time()
    value = call(*given)
    times.append(time.process_time() - started)
    return value


if __name__ == "__main__":
    main()
