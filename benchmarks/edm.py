"""EDM's networks as teachers: loading a snapshot, and the cost of pairs by solver, on one CPU thread.

    python -m benchmarks.edm edm-cifar10-32x32-uncond-vp.pkl
    python -m benchmarks.edm tests/data/edm/edm_ddpmpp_cond.pkl --wide FILE.pkl | tee benchmarks/edm.txt

Loading: seconds, and the increase of peak memory over the size of the file. Solvers, on the exact denoiser of a mixture
of Gaussians and on small networks: evaluations per sample, and the median over samples of the root mean square error
per pixel, compared with rk45 from t = 0.001 at a tolerance of 1e-7 (networks: 1e-6). Networks of more than ten million
parameters are only timed. --wide FILE does the same for the snapshot FILE with 16 times the channels and random
weights, written to a temporary folder; from edm_ddpmpp_defaults.pkl, a recorded network of eight channels, it makes the
architecture of edm-cifar10-32x32-uncond-vp.pkl.
"""

import multiprocessing
import pathlib
import tempfile
import time

import torch

from configs.command_line import run_program
from configs.default import Field, get_default_config
from flows.rectified_flow import velocity_from_network
from flows.samplers import create_sampler
from models import load_model
from models.edm_pickle import Bytes, Reader
from runtime.run_folder import git_commit
from runtime.seeds import index_noise
from tests.models.edm_networks import emit, widen

FLAGS = {"snapshot": Field("", "an EDM snapshot"), "wide": Field("", "a snapshot to widen by a factor of 16")}
SOLVERS = [("edm", 18), ("edm", 40), ("heun", 18), ("heun", 40), ("rk45", 1e-3), ("rk45", 1e-4), ("rk45", 1e-5)]
IMAGES, SMALL = 4, 10**7


def memory(name):
    """Return the value `name` of /proc/self/status, in bytes."""
    return 1024 * int(pathlib.Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])


def load(path):
    """Load a snapshot and print time and peak memory, after a small one, so that lazy imports do not count."""
    load_model("tests/data/edm/edm_ncsnpp.pkl")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before, started = memory("VmRSS"), time.process_time()
    net = load_model(path)
    seconds, peak, size = time.process_time() - started, memory("VmHWM") - before, path.stat().st_size
    print(f"{path.name}: {sum(p.numel() for p in net.parameters()):,} parameters, {size / 1e6:.1f} MB loaded in "
          f"{seconds:.2f} s with a peak of {peak / size:.2f} times the file", flush=True)


def mixture_velocity(x, t, label=None):
    """Return (D - x_t)/(1-t) for a mixture of 20 Gaussians of standard deviation 0.1 around random images."""
    means = (2 * torch.rand(20, 192, generator=torch.Generator().manual_seed(0)) - 1).double()
    t = t.double()[:, None].clamp(max=0.9999)
    x_t, sigma = x.double().flatten(1), (1 - t) / t
    distance, variance = torch.cdist(x_t / t, means).square(), sigma**2 + 0.01
    mean = (-distance / (2 * variance)).softmax(1) @ means
    return (((mean + 0.01 / variance * (x_t / t - mean)) - x_t) / (1 - t)).view_as(x).to(x.dtype)


def compare(velocity, z, label=None, tolerance=1e-6):
    """Print a line per solver with its steps or tolerance, evaluations, and error against rk45 at `tolerance`."""
    tight = None
    for solver, value in [("rk45", tolerance), *SOLVERS]:
        config = get_default_config()
        config.sampling.update({"use_ode_sampler": solver, "ode_tol" if solver == "rk45" else "sample_N": value})
        started = time.process_time()
        x, nfe = create_sampler(config)(velocity, z, label, batch_size=len(z))
        speed = len(z) / (time.process_time() - started)
        tight = x if tight is None else tight
        error = (x - tight).square().flatten(1).mean(1).sqrt().median()
        print(f"  {solver:5} {value:<7g} evaluations {nfe.double().mean():6.1f}   error {error:.1e}   "
              f"{speed:8.2f} images/s", flush=True)


def measure(path):
    """Load a snapshot, then compare the solvers on it, or time an evaluation if it is large."""
    fresh = multiprocessing.get_context("spawn").Process(target=load, args=(path,))  # without memory to reuse
    fresh.start()
    fresh.join()
    net = load_model(path)
    size, classes = net.config_fields["data.image_size"], net.config_fields["data.num_classes"]
    z = index_noise(0, range(IMAGES), (net.config_fields["data.num_channels"], size, size))
    label = torch.eye(classes)[torch.arange(IMAGES) % classes] if classes else None
    if sum(p.numel() for p in net.parameters()) < SMALL:
        compare(velocity_from_network(net), z, label)
        return
    with torch.no_grad():
        started = time.process_time()
        net(z[:4], torch.full((4,), 500.0), None if label is None else label[:4])
        seconds = (time.process_time() - started) / 4
    print(f"  {seconds:.2f} s an evaluation of an image: {1 / seconds / 35:.4f} images/s with edm 18", flush=True)


def main(args):
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, commit {git_commit()}; processor seconds")
    print("mixture of 20 Gaussians, images (3, 8, 8)")
    compare(mixture_velocity, index_noise(0, range(256), (3, 8, 8)), tolerance=1e-7)
    if args.snapshot:
        measure(pathlib.Path(args.snapshot))
    if args.wide:
        with tempfile.TemporaryDirectory() as folder:
            source = pathlib.Path(args.wide)
            path = pathlib.Path(folder, f"{source.stem}_16_times_as_wide.pkl")
            content = Reader(Bytes(source.read_bytes())).load()
            widen(content["ema"], 16)
            path.write_bytes(b"\x80\x04" + emit(content) + b".")
            measure(path)


if __name__ == "__main__":
    run_program(main, __doc__, FLAGS, positional=("snapshot",))
