"""Making pairs and reading them: ours against the loops that the released code runs.

    python benchmarks/pairs.py logs/demo/1_flow/checkpoints/checkpoint_1.pth | tee benchmarks/pairs_making.txt
    python benchmarks/pairs.py | tee benchmarks/pairs_reading.txt

With a checkpoint: pairs a second on the same network, tolerance and batch size, from loading the checkpoint to the last
file. The peer does what the released script does: noise by torch.randn, scipy's RK45 on the flattened batch with a copy
to the host at every evaluation, batches kept in a list and saved at the end.

Without: batches a second of shuffled pairs of CIFAR-10's size for an epoch, from opening them, read from disk and
resident on the device, against np.load and a DataLoader over a TensorDataset; and of drawn noise.

Runs alternate; figures are medians over the rounds, in processor seconds (on a GPU wall-clock seconds), one thread.
"""

import contextlib
import functools
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
import torch
from scipy.integrate import solve_ivp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import generate_data
from configs.default import get_default_config
from datasets import create_batches
from flows.rectified_flow import velocity_from_network
from models import load_model
from runtime.seeds import index_noise

EPS, BATCH, ROUNDS, MADE, STORED, SHAPE = 1e-3, 64, 5, 256, 20_000, (3, 32, 32)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCK = time.perf_counter if DEVICE == "cuda" else time.process_time


def ours(checkpoint, tol, folder):
    """Make pairs as generate_data.py does."""
    config = get_default_config()
    config.sampling.ode_tol, config.sampling.total_number_of_samples = tol, MADE
    config.training.batch_size, config.training.progress = BATCH, "false"
    args = types.SimpleNamespace(ckpt_path=checkpoint, data_root=folder, z0_path="", z1_path="", label_path="")
    with contextlib.redirect_stdout(io.StringIO()):
        generate_data.main(config, args, frozenset())


@torch.no_grad()
def released_loop(checkpoint, tol, folder):
    """Make pairs as the released script does."""
    net = load_model(checkpoint, device=DEVICE)
    velocity, size = velocity_from_network(net), net.config_fields["data.image_size"]
    pairs = []
    for _ in range(MADE // BATCH):
        z0 = torch.randn(BATCH, net.config_fields["data.num_channels"], size, size, device=DEVICE)

        def right_side(t, flat, z0=z0):
            x = torch.from_numpy(flat.reshape(z0.shape)).to(DEVICE, torch.float32)
            return velocity(x, torch.full((BATCH,), t, device=DEVICE)).cpu().numpy().reshape(-1)

        found = solve_ivp(right_side, (EPS, 1.0), z0.cpu().numpy().reshape(-1), rtol=tol, atol=tol, method="RK45")
        pairs.append((z0.cpu(), torch.tensor(found.y[:, -1]).reshape(z0.shape).float()))
    for name, parts in zip(("z0", "z1"), zip(*pairs, strict=True), strict=True):
        np.save(f"{folder}/{name}.npy", torch.cat(parts).numpy())


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


def compare(cases, count, unit):
    """Print how many of `count` `unit` a second each case does: {name: function of a fresh folder}."""
    rates = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, work in cases.items():
            with tempfile.TemporaryDirectory() as folder:
                started = CLOCK()
                work(folder)
                rates[name].append(count / (CLOCK() - started))
    for name, values in rates.items():
        print(f"{name:32}{statistics.median(values):9.2f} {unit}/s; rounds {' '.join(f'{v:.2f}' for v in values)}")


def main():
    """Compare the makers on the checkpoint of the command line, or the readers."""
    torch.set_num_threads(1)
    print(f"{DEVICE}, torch {torch.__version__}, numpy {np.__version__}, batches of {BATCH}", flush=True)
    if sys.argv[1:]:
        compare({f"{make.__name__}, tolerance {tol:g}": functools.partial(make, sys.argv[1], tol)
                 for tol in (1e-3, 1e-4) for make in (ours, released_loop)}, MADE, "pairs")
        return
    with tempfile.TemporaryDirectory() as root:
        os.mkdir(f"{root}/0")
        for name, noise in (("z0", index_noise(0, range(STORED), SHAPE)), ("z1", index_noise(1, range(STORED), SHAPE))):
            np.save(f"{root}/0/{name}.npy", noise if name == "z0" else noise.tanh())
        compare({"ours, from disk": lambda _: read_with_ours(root, "false"),
                 "ours, on the device": lambda _: read_with_ours(root, "true"),
                 "np.load, DataLoader": lambda _: read_with_loader(root),
                 "noise": lambda _: index_noise(0, range(STORED), SHAPE)}, STORED // BATCH, "batches")


if __name__ == "__main__":
    main()
