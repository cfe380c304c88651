"""Look at the pairs under a folder: what they are, and whether all values are what pairs have.

    python -m tools.check_pairs reflow_data/1_rectified_flow_50000          some pairs of every folder
    python -m tools.check_pairs reflow_data/1_rectified_flow_50000 --check  all of them

Exits with status 2 and one sentence at the first NaN, infinite value or wrong label, naming the pair.
"""

import argparse
import sys

import numpy as np

from datasets.pair_folder import QUICK_ROWS, open_folders, spread_rows, unlikely, z0_deviation
from runtime.errors import UserError
from runtime.progress import progress_bar


def main(words=None):
    """Print a line about each folder; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.check_pairs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder of pairs: {root}/{seed}/z0.npy …, or one such folder")
    parser.add_argument("--check", action="store_true", help="read every pair, not only some of each folder")
    arguments = parser.parse_args(words)
    try:
        for folder in open_folders(arguments.root):
            print(describe(folder, check(folder, all_rows(folder) if arguments.check else [spread_rows(folder)])))
    except UserError as error:
        print(f"check_pairs: {error}", file=sys.stderr)
        return 2
    return 0


def all_rows(folder):
    """Return the numbers of all pairs of a folder in parts, a list of int64 arrays."""
    return np.array_split(np.arange(len(folder)), -(-len(folder) // QUICK_ROWS))


def check(folder, parts):
    """Return the statistics of the pairs in `parts` (see `PairFolder.check`), over all of them."""
    found = [folder.check(rows) for rows in progress_bar(parts, desc=str(folder.path), unit="parts")]
    total = {name: sum(one[name] for one in found) for name in ("z0_sum", "z0_squares", "values")}
    return total | {"z1_low": min(one["z1_low"] for one in found), "z1_high": max(one["z1_high"] for one in found)}


def describe(folder, statistics):
    """Return lines about a folder: its size, where it comes from, its values, and what is unlikely about them."""
    record = folder.record or {}
    mean = statistics["z0_sum"] / statistics["values"]
    made = (f"{record['direction']}, {record['storage']} storage, {record['nfe_mean']:.1f} evaluations a pair"
            if record else "no pairs.json (released layout)")
    looked_at = statistics["values"] // int(np.prod(folder.shape))
    lines = [f"{folder.path}: {len(folder)} pairs of shape {tuple(folder.shape)}, "
             f"{'with' if folder.label else 'without'} labels; {made}",
             f"  looked at {looked_at}: z0 mean {mean:.4f}, deviation {z0_deviation(statistics):.4f}; "
             f"z1 from {statistics['z1_low']:.3f} to {statistics['z1_high']:.3f}"]
    return "\n".join(lines + [f"  warning: {text}" for text in unlikely(folder, statistics)])


if __name__ == "__main__":
    sys.exit(main())
