"""Reading pairs: ours against a DataLoader over arrays in memory, as the released code has it; and drawing noise.

    python benchmarks/pairs.py | tee benchmarks/pairs_reading.txt

Batches a second of shuffled pairs of CIFAR-10's size for an epoch, from opening the folder: read from disk (the page
cache), resident on the device, and by np.load and a DataLoader over a TensorDataset.
Runs alternate; figures are medians over the rounds, in processor seconds (on a GPU wall-clock seconds), one thread.
What solving a pair costs is in benchmarks/ode.py.
"""

import os
import pathlib
import statistics
import sys
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from configs.default import get_default_config
from datasets import create_batches
from runtime.seeds import index_noise

BATCH, ROUNDS, STORED, SHAPE = 128, 5, 20_000, (3, 32, 32)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCK = time.perf_counter if DEVICE == "cuda" else time.process_time


def read_with_ours(root, on_device):
    """Read one epoch of the pairs under `root`."""
    config = get_default_config()
    config.data.reflow_data_root, config.training.batch_size, config.data.on_device = root, BATCH, on_device
    batches = create_batches(config, DEVICE)
    for update in range(STORED // BATCH):
        batches.batch(update, 0, BATCH)


def read_with_loader(root):
    """Read one epoch by np.load, a TensorDataset and a DataLoader."""
    data = torch.utils.data.TensorDataset(*(torch.from_numpy(np.load(f"{root}/0/{n}.npy")) for n in ("z0", "z1")))
    for rows in torch.utils.data.DataLoader(data, BATCH, shuffle=True, drop_last=True):
        [row.to(DEVICE) for row in rows]


def main():
    """Print batches a second of every reader, round by round."""
    torch.set_num_threads(1)
    print(f"{DEVICE}, torch {torch.__version__}, numpy {np.__version__}, batches of {BATCH}", flush=True)
    with tempfile.TemporaryDirectory() as root:
        os.mkdir(f"{root}/0")
        np.save(f"{root}/0/z0.npy", index_noise(0, range(STORED), SHAPE))
        np.save(f"{root}/0/z1.npy", index_noise(1, range(STORED), SHAPE).tanh())
        cases = {"ours, from disk": lambda: read_with_ours(root, "false"),
                 "ours, on the device": lambda: read_with_ours(root, "true"),
                 "np.load, DataLoader": lambda: read_with_loader(root),
                 "noise": lambda: index_noise(0, range(STORED), SHAPE)}
        rates = {name: [] for name in cases}
        for _ in range(ROUNDS):
            for name, work in cases.items():
                started = CLOCK()
                work()
                rates[name].append(STORED / BATCH / (CLOCK() - started))
    for name, values in rates.items():
        print(f"{name:24}{statistics.median(values):9.1f} batches/s; rounds {' '.join(f'{v:.1f}' for v in values)}")


if __name__ == "__main__":
    main()
