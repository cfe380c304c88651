"""Check folders of noise-image pairs, of generate_data.py or others: prints a line per folder and per problem.

    python -m tools.check_pairs reflow_data/pairs           some pairs of every folder
    python -m tools.check_pairs reflow_data/pairs --check   all of them

The exit status is 1 for any problem: values that are not finite, z0 that is not unit noise, z1 outside [-1, 1] or in
[0, 1], labels that are not classes, swapped files, or z0 and z1 without the correlation that a flow gives them.
"""

import numpy as np

from configs.command_line import run_program
from configs.default import Field
from datasets.batches import some_of
from datasets.pairs import QUICK_ROWS, check_origins, describe, findings, open_folders
from runtime.terminal import UserError, print_message, progress_bar

DESCRIBED = 4096  # pairs whose statistics are printed with --check

FLAGS = {
    "root": Field("", "folder of pairs: {root}/{seed}/z0.npy …, or {root}/{seed} itself"),
    "check": Field(False, "read every pair, not only some of each folder"),
}


def main(args):
    """Print statistics and problems of each folder; return the exit status."""
    wrong = []
    try:
        for folder in (folders := open_folders(args.root)):
            if args.check:
                parts = np.array_split(np.arange(len(folder)), -(-len(folder) // QUICK_ROWS))
                for part in progress_bar(parts, desc=str(folder.path), unit="parts"):
                    folder.check(part)
            found = describe(*folder.check(some_of(len(folder), DESCRIBED if args.check else QUICK_ROWS)))
            direction, nfe = folder.identity.get("sampling.direction"), (folder.metadata or {}).get("nfe_mean")
            print_message(f"{folder.path}: {len(folder)} pairs {folder.shape}, "
                          f"{'without' if folder.label is None else 'with'} labels, "
                          f"{f'{direction}, {nfe} evaluations per pair' if folder.metadata else 'no pairs.json'}; "
                          f"checked: {', '.join(f'{name} {value:.4g}' for name, value in found.items())}")
            wrong += findings(folder, found)
        check_origins(folders)
    except UserError as error:
        wrong.append(str(error))
    for text in wrong:
        print_message(f"wrong: {text}")
    return int(bool(wrong))


if __name__ == "__main__":
    run_program(main, __doc__, FLAGS, positional=("root",))
