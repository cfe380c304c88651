"""EDM's networks as teachers: the cost and the error of pairs by solver, on one CPU thread.

    python -m benchmarks.edm tests/data/edm/edm_ddpmpp_cond.pkl

On the exact denoiser of a mixture of Gaussians and on the network of a snapshot: evaluations per sample, and the median
over samples of the root mean square error per pixel, compared with rk45 from t = 0.001 at a tolerance of 1e-7
(networks: 1e-6).
"""

import time

import torch

from configs.command_line import run_program
from configs.default import Field, get_default_config
from flows.rectified_flow import velocity_from_network
from flows.samplers import create_sampler
from models import load_model
from runtime.run_folder import git_commit
from runtime.seeds import index_noise

FLAGS = {"snapshot": Field("", "an EDM snapshot")}
SOLVERS = [("edm", 18), ("edm", 40), ("heun", 18), ("heun", 40), ("rk45", 1e-3), ("rk45", 1e-4), ("rk45", 1e-5)]
IMAGES = 4


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


def main(args):
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, commit {git_commit()}; processor seconds")
    print("mixture of 20 Gaussians, images (3, 8, 8)")
    compare(mixture_velocity, index_noise(0, range(256), (3, 8, 8)), tolerance=1e-7)
    if args.snapshot:
        net = load_model(args.snapshot)
        size, classes = net.config_fields["data.image_size"], net.config_fields["data.num_classes"]
        z = index_noise(0, range(IMAGES), (net.config_fields["data.num_channels"], size, size))
        label = torch.eye(classes)[torch.arange(IMAGES) % classes] if classes else None
        print(f"{args.snapshot}: {sum(p.numel() for p in net.parameters()):,} parameters")
        compare(velocity_from_network(net), z, label)


if __name__ == "__main__":
    run_program(main, __doc__, FLAGS, positional=("snapshot",))
