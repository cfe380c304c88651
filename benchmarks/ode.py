"""Adaptive integration of a trained 1-flow: ours, per sample and joint, against scipy, torchdiffeq and torchode.

    pip install -r benchmarks/requirements.txt
    checkpoint=logs/demo/1_flow/checkpoints/checkpoint_1.pth
    python benchmarks/ode.py controls $checkpoint --reference /tmp/reference.pt | tee benchmarks/ode_controls.txt
    python benchmarks/ode.py peers $checkpoint --reference /tmp/reference.pt | tee benchmarks/ode_peers.txt

All integrate the same float32 network (EMA weights) from the same noise, from t = 0.001 to 1, with a float64 state
and rtol = atol, a batch at a time. controls: ours, per sample against joint, on 1,000 samples. peers: all solvers on
fewer samples, with seconds: the least of interleaved rounds, on a CPU processor seconds of the one thread that all
use, so that other programs on the machine count little; `lanes shrink` is ours per sample as generate_data.py runs it,
giving up idle lanes at the end. Columns: evaluations a sample needs by its solver's own count; rows, how many times the
network really saw it (a batch computes what some of its samples no longer need); error, the root mean square over a
sample's pixels against a solution at tolerance 1e-6, as mean, median and worst of the samples.

That solution costs as much as the rest; --reference FILE keeps it for the next run with the same checkpoint.
"""

import argparse
import os
import pathlib
import platform
import sys
import time
from importlib import metadata

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torchdiffeq
import torchode
from scipy.integrate import solve_ivp

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flows.rectified_flow import velocity_from_network  # noqa: E402
from flows.runge_kutta import rk45_joint, rk45_per_sample  # noqa: E402
from models import load_model  # noqa: E402
from runtime.files import file_digest  # noqa: E402
from runtime.seeds import index_noise  # noqa: E402

EPS, TIGHT = 1e-3, 1e-6
TOLERANCES = {1e-3: 100, 1e-4: 100, 1e-5: 50}  # samples for the peers


class CountedVelocity:
    """A velocity that counts the rows it computes; the same work for every solver."""

    def __init__(self, velocity):
        """Wrap `velocity(x, t, label)`."""
        self.velocity, self.rows = velocity, 0

    def __call__(self, x, t, label=None):
        """Return the velocity at x `(B, C, H, W)`, t `(B,)`."""
        self.rows += len(x)
        return self.velocity(x, t, label)


def per_sample(velocity, z, tol, batch):
    """Ours, each sample with its own steps."""
    return rk45_per_sample(velocity, z, t_start=EPS, tol=tol, lanes=batch)


def lanes_shrink(velocity, z, tol, batch):
    """Ours, each sample with its own steps, giving up lanes for which no sample waits."""
    return rk45_per_sample(velocity, z, t_start=EPS, tol=tol, lanes=batch, shrink_lanes=True)


def joint(velocity, z, tol, batch):
    """Ours, one step size for a batch."""
    return rk45_joint(velocity, z, t_start=EPS, tol=tol, lanes=batch)


def in_batches(solve):
    """Return a solver of any number of samples from `solve(velocity, z, tol)` of one batch."""

    def solver(velocity, z, tol, batch):
        parts = [solve(velocity, part, tol) for part in z.split(batch)]
        return torch.cat([x for x, _ in parts]), torch.cat([nfe for _, nfe in parts])

    return solver


@in_batches
def scipy_rk45(velocity, z, tol):
    """scipy's solve_ivp on the flattened batch."""

    def right_side(t, flat):
        x = torch.from_numpy(flat).view_as(z).to(z.device, z.dtype)
        v = velocity(x, torch.full((len(z),), t, dtype=z.dtype, device=z.device))
        return v.double().cpu().numpy().reshape(-1)

    found = solve_ivp(right_side, (EPS, 1.0), z.double().cpu().numpy().reshape(-1), method="RK45", rtol=tol, atol=tol)
    x = torch.from_numpy(found.y[:, -1]).view_as(z).to(z.device, z.dtype)
    return x, torch.full((len(z),), found.nfev)


@in_batches
def torchdiffeq_dopri5(velocity, z, tol):
    """torchdiffeq's dopri5, one step size for a batch."""
    calls = 0

    def right_side(t, x):
        nonlocal calls
        calls += 1
        return velocity(x.to(z.dtype), t.to(z.dtype).expand(len(z))).double()

    times = torch.tensor([EPS, 1.0], dtype=torch.float64, device=z.device)
    x = torchdiffeq.odeint(right_side, z.double(), times, rtol=tol, atol=tol, method="dopri5")[-1]
    return x.to(z.dtype), torch.full((len(z),), calls)


@in_batches
def torchode_dopri5(velocity, z, tol):
    """torchode's dopri5, each sample with its own steps, with the PID controller its documentation names."""

    def right_side(t, flat):
        return velocity(flat.to(z.dtype).view_as(z), t.to(z.dtype)).double().flatten(1)

    term = torchode.ODETerm(right_side)
    controller = torchode.PIDController(term=term, atol=tol, rtol=tol, pcoeff=0.2, icoeff=0.5, dcoeff=0.0)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term), controller)
    ends = [torch.full((len(z),), t, dtype=torch.float64, device=z.device) for t in (EPS, 1.0)]
    found = solver.solve(torchode.InitialValueProblem(z.double().flatten(1), *ends, t_eval=ends[1][:, None]))
    # Its own n_f_evals is one number for the batch; a step of a sample is six evaluations, the start two.
    return found.ys[:, -1].view_as(z).to(z.dtype), (2 + 6 * found.stats["n_steps"]).cpu()


