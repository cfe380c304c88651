"""Making pairs, and training on them: ours against the loops that the released code runs.

    python benchmarks/pairs.py making logs/demo/1_flow/checkpoints/checkpoint_1.pth | tee benchmarks/pairs_making.txt
    python benchmarks/pairs.py reading | tee benchmarks/pairs_reading.txt
    python benchmarks/pairs.py training | tee benchmarks/pairs_training.txt

making: pairs a second, on the same trained network, at the same tolerance and batch size, each from loading the
checkpoint to the last file. Ours is what generate_data.py does after its imports. The peer does what the released
script does: noise by torch.randn, scipy's RK45 on the flattened batch with a copy to the host at every evaluation,
batches kept in a list and saved at the end.

reading: batches a second and peak memory of a process that reads shuffled pairs of CIFAR-10's size for an epoch,
ours against np.load of both arrays and a DataLoader over a TensorDataset (without workers, and with two), in processes
of their own.

training: peak memory of train.py itself (a network of 4 channels, a quarter of an epoch of the larger set), with 1,000
pairs and with 100,000.

Runs alternate; figures are medians over the rounds. Seconds are processor seconds (on a GPU, of making, wall-clock
seconds), so that other programs on the machine count little; all use one thread, and reading counts its helpers, too.
"""

import argparse
import contextlib
import io
import math
import multiprocessing
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import scipy
import torch
from scipy.integrate import solve_ivp

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import generate_data  # noqa: E402
from configs.default import get_default_config  # noqa: E402
from datasets import create_batches  # noqa: E402
from flows.rectified_flow import velocity_from_network  # noqa: E402
from models import load_model  # noqa: E402
from runtime.devices import Processes  # noqa: E402

EPS, BATCH, ROUNDS = 1e-3, 64, 5
TOLERANCES = {1e-3: 256, 1e-4: 256}  # pairs in one round: whole blocks, as ours solves no others
SMALL, LARGE, LOADED, SHAPE = 1_000, 100_000, 128, (3, 32, 32)
UPDATES = 200  # of train.py


def ours(checkpoint, tol, count, folder, device):
    """Make `count` pairs as generate_data.py does; return evaluations a pair."""
    config = get_default_config()
    config.sampling.ode_tol, config.sampling.total_number_of_samples = tol, count
    config.training.batch_size, config.training.progress = BATCH, "false"
    args = types.SimpleNamespace(ckpt_path=checkpoint, data_root=folder, z0_path="", z1_path="", label_path="")
    with contextlib.redirect_stdout(io.StringIO()):
        generate_data.make_pairs(config, args, frozenset(), Processes(0, 1, device))
    return generate_data.PairFolder(pathlib.Path(folder) / str(config.seed)).record["nfe_mean"]


@torch.no_grad()
def released_loop(checkpoint, tol, count, folder, device):
    """Make `count` pairs as the released script does; return evaluations a pair."""
    net = load_model(checkpoint, device=device)
    velocity, shape = velocity_from_network(net), image_shape(net)
    all_z0, all_z1, evaluations = [], [], 0
    for _ in range(count // BATCH):
        z0 = torch.randn(BATCH, *shape, device=device)

        def right_side(t, flat, z0=z0):
            x = torch.from_numpy(flat.reshape(z0.shape)).to(device, torch.float32)
            return velocity(x, torch.full((BATCH,), t, device=device)).cpu().numpy().reshape(-1)

        found = solve_ivp(right_side, (EPS, 1.0), z0.cpu().numpy().reshape(-1), rtol=tol, atol=tol, method="RK45")
        all_z0.append(z0.cpu())
        all_z1.append(torch.tensor(found.y[:, -1]).reshape(z0.shape).float())
        evaluations += found.nfev * BATCH
    np.save(folder + "/z0.npy", torch.cat(all_z0).numpy())
    np.save(folder + "/z1.npy", torch.cat(all_z1).numpy())
    return evaluations / count


def image_shape(net):
    """Return the shape (C, H, W) of a network's images."""
    size = net.config_fields["data.image_size"]
    return net.config_fields["data.num_channels"], size, size


def compare_making(checkpoint, device):
    """Print pairs a second of all at each tolerance, round by round."""
    net = load_model(checkpoint)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    print(f"network: {sum(p.numel() for p in net.parameters()):,} parameters, images {image_shape(net)}, batches of "
          f"{BATCH}")
    makers = {"ours": ours, "released loop": released_loop}
    for tol, count in TOLERANCES.items():
        rates, evaluations = {name: [] for name in makers}, {}
        for _ in range(ROUNDS):
            for name, make in makers.items():
                with tempfile.TemporaryDirectory() as folder:
                    started = clock()
                    evaluations[name] = make(checkpoint, tol, count, folder, device)
                    rates[name].append(count / (clock() - started))
        for name, values in rates.items():
            median = statistics.median(values)
            ratio = median / statistics.median(rates["released loop"])
            print(f"tolerance {tol:g}, {count} pairs, {name:14}{median:7.2f} pairs/s, {ratio:.2f} times the released "
                  f"loop, {evaluations[name]:.1f} evaluations a pair; rounds {' '.join(f'{v:.2f}' for v in values)}",
                  flush=True)


def save_pairs(root, count):
    """Write `count` random pairs of CIFAR-10's size in the released layout below `root`, a part at a time."""
    folder = root / str(count) / "0"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, draw in (("z0", generator.standard_normal), ("z1", lambda *a, **k: generator.random(*a, **k) * 2 - 1)):
        rows = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (count, *SHAPE))
        for low in range(0, count, 1000):
            rows[low:low + 1000] = draw((1000, *SHAPE), dtype=np.float32)


