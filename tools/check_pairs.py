"""Tell whether folders of noise-image pairs are right, ours or hand-made: one line a folder and one a finding.

    python -m tools.check_pairs reflow_data/pairs           some pairs of every folder
    python -m tools.check_pairs reflow_data/pairs --check   all of them

The exit status is 1 if anything is wrong: values that are not finite, z0 that is no unit noise, z1 outside [-1, 1] or
in [0, 1], labels that are no classes, swapped files, or z0 and z1 without the correlation that a flow gives them.
"""

import numpy as np

from configs.command_line import run_program
from configs.default import Field
from datasets.batches import evenly_spread
from datasets.pairs import QUICK_ROWS, check_origins, describe, findings, open_folders
from runtime.errors import UserError
from runtime.progress import progress_bar

# A 1-flow on digits has correlation 0.36, closed-form flows 0.22 (digits) and 0.05 (1,000 images of CIFAR-10).
LEAST_CORRELATION = 0.03
THOROUGH_ROWS = 4096  # whose values are described where all are read

FLAGS = {
    "root": Field("", "folder of pairs: {root}/{seed}/z0.npy …, or one such folder"),
    "check": Field(False, "read every pair, not only some of each folder"),
}


def main(args):
    """Print what was found in each folder; return the exit status."""
    wrong = []
    try:
        for folder in (folders := open_folders(args.root)):
            parts = np.array_split(np.arange(len(folder)), -(-len(folder) // QUICK_ROWS)) if args.check else []
            for part in progress_bar(parts, desc=str(folder.path), unit="parts"):
                folder.check(part)
            some = evenly_spread(THOROUGH_ROWS if args.check else QUICK_ROWS, len(folder))
            found = describe(*folder.check(some))
            direction, nfe = folder.identity.get("sampling.direction"), (folder.record or {}).get("nfe_mean")
            made = f"{direction}, {nfe} evaluations a pair" if folder.record else "no pairs.json"
            print(f"{folder.path}: {len(folder)} pairs {folder.shape}, "
                  f"{'without' if folder.label is None else 'with'} labels, {made}; looked at {len(some)}: z0 has "
                  f"standard deviation {found['z0 spread']:.3f}, z1 lies in {found['low']:.2f} to {found['high']:.2f}, "
                  f"correlation {found['correlation']:.2f}")
            wrong += findings(folder, found)
            uncertain = 4 / np.sqrt(found["values"])
            if direction != "random_paired" and found["correlation"] <= uncertain <= LEAST_CORRELATION:
                wrong.append(f"{folder.path}: z0 and z1 have correlation {found['correlation']:.3f}, where a flow "
                             "makes it clearly positive: are they in the same order, and is z0 the noise that each "
                             "image was made from?")
        check_origins(folders)
    except UserError as error:
        wrong.append(str(error))
    for text in wrong:
        print(f"wrong: {text}")
    return int(bool(wrong))


if __name__ == "__main__":
    run_program(main, __doc__, FLAGS, places=("root",))
