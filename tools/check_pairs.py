"""Tell whether folders of noise-image pairs are right, ours or hand-made: one line a folder and one a finding.

    python -m tools.check_pairs reflow_data/pairs           some pairs of every folder
    python -m tools.check_pairs reflow_data/pairs --check   all of them

The exit status is 1 if anything is wrong: values that are not finite, z0 that is no unit noise, z1 outside [-1, 1] or
in [0, 1], labels that are no classes, swapped files, or z0 and z1 without the correlation that a flow gives them.

Pairs of any other model are made so (`sample` runs its ODE from unit noise to images in [-1, 1]):

    import numpy as np, os, torch
    folder, count = "my_pairs/0", 50000
    os.makedirs(folder)
    shape = (count, 3, 32, 32)
    z0, z1 = (np.lib.format.open_memmap(f"{folder}/{name}.npy", "w+", np.float32, shape) for name in ("z0", "z1"))
    for first in range(0, count, 500):
        noise = torch.randn(500, *shape[1:], device="cuda")
        z0[first:first + 500], z1[first:first + 500] = noise.cpu(), sample(noise).cpu()
    # with classes: np.save(f"{folder}/label.npy", class_numbers)
"""

import argparse
import sys

import numpy as np

from datasets.pairs import QUICK_ROWS, check_origins, findings, open_folders
from runtime.errors import UserError
from runtime.progress import progress_bar

# A 1-flow on digits has correlation 0.36, closed-form flows 0.22 (digits) and 0.05 (1,000 images of CIFAR-10).
LEAST_CORRELATION = 0.03


def main(words=None):
    """Print what was found in each folder; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.check_pairs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder of pairs: {root}/{seed}/z0.npy …, or one such folder")
    parser.add_argument("--check", action="store_true", help="read every pair, not only some of each folder")
    arguments = parser.parse_args(words)
    wrong = []
    try:
        for folder in (folders := open_folders(arguments.root)):
            rows = np.array_split(np.arange(len(folder)), -(-len(folder) // QUICK_ROWS)) if arguments.check else [None]
            parts = [folder.check(part) for part in progress_bar(rows, desc=str(folder.path), unit="parts")]
            moments = {name: {"low": min, "high": max}.get(name, sum)([part[name] for part in parts])
                       for name in parts[0]}
            print(describe(folder, moments))
            wrong += findings(folder, moments) + uncorrelated(folder, moments)
        check_origins(folders)
    except UserError as error:
        wrong.append(str(error))
    for text in wrong:
        print(f"wrong: {text}")
    return int(bool(wrong))


def correlation(moments):
    """Return the correlation of z0 and z1, about 0."""
    return moments["product"] / np.sqrt(max(moments["z0_square"] * moments["z1_square"], 1e-30))


def uncorrelated(folder, moments):
    """Return a sentence if the pairs are not a flow's, as far as so many values can tell."""
    found, certain = correlation(moments), 4 / np.sqrt(moments["values"])
    random = folder.identity.get("sampling.direction") == "random_paired"
    if random or found > certain or certain > LEAST_CORRELATION:
        return []
    return [f"{folder.path}: z0 and z1 have correlation {found:.3f}, where a flow makes it clearly positive: are they "
            "in the same order, and is z0 the noise that each image was made from?"]


def describe(folder, moments):
    """Return a line about a folder: its size, its origin and its values."""
    made = (f"{folder.identity['sampling.direction']}, {folder.record.get('nfe_mean')} evaluations a pair"
            if folder.record else "no pairs.json")
    return (f"{folder.path}: {len(folder)} pairs {folder.shape}, {'with' if folder.label is not None else 'without'} "
            f"labels, {made}; looked at {moments['pairs']}: z0 has standard deviation "
            f"{np.sqrt(moments['z0_square'] / moments['values']):.3f}, z1 lies in {moments['low']:.2f} to "
            f"{moments['high']:.2f}, correlation {correlation(moments):.2f}")


if __name__ == "__main__":
    sys.exit(main())