def save_in_a_process(root):
    """Write the small and the large set under `root`; return their folders.

    In a process of its own: a child's peak memory is counted from that of the process that starts it.
    """
    for count in (SMALL, LARGE):
        process = multiprocessing.get_context("fork").Process(target=save_pairs, args=(root, count))
        process.start()
        process.join()
        assert process.exitcode == 0
    return {count: root / str(count) for count in (SMALL, LARGE)}


def read_with_ours(root):
    """Yield the batches of one epoch of the pairs under `root`."""
    config = get_default_config()
    config.data.reflow_data_root, config.training.batch_size = root, LOADED
    source = create_batches(config, "cpu")
    for update in range(len(source) // LOADED):
        batch = source.batch(update, 0, LOADED)
        yield batch.z0, batch.z1


def read_with_loader(root, workers):
    """Yield the batches of one epoch by np.load, a TensorDataset and a DataLoader."""
    arrays = [torch.from_numpy(np.load(f"{root}/0/{name}.npy")) for name in ("z0", "z1")]
    data = torch.utils.data.TensorDataset(*arrays)
    yield from torch.utils.data.DataLoader(data, LOADED, shuffle=True, drop_last=True, num_workers=workers)


READERS = {"ours": read_with_ours, "np.load, DataLoader": lambda root: read_with_loader(root, 0),
           "np.load, DataLoader, 2 workers": lambda root: read_with_loader(root, 2)}


def processor_seconds():
    """Return the processor seconds of this process and of its workers that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def read_epoch(reader, root):
    """Read an epoch in this process and print what it cost (the child's work): processor seconds to the first batch,
    then batches a processor second and a wall-clock second."""
    torch.set_num_threads(1)
    started = processor_seconds()
    batches = READERS[reader](root)
    next(batches)
    first, clock = processor_seconds(), time.perf_counter()
    count = sum(len(z1) == LOADED for _, z1 in batches)
    del batches  # ends the workers, whose seconds count from then on
    print(first - started, count / (processor_seconds() - first), count / (time.perf_counter() - clock))


def run_child(words):
    """Run a command of Python; return (what it printed, its peak memory in MB, with that of its workers)."""
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, words
    return printed, used.ru_maxrss / 1024


def compare_reading(roots):
    """Print batches a second and peak memory of every reader on the large set, and ours on the small one."""
    print(f"{LARGE} pairs {SHAPE}, 2.4 GB, batches of {LOADED}, one epoch")
    cases = {name: (name, roots[LARGE]) for name in READERS} | {f"ours, {SMALL} pairs": ("ours", roots[SMALL])}
    results = {case: [] for case in cases}
    for _ in range(ROUNDS):
        for case, (reader, root) in cases.items():
            printed, memory = run_child(["benchmarks/pairs.py", "reading", "--reader", reader, "--root", str(root)])
            results[case].append((*map(float, printed.split()), memory))
    for case, values in results.items():
        first, rate, wall_rate, memory = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{case:32}{rate:8.1f} batches/s ({wall_rate:.1f} by the wall clock), first after {first:5.2f} s, peak "
              f"memory {memory:5.0f} MB; rounds {' '.join(f'{value[1]:.0f}' for value in values)}", flush=True)


def compare_training(roots):
    """Print the peak memory of train.py on the small and on the large set, with as many updates."""
    read = UPDATES * LOADED * 2 * 4 * math.prod(SHAPE) / 1e6
    print(f"train.py, {UPDATES} updates of {LOADED} pairs: {read:.0f} MB of the larger set", flush=True)
    peaks = {}
    for count, root in roots.items():
        with tempfile.TemporaryDirectory() as folder:
            fields = {"work_dir": folder, "expr": "memory", "data.reflow_data_root": root, "training.progress": "false",
                      "training.batch_size": LOADED, "training.n_iters": UPDATES, "training.snapshot_sampling": 0,
                      "model.nf": 4, "model.ch_mult": "(1,)", "model.num_res_blocks": 1,
                      "model.attn_resolutions": "()", "flow.h_flip": "true"}
            words = ["train.py", "--config", "configs/rectified_flow/cifar10_rf_gaussian.py"]
            words += [f"--config.{name}={value}" for name, value in fields.items()]
            _, peaks[count] = run_child(words)
        print(f"{count:7} pairs: peak memory {peaks[count]:.0f} MB", flush=True)
    print(f"difference {peaks[LARGE] - peaks[SMALL]:.0f} MB")


def main():
    """Read the command line and print one part, or read an epoch as a child of the second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("making", "reading", "training"))
    parser.add_argument("checkpoint", nargs="?", help="a .pth file, for making")
    parser.add_argument("--reader", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reader:
        read_epoch(options.reader, options.root)
        return
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device.type}, {platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}, numpy "
          f"{np.__version__}, scipy {scipy.__version__}", flush=True)
    if options.part == "making":
        if not options.checkpoint:
            parser.error("making needs a checkpoint, a .pth file")
        compare_making(options.checkpoint, device)
        return
    with tempfile.TemporaryDirectory() as folder:
        roots = save_in_a_process(pathlib.Path(folder))
        {"reading": compare_reading, "training": compare_training}[options.part](roots)


if __name__ == "__main__":
    main()
