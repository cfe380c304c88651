"""Solvers compared by their error over evaluations: ours with those of other libraries, and ours with each other.

    python -m benchmarks.ode logs/demo/1_flow/checkpoints/checkpoint_1.pth | tee benchmarks/ode.txt
    python -m benchmarks.ode --snapshot tests/data/edm/edm_ddpmpp_cond.pkl | tee benchmarks/edm.txt

Of a trained 1-flow: rk45 per sample, scipy, torchdiffeq and torchode integrate the same float32 network (EMA weights)
from the same noise, t = 0.001 to 1, with a float64 state and rtol = atol, a batch at a time: scipy and torchdiffeq with
one step size for a batch, torchode and ours with one for each sample. Columns: evaluations per sample by the solver's
own count; rows, evaluations per sample by the network; the root mean square over a sample's pixels of the difference
from a solution at tolerance 1e-6, as mean, median and maximum over samples; `over`, the mean error divided by that of
ours at as many evaluations, interpolated on logarithms (nan outside): above 1, ours is more accurate for the same work.
docs/work_precision.png shows the errors over the rows.

Of EDM's networks: the samplers that make pairs, on the exact denoiser of a mixture of Gaussians and on the network of
the snapshot: evaluations per sample, and the median over samples of the root mean square error per pixel, compared with
rk45 from t = 0.001 at a tolerance of 1e-7 (networks: 1e-6). All run on one thread.
"""

import time
from importlib import metadata

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy.integrate import solve_ivp

from configs.command_line import run_program
from configs.default import Field, get_default_config
from flows.rectified_flow import velocity_from_network
from flows.runge_kutta import rk45
from flows.samplers import create_sampler
from models.checkpoint import load_model
from runtime.run_folder import git_commit
from runtime.seeds import index_noise

FLAGS = {
    "checkpoint": Field("", "a 1-flow, to compare adaptive solvers (needs benchmarks/requirements.txt)"),
    "snapshot": Field("", "an EDM snapshot, to compare our samplers"),
    "samples": Field(1000, "samples of the 1-flow", low=1),
    "batch": Field(100, "samples of the 1-flow integrated together (slots)", low=1),
}
EPS, TIGHT, OURS = 1e-3, 1e-6, "ours, per sample"
TOLERANCES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)
SAMPLERS = [("edm", 18), ("edm", 40), ("heun", 18), ("heun", 40), ("rk45", 1e-3), ("rk45", 1e-4), ("rk45", 1e-5)]
IMAGES = 4  # of the snapshot's network


def errors(x, tight):
    """Return the root mean square over pixels of x - tight for each sample, (N,)."""
    return (x - tight).flatten(1).square().mean(1).sqrt()


# A trained 1-flow.


def scipy_rk45(field, z, tol):
    """Integrate dx/dt = field(t, x) from z by scipy; return x at t = 1 and evaluations per sample (None: as rows)."""
    found = solve_ivp(lambda t, x: field(t, torch.from_numpy(x)).cpu().numpy(), (EPS, 1.0),
                      z.double().flatten().cpu().numpy(), method="RK45", rtol=tol, atol=tol)
    return torch.from_numpy(found.y[:, -1]), None


def torchdiffeq_dopri5(field, z, tol):
    """The same by torchdiffeq's dopri5, with one step size for a batch."""
    import torchdiffeq  # here, as torchode below, since nothing else needs it

    times = torch.tensor([EPS, 1.0], dtype=torch.float64, device=z.device)
    return torchdiffeq.odeint(field, z.double(), times, rtol=tol, atol=tol, method="dopri5")[-1], None


def torchode_dopri5(field, z, tol):
    """The same by torchode's dopri5, each sample with its own steps, with the PID controller of its documentation."""
    import torchode

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


def compare_libraries(velocity, z, title, batch):
    """Print the table of the network of a 1-flow and draw the plot."""
    print(*(f"{name} {metadata.version(name)}" for name in ("scipy", "torchdiffeq", "torchode")), sep=", ")
    print(f"{title}, batches (slots) of {batch}\n{'tolerance':>9}  {'solver':20}{'evaluations':>12}{'rows':>8}"
          f"{'mean error':>12}{'median':>10}{'worst':>10}{'over':>7}", flush=True)
    tight = run(OURS, velocity, z, TIGHT, batch)[0]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes, ours = figure.subplots(), None
    for name in (OURS, *PEERS):
        curve, drawn = [], []
        for tol in TOLERANCES:
            x, nfe, rows = run(name, velocity, z, tol, batch)
            error = errors(x, tight)
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


# EDM's networks.


def mixture_velocity(x, t, label=None):
    """Return (D - x_t)/(1-t) for a mixture of 20 Gaussians of standard deviation 0.1 around random images."""
    means = (2 * torch.rand(20, 192, generator=torch.Generator().manual_seed(0)) - 1).double()
    t = t.double()[:, None].clamp(max=0.9999)
    x_t, sigma = x.double().flatten(1), (1 - t) / t
    distance, variance = torch.cdist(x_t / t, means).square(), sigma**2 + 0.01
    mean = (-distance / (2 * variance)).softmax(1) @ means
    return (((mean + 0.01 / variance * (x_t / t - mean)) - x_t) / (1 - t)).view_as(x).to(x.dtype)


def compare_samplers(velocity, z, label=None, tolerance=1e-6):
    """Print a line per sampler with its steps or tolerance, evaluations, and error against rk45 at `tolerance`."""
    tight = None
    for sampler, value in [("rk45", tolerance), *SAMPLERS]:
        config = get_default_config()
        config.sampling.update({"use_ode_sampler": sampler, "ode_tol" if sampler == "rk45" else "sample_N": value})
        started = time.process_time()
        x, nfe = create_sampler(config)(velocity, z, label, batch_size=len(z))
        speed = len(z) / (time.process_time() - started)
        tight = x if tight is None else tight
        print(f"  {sampler:5} {value:<7g} evaluations {nfe.double().mean():6.1f}   "
              f"error {errors(x, tight).median():.1e}   {speed:8.2f} images/s", flush=True)


@torch.no_grad()
def main(args):
    """Compare solvers on the network that the flags name."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.snapshot else "cpu")
    net = load_model(args.snapshot or args.checkpoint, device=device)
    fields, velocity, size = net.config_fields, velocity_from_network(net), sum(p.numel() for p in net.parameters())
    shape = [fields[f"data.{name}"] for name in ("num_channels", "image_size", "image_size")]
    print(f"{device.type}, 1 thread, commit {git_commit()}, torch {torch.__version__}")
    if args.snapshot:
        print("processor seconds; mixture of 20 Gaussians, images (3, 8, 8)")
        compare_samplers(mixture_velocity, index_noise(0, range(256), (3, 8, 8)), tolerance=1e-7)
        print(f"{args.snapshot}: {size:,} parameters")
        classes = fields["data.num_classes"]
        label = torch.eye(classes)[torch.arange(IMAGES) % classes] if classes else None
        compare_samplers(velocity, index_noise(0, range(IMAGES), shape), label)
    else:
        z = index_noise(0, range(args.samples), shape).to(device)
        compare_libraries(velocity, z, f"{args.samples} samples {shape} of a 1-flow of {size:,} parameters", args.batch)


if __name__ == "__main__":
    run_program(main, __doc__, FLAGS, positional=("checkpoint",))