SOLVERS = {"ours, per sample": per_sample, "ours, lanes shrink": lanes_shrink, "ours, joint": joint,
           "scipy RK45": scipy_rk45, "torchdiffeq dopri5": torchdiffeq_dopri5, "torchode dopri5": torchode_dopri5}


def seconds_used(device):
    """A clock for `device`: processor seconds of this process on a CPU, wall-clock seconds on a GPU."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def tight_solution(velocity, z, batch, path, digest):
    """Return the solution at the tolerance TIGHT; it is kept in the file `path` for `digest`, if there is a path."""
    if path and path.exists():
        kept = torch.load(path, map_location=z.device, weights_only=True)
        if (kept["digest"], kept["tolerance"]) == (digest, TIGHT) and len(kept["x"]) >= len(z):
            return kept["x"][: len(z)]
    x, _ = per_sample(velocity, z, TIGHT, batch)
    if path:
        torch.save({"digest": digest, "tolerance": TIGHT, "x": x}, path)
    return x


def described(name, tol, x, nfe, rows, tight):
    """Return one line: evaluations and rows of a sample, and the errors of x against the solution `tight`."""
    error = (x - tight).flatten(1).square().mean(1).sqrt()
    return (f"{tol:9g}  {name:20}{nfe.double().mean():12.2f}{rows / len(x):8.2f}{error.mean():12.3e}"
            f"{error.median():10.2e}{error.max():10.2e}")


def headed(samples, batch, more=""):
    """Print what the lines below are."""
    print(f"\n{samples}, batches (lanes) of {batch}, errors against tolerance {TIGHT:g}{more}")
    print(f"{'tolerance':>9}  {'solver':20}{'evaluations':>12}{'rows':>8}{'mean error':>12}{'median':>10}{'worst':>10}",
          flush=True)


def compare_controls(velocity, z, tight, batch, tolerances):
    """Print evaluations, rows and errors of ours in both modes at each tolerance."""
    headed(f"{len(z)} samples", batch)
    for tol in tolerances:
        for name in ("ours, per sample", "ours, joint"):
            counted = CountedVelocity(velocity)
            x, nfe = SOLVERS[name](counted, z, tol, batch)
            print(described(name, tol, x, nfe, counted.rows, tight), flush=True)


def compare_peers(velocity, z, tight, batch, rounds):
    """Print the same of each solver at each tolerance, with seconds: every round, the least, its ratio to ours."""
    headed(f"{', '.join(map(str, TOLERANCES.values()))} samples", batch,
           f"; processor seconds, {rounds} interleaved rounds" if z.device.type == "cpu" else f"; {rounds} rounds")
    for tol, count in TOLERANCES.items():
        seconds, lines = {name: [] for name in SOLVERS}, {}
        for _ in range(rounds):
            for name, solver in SOLVERS.items():
                counted, started = CountedVelocity(velocity), seconds_used(z.device)
                x, nfe = solver(counted, z[:count], tol, batch)
                seconds[name].append(seconds_used(z.device) - started)
                lines[name] = described(name, tol, x, nfe, counted.rows, tight[:count])
        ours = min(seconds["ours, per sample"])
        for name, values in seconds.items():
            print(f"{lines[name]}   {min(values):7.3f} s, {min(values) / ours:4.2f} times ours; rounds "
                  f"{' '.join(f'{value:.2f}' for value in values)}", flush=True)


@torch.no_grad()
def main():
    """Read the command line and print one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("controls", "peers"))
    parser.add_argument("checkpoint", help="a .pth file")
    parser.add_argument("--samples", type=int, default=1000, help="samples for the controls")
    parser.add_argument("--tolerances", type=float, nargs="+", default=list(TOLERANCES), help="for the controls")
    parser.add_argument("--batch", type=int, default=100, help="batch (lanes) for the controls")
    parser.add_argument("--peers_batch", type=int, default=25, help="batch (lanes) for the peers")
    parser.add_argument("--rounds", type=int, default=4, help="rounds for the peers")
    parser.add_argument("--reference", type=pathlib.Path, help="file that keeps the tight solution")
    options = parser.parse_args()

    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = load_model(options.checkpoint, device=device).requires_grad_(False)
    velocity, fields = velocity_from_network(net), net.config_fields
    shape = (fields["data.num_channels"], fields["data.image_size"], fields["data.image_size"])
    print(f"{device.type}, {platform.processor() or platform.machine()}, 1 thread; "
          + ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "scipy", "torchdiffeq", "torchode")))
    print(f"network: {sum(p.numel() for p in net.parameters()):,} parameters, images {shape}")
    z = index_noise(0, range(options.samples if options.part == "controls" else max(TOLERANCES.values())), shape)
    z = z.to(device)
    tight = tight_solution(velocity, z, options.batch, options.reference, file_digest(options.checkpoint))
    if options.part == "controls":
        compare_controls(velocity, z, tight, options.batch, options.tolerances)
    else:
        compare_peers(velocity, z, tight, options.peers_batch, options.rounds)


if __name__ == "__main__":
    main()
