"""Making pairs and reading them: ours against the loops that the released code runs.

    python benchmarks/pairs.py making logs/demo/1_flow/checkpoints/checkpoint_1.pth | tee benchmarks/pairs_making.txt
    python benchmarks/pairs.py reading | tee benchmarks/pairs_reading.txt

making: pairs a second on the same network, tolerance and batch size, from loading the checkpoint to the last file. The
peer does what the released script does: noise by torch.randn, scipy's RK45 on the flattened batch with a copy to the
host at every evaluation, batches kept in a list and saved at the end.

reading: batches a second of shuffled pairs of CIFAR-10's size for an epoch, from disk and resident on the device,
against np.load of both arrays and a DataLoader over a TensorDataset; and noise drawn a second.

Runs alternate; figures are medians over the rounds, in processor seconds (on a GPU wall-clock seconds), one thread.
"""

import argparse
import contextlib
import io
import os
import pathlib
import statistics
import sys
import tempfile
import time
import types

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import scipy
import torch
from scipy.integrate import solve_ivp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import generate_data
from configs.default import get_default_config
from datasets import create_batches
from flows.rectified_flow import velocity_from_network
from models import load_model
from runtime.seeds import index_noise

EPS, BATCH, ROUNDS = 1e-3, 64, 5
TOLERANCES, MADE = (1e-3, 1e-4), 256
STORED, LOADED, SHAPE = 20_000, 128, (3, 32, 32)


def ours(checkpoint, tol, folder):
    """Make pairs as generate_data.py does; return evaluations a pair."""
    config = get_default_config()
    config.sampling.ode_tol, config.sampling.total_number_of_samples = tol, MADE
    config.training.batch_size, config.training.progress = BATCH, "false"
    args = types.SimpleNamespace(ckpt_path=checkpoint, data_root=folder, z0_path="", z1_path="", label_path="")
    with contextlib.redirect_stdout(io.StringIO()):
        generate_data.main(config, args, frozenset())
    return generate_data.PairFolder(pathlib.Path(folder) / str(config.seed)).record["nfe_mean"]


@torch.no_grad()
def released_loop(checkpoint, tol, folder):
    """Make pairs as the released script does; return evaluations a pair."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = load_model(checkpoint, device=device)
    velocity, fields = velocity_from_network(net), net.config_fields
    shape = fields["data.num_channels"], fields["data.image_size"], fields["data.image_size"]
    pairs, evaluations = [], 0
    for _ in range(MADE // BATCH):
        z0 = torch.randn(BATCH, *shape, device=device)

        def right_side(t, flat, z0=z0):
            x = torch.from_numpy(flat.reshape(z0.shape)).to(device, torch.float32)
            return velocity(x, torch.full((BATCH,), t, device=device)).cpu().numpy().reshape(-1)

        found = solve_ivp(right_side, (EPS, 1.0), z0.cpu().numpy().reshape(-1), rtol=tol, atol=tol, method="RK45")
        pairs.append((z0.cpu(), torch.tensor(found.y[:, -1]).reshape(z0.shape).float()))
        evaluations += found.nfev * BATCH
    for name, parts in zip(("z0", "z1"), zip(*pairs, strict=True), strict=True):
        np.save(f"{folder}/{name}.npy", torch.cat(parts).numpy())
    return evaluations / MADE


def read_with_ours(root, on_device):
    """Yield the batches of one epoch of the pairs under `root`."""
    config = get_default_config()
    config.data.reflow_data_root, config.training.batch_size, config.data.on_device = root, LOADED, on_device
    batches = create_batches(config, "cuda" if torch.cuda.is_available() else "cpu")
    yield from (batches.batch(update, 0, LOADED) for update in range(STORED // LOADED))


def read_with_loader(root):
    """Yield the batches of one epoch by np.load, a TensorDataset and a DataLoader."""
    data = torch.utils.data.TensorDataset(*(torch.from_numpy(np.load(f"{root}/0/{n}.npy")) for n in ("z0", "z1")))
    yield from torch.utils.data.DataLoader(data, LOADED, shuffle=True, drop_last=True)


def draw_noise():
    """Yield noise as compact pairs and evaluation draw it."""
    for first in range(0, STORED, LOADED):
        yield index_noise(0, range(first, first + LOADED), SHAPE)


def compare(cases, unit):
    """Print how many `unit` a second each case makes: {name: function that returns (how many, remark)}."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    rates, remarks = {name: [] for name in cases}, {}
    for _ in range(ROUNDS):
        for name, work in cases.items():
            started = clock()
            count, remarks[name] = work()
            rates[name].append(count / (clock() - started))
    for name, values in rates.items():
        print(f"{name:36}{statistics.median(values):9.2f} {unit}/s{remarks[name]}; rounds "
              f"{' '.join(f'{value:.2f}' for value in values)}", flush=True)


def making(checkpoint):
    """Compare the makers at each tolerance."""

    def work(make, tol):
        with tempfile.TemporaryDirectory() as folder:
            return MADE, f", {make(checkpoint, tol, folder):.1f} evaluations a pair"

    compare({f"{make.__name__}, tolerance {tol:g}": lambda make=make, tol=tol: work(make, tol)
             for tol in TOLERANCES for make in (ours, released_loop)}, "pairs")


def reading():
    """Compare the readers on pairs of CIFAR-10's size."""
    with tempfile.TemporaryDirectory() as root:
        os.mkdir(f"{root}/0")
        generator = np.random.default_rng(0)
        np.save(f"{root}/0/z0.npy", generator.standard_normal((STORED, *SHAPE), dtype=np.float32))
        np.save(f"{root}/0/z1.npy", np.tanh(generator.standard_normal((STORED, *SHAPE), dtype=np.float32)))
        cases = {"ours, from disk": lambda: read_with_ours(root, "false"),
                 "ours, on the device": lambda: read_with_ours(root, "true"),
                 "np.load, DataLoader": lambda: read_with_loader(root), "noise": draw_noise}
        compare({name: lambda read=read: (sum(1 for _ in read()), "") for name, read in cases.items()}, "batches")


def main():
    """Read the command line and print one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("making", "reading"))
    parser.add_argument("checkpoint", nargs="?", help="a .pth file, for making")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'cuda' if torch.cuda.is_available() else 'cpu'}, torch {torch.__version__}, numpy {np.__version__}, scipy "
          f"{scipy.__version__}, batches of {LOADED if options.part == 'reading' else BATCH}", flush=True)
    if options.part == "reading":
        reading()
    elif options.checkpoint:
        making(options.checkpoint)
    else:
        parser.error("making needs a checkpoint, a .pth file")


if __name__ == "__main__":
    main()
