"""Work and precision of adaptive solvers on a trained 1-flow: ours per sample, scipy, torchdiffeq and torchode.

    python -m benchmarks.ode logs/demo/1_flow/checkpoints/checkpoint_1.pth | tee benchmarks/ode.txt

All integrate the same float32 network (EMA weights) from the same noise, t = 0.001 to 1, with a float64 state and
rtol = atol, a batch at a time: scipy and torchdiffeq with one step size for a batch, torchode and ours with one for
each sample. Columns: evaluations per sample by the solver's own count; rows, evaluations per sample by the network; the
root mean square over a sample's pixels of the difference from a solution at tolerance 1e-6, as mean, median and maximum
over samples; `over`, the mean error divided by that of ours at as many evaluations, interpolated on logarithms (nan
outside): above 1, ours is more accurate for the same work. docs/work_precision.png shows the errors over the rows.
"""

import argparse
from importlib import metadata

import numpy as np
import torch
import torchdiffeq
import torchode
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy.integrate import solve_ivp

from flows.rectified_flow import velocity_from_network
from flows.runge_kutta import rk45
from models import load_model
from runtime.run_folder import git_commit
from runtime.seeds import index_noise

EPS, TIGHT, OURS = 1e-3, 1e-6, "ours, per sample"
TOLERANCES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)


def scipy_rk45(field, z, tol):
    """Integrate dx/dt = field(t, x) from z by scipy; return x at t = 1 and evaluations per sample (None: as rows)."""
    found = solve_ivp(lambda t, x: field(t, torch.from_numpy(x)).cpu().numpy(), (EPS, 1.0),
                      z.double().flatten().cpu().numpy(), method="RK45", rtol=tol, atol=tol)
    return torch.from_numpy(found.y[:, -1]), None


def torchdiffeq_dopri5(field, z, tol):
    """The same by torchdiffeq's dopri5, with one step size for a batch."""
    times = torch.tensor([EPS, 1.0], dtype=torch.float64, device=z.device)
    return torchdiffeq.odeint(field, z.double(), times, rtol=tol, atol=tol, method="dopri5")[-1], None


def torchode_dopri5(field, z, tol):
    """The same by torchode's dopri5, each sample with its own steps, with the PID controller of its documentation."""
    term = torchode.ODETerm(field)
    controller = torchode.PIDController(term=term, atol=tol, rtol=tol, pcoeff=0.2, icoeff=0.5, dcoeff=0.0)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term), controller)
    start, end = (torch.full((len(z),), t, dtype=torch.float64, device=z.device) for t in (EPS, 1.0))
    found = solver.solve(torchode.InitialValueProblem(z.double().flatten(1), start, end, t_eval=end[:, None]))
    # Its n_f_evals is one number for the batch; a sample takes two evaluations at the start and six per step.
    return found.ys[:, -1], 2 + 6 * found.stats["n_steps"]


PEERS = {"scipy RK45": scipy_rk45, "torchdiffeq dopri5": torchdiffeq_dopri5, "torchode dopri5": torchode_dopri5}


def run(name, velocity, z, tol, batch):
    """Return (x, evaluations, rows) of a solver on all samples, the last two as means over samples."""
    rows, shape = [], (-1, *z.shape[1:])

    def counted(x, t, label=None):
        rows.append(len(x))
        return velocity(x, t, label)

    def field(t, x):
        images = x.to(z).view(shape)
        return counted(images, torch.as_tensor(t).to(z).expand(len(images))).double().view_as(x)

    if name == OURS:
        x, nfe = rk45(counted, z, t_start=EPS, tol=tol, slots=batch, shrink_slots=True)
    else:
        parts, counts = zip(*(PEERS[name](field, part, tol) for part in z.split(batch)), strict=True)
        x, nfe = torch.cat([part.to(z).view(shape) for part in parts]), None if counts[0] is None else torch.cat(counts)
    rows = sum(rows) / len(z)
    return x, rows if nfe is None else nfe.double().mean().item(), rows


@torch.no_grad()
def main():
    """Read the command line, print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a .pth file")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=100, help="samples integrated together (slots)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = load_model(options.checkpoint, device=device).requires_grad_(False)
    shape = [net.config_fields[f"data.{name}"] for name in ("num_channels", "image_size", "image_size")]
    velocity, z = velocity_from_network(net), index_noise(0, range(options.samples), shape).to(device)
    title = f"{options.samples} samples {shape} of a 1-flow of {sum(p.numel() for p in net.parameters()):,} parameters"
    print(f"{device.type}, 1 thread, commit {git_commit()}",
          *(f"{name} {metadata.version(name)}" for name in ("torch", "scipy", "torchdiffeq", "torchode")), sep=", ")
    print(f"{title}, batches (slots) of {options.batch}\n{'tolerance':>9}  {'solver':20}{'evaluations':>12}{'rows':>8}"
          f"{'mean error':>12}{'median':>10}{'worst':>10}{'over':>7}", flush=True)
    tight = run(OURS, velocity, z, TIGHT, options.batch)[0]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes, ours = figure.subplots(), None
    for name in (OURS, *PEERS):
        curve, drawn = [], []
        for tol in TOLERANCES:
            x, nfe, rows = run(name, velocity, z, tol, options.batch)
            error = (x - tight).flatten(1).square().mean(1).sqrt()
            curve.append((nfe, error.mean().item()))
            drawn.append((rows, error.mean().item()))
            over = curve[-1][1] / np.exp(np.interp(np.log(nfe), *np.log(ours or curve).T, left=np.nan, right=np.nan))
            print(f"{tol:9g}  {name:20}{nfe:12.2f}{rows:8.2f}{error.mean():12.3e}{error.median():10.2e}"
                  f"{error.max():10.2e}{over:7.2f}", flush=True)
        ours = ours or curve
        axes.loglog(*zip(*drawn, strict=True), "o-", label=name)
    axes.set(xlabel="rows: evaluations per sample by the network", ylabel="mean error (root mean square per pixel)",
             title=title, xticks=[20, 30, 50, 100, 200, 300])
    axes.xaxis.set(major_formatter="{x:g}", minor_formatter=NullFormatter())
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig("docs/work_precision.png", dpi=100)


if __name__ == "__main__":
    main()
