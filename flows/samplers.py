"""Samplers, from noise to images and back, for a callable `velocity(x, t, label)`; and couplings, which make pairs.

A sampler integrates z `(N, ...)` from time `t_start` to `t_end` and returns `(x, nfe)`: x `(N, ...)`, and the number
of function evaluations per sample, an int for all or int64 `(N,)` on the CPU. t is 0 at noise and 1 at data;
`velocity` takes t `(N,)`. Formulas are from SlimFlow (arXiv 2407.12718) where no other source is given.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import torch

from flows.rectified_flow import interpolate
from flows.runge_kutta import rk45
from runtime.seeds import PATH_NOISE, index_generator
from runtime.terminal import UserError

EDM_RHO = 7  # curvature of EDM's grid of noise levels; arXiv 2206.00364, table 1


def times_like(t, x):
    """Return the time `t` for every sample of `x`, `(N,)`."""
    return torch.full((x.shape[0],), t, dtype=x.dtype, device=x.device)


def one_step(velocity, z, label=None, *, t_start=1e-3, t_end=1.0):
    """x = z + (t_end - t_start)·v(z, t_start): one evaluation."""
    return z + (t_end - t_start) * velocity(z, times_like(t_start, z), label), 1


def euler(velocity, z, label=None, *, steps, t_start=1e-3, t_end=1.0):
    """Euler's method with N = `steps`: t_i = t_start + (i/N)(t_end - t_start), x += ±v(x, t_i)/N (- towards noise).

    The step is 1/N, not (t_end - t_start)/N, as for the published results of rectified flow.
    """
    x, signed_steps = z, steps if t_end > t_start else -steps
    for i in range(steps):
        t = t_start + i / steps * (t_end - t_start)
        x = x + velocity(x, times_like(t, x), label) / signed_steps
    return x, steps


def heun(velocity, z, label=None, *, steps, rho=1.0, t_start=1e-3, t_end=1.0):
    """Heun's method on a grid of curvature ρ: 2N-1 evaluations for N = `steps`.

    t_i = (t_start^ρ + (i/N)(t_end^ρ - t_start^ρ))^(1/ρ); trapezoidal steps, and an Euler step at the end.
    """
    grid = [(t_start**rho + i / steps * (t_end**rho - t_start**rho)) ** (1 / rho) for i in range(steps)] + [t_end]
    x = z
    for i in range(steps):
        t, h = grid[i], grid[i + 1] - grid[i]
        v = velocity(x, times_like(t, x), label)
        if i < steps - 1:
            v = (v + velocity(x + h * v, times_like(t + h, x), label)) / 2
        x = x + h * v
    return x, 2 * steps - 1


def edm(velocity, z, label=None, *, steps, sigma_max=80.0, sigma_min=0.002, t_start=1e-3, t_end=1.0):
    """EDM's deterministic sampler (arXiv 2206.00364, algorithm 1): Heun's method in σ, 2N-1 evaluations, N = `steps`.

    It integrates x_t/t = z1 + σ·z0, σ = (1-t)/t, whose derivative is d(x_t/t)/dσ = x_t - t·v(x_t, t), from σ_max·z0
    over σ_i = (σ_max^(1/7) + i/(N-1)·(σ_min^(1/7) - σ_max^(1/7)))^7 to σ = 0, with an Euler step at the end. The times
    are 1/(1+σ); t_start and t_end are ignored. The state is float64, as in EDM's code.
    """
    high, low = sigma_max ** (1 / EDM_RHO), sigma_min ** (1 / EDM_RHO)
    sigmas = [(high + i / max(1, steps - 1) * (low - high)) ** EDM_RHO for i in range(steps)] + [0.0]

    def slope(x, sigma):
        t = 1 / (1 + sigma)
        x_t = (x * t).to(z.dtype)
        return x_t.double() - t * velocity(x_t, times_like(t, x_t), label).double()

    x = sigma_max * z.double()
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        d = slope(x, sigma)
        if following:
            d = (d + slope(x + (following - sigma) * d, following)) / 2
        x = x + (following - sigma) * d
    return x.to(z.dtype), 2 * steps - 1


def cm_stochastic(velocity, z, label=None, *, steps, noise, t_start=1e-3, t_end=1.0):
    """Multistep sampling of consistency models (arXiv 2303.01469, algorithm 1) on the time grid of `euler`.

    x1 = x + (1-t_i)·v(x, t_i); x = t_{i+1}·x1 + (1-t_{i+1})·ξ. `noise()` returns fresh ξ, standard normal like z.
    """
    x = z
    for i in range(steps):
        t, t_next = (t_start + j / steps * (t_end - t_start) for j in (i, i + 1))
        x = x + (1 - t) * velocity(x, times_like(t, x), label)
        if t_next < 1:  # at t = 1 the noise has weight 0
            x = t_next * x + (1 - t_next) * noise()
    return x, steps


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A row of SAMPLERS."""

    run: Callable  # `run(velocity, z, label, *, t_start, t_end, **arguments) -> (x, nfe)`
    fields: dict = dataclasses.field(default_factory=dict)  # {each config.sampling field it reads: argument of `run`}
    reverse: bool = False  # whether it can run from data to noise, t_start above t_end
    noise: bool = False  # whether it takes `noise()`, see `path_noise`
    adaptive: bool = False  # whether it batches the samples itself, and takes slots, max_steps, shrink_slots, finished


STEPS = {"sample_N": "steps"}
SAMPLERS = {
    "one_step": Sampler(one_step),
    "euler": Sampler(euler, STEPS, reverse=True),
    "heun": Sampler(heun, STEPS | {"rho": "rho"}),
    "edm": Sampler(edm, STEPS | {"sigma_max": "sigma_max", "sigma_min": "sigma_min"}),
    "rk45": Sampler(rk45, {"ode_tol": "tol", "step_control": "step_control"}, reverse=True, adaptive=True),
    "cm_stochastic": Sampler(cm_stochastic, STEPS, noise=True),
}


def sampler_fields():
    """Return the names of all config.sampling fields that some sampler reads."""
    return list(dict.fromkeys(field for row in SAMPLERS.values() for field in row.fields))


def sampler_values(config):
    """Return {field: value} of the fields that the config's sampler reads; fields of other samplers are None."""
    own = SAMPLERS[config.sampling.use_ode_sampler].fields
    return {field: config.sampling[field] if field in own else None for field in sampler_fields()}


@torch.no_grad()
def straightness(velocity, z0, label=None, *, steps=100, t_start=1e-3, t_end=1.0):
    """Return (straightness, times, states) of Euler trajectories with N = `steps`, all of them held in memory.

    Straightness `(B,)` is Σ_i (1/N)·‖v_i - (x_T - z0)‖₂, 0 for a straight trajectory: S(Z) of arXiv 2209.03003 with the
    norm instead of its square. times: `(N+1,)`; states: `(N+1, B, ...)`.
    """
    times, states, velocities = [], [], []

    def traced(x, t, label):
        times.append(t[0])
        states.append(x)
        velocities.append(velocity(x, t, label))
        return velocities[-1]

    x, _ = euler(traced, z0, label, steps=steps, t_start=t_start, t_end=t_end)
    values = sum((v - (x - z0)).flatten(1).norm(dim=1) for v in velocities) / steps
    return values, torch.stack([*times, torch.full_like(times[0], t_end)]), torch.stack([*states, x])


def path_noise(seed, indices, shape, device):
    """Return `noise()`: its n-th call draws `(len(indices), *shape)`, each row a function of (seed, index, n)."""
    generators = [index_generator(seed, int(index), PATH_NOISE) for index in indices]
    return lambda: torch.from_numpy(np.stack([g.standard_normal(shape, dtype="f4") for g in generators])).to(device)


def create_sampler(config, reverse=False, T=1.0, shrink_slots=False):
    """Return the sampler that `config.sampling` selects: `sample(velocity, z, label=None, …) -> (x, nfe)`.

    It is `sample_in_batches`, and runs from noise at config.flow.eps to data at T, or back with `reverse`. T < 1 is for
    velocities that are singular at t = 1, such as the closed form. shrink_slots: see `rk45`. Raises UserError if the
    sampler cannot run back, and for noise levels that rise.
    """
    settings, row = config.sampling, SAMPLERS[config.sampling.use_ode_sampler]
    if reverse and not row.reverse:
        able = " or ".join(name for name, other in SAMPLERS.items() if other.reverse)
        raise UserError(f"config.sampling.use_ode_sampler {settings.use_ode_sampler} does not run from data to noise; "
                        f"use {able}")
    if "sigma_max" in row.fields and settings.sigma_min > settings.sigma_max:
        raise UserError(f"config.sampling.sigma_min {settings.sigma_min:g} is above config.sampling.sigma_max "
                        f"{settings.sigma_max:g}")
    t_start, t_end = (T, config.flow.eps) if reverse else (config.flow.eps, T)
    arguments = {argument: settings[field] for field, argument in row.fields.items()}
    if row.adaptive:
        arguments |= {"max_steps": settings.max_steps, "shrink_slots": shrink_slots}
    run = functools.partial(row.run, t_start=t_start, t_end=t_end, **arguments)
    return functools.partial(sample_in_batches, config, row, run)


@torch.no_grad()
def sample_in_batches(config, row, run, velocity, z, label=None, *, indices=None, batch_size=None, finished=None):
    """Return (x, nfe) of N samples z, any number, by `run` of the `Sampler` row, `batch_size` at a time; nfe: `(N,)`.

    indices: the samples' numbers (default 0…N-1), which determine cm_stochastic's noise. batch_size: by default
    config.sampling.batch_size. `finished(n)` is called when n more are done.
    """
    batch_size = batch_size or config.sampling.batch_size
    if row.adaptive:
        return run(velocity, z, label, slots=batch_size, finished=finished)
    x, nfe = torch.empty_like(z), torch.zeros(len(z), dtype=torch.int64)
    indices = range(len(z)) if indices is None else indices
    for first in range(0, len(z), batch_size):
        part = slice(first, first + batch_size)
        extra = {"noise": path_noise(config.seed, indices[part], z.shape[1:], z.device)} if row.noise else {}
        x[part], nfe[part] = run(velocity, z[part], None if label is None else label[part], **extra)
        if finished:
            finished(len(z[part]))
    return x, nfe


# Couplings of noise z0 and images z1: COUPLINGS has one for each sampling.direction of generate_data.py. A coupling is
# a function (points, indices, solve, eps) → (z0, z1, nfe): `points.z0(indices)` and `points.z1(indices)` return noise
# and images by pair number; `solve(x)` integrates x and returns (end point, number of evaluations `(n,)`).


def random_paired(points, indices, solve, eps):
    """Pair images with independent noise: the coupling that a 1-rectified flow is trained on."""
    return points.z0(indices), points.z1(indices), torch.zeros(len(indices), dtype=torch.int64)


def noise_to_image(points, indices, solve, eps):
    """Integrate noise z0 to an image z1: the coupling of reflow (arXiv 2209.03003)."""
    z0 = points.z0(indices)
    return z0, *solve(z0)


def image_to_noise(points, indices, solve, eps):
    """Integrate an image z1 backwards in time to noise z0."""
    z1 = points.z1(indices)
    z0, nfe = solve(z1)
    return z0, z1, nfe


def near_image_to_noise(points, indices, solve, eps):
    """Integrate (1-eps)·z1 + eps·ξ, ξ = `points.z0`, backwards from t = 1-eps to noise z0.

    For the closed-form velocity, singular at t = 1. At t = 1-eps z1 itself is off the paths: its z0 would be wrong.
    """
    z1 = points.z1(indices)
    z0, nfe = solve(interpolate(points.z0(indices), z1, 1 - eps))
    return z0, z1, nfe


@dataclasses.dataclass(frozen=True)
class Coupling:
    """A row of COUPLINGS: the function, and what generate_data.py must know about it."""

    pairs: Callable
    given: str  # the initial points that it reads: "noise", "image" (integrated in reverse) or "both"
    velocity: str = ""  # the velocity that it integrates: "network", "closed form" (up to t = 1-eps) or "" (none)


COUPLINGS = {
    "from_z0": Coupling(noise_to_image, "noise", "network"),
    "from_z1": Coupling(image_to_noise, "image", "network"),
    "random_paired": Coupling(random_paired, "both"),
    "gt_v_from_z0": Coupling(noise_to_image, "noise", "closed form"),
    "gt_v_from_z1": Coupling(near_image_to_noise, "image", "closed form"),
}


def create_coupling(config, velocity, points, device):
    """Return the coupling of `config.sampling.direction`: `pairs(indices, finished) -> (z0, z1, label, nfe)`.

    It is `make_pairs`, integrated config.training.batch_size at a time. Raises UserError as `create_sampler`.
    """
    row, eps = COUPLINGS[config.sampling.direction], config.flow.eps
    end = 1 - eps if row.velocity == "closed form" else 1.0
    sample = create_sampler(config, reverse=row.given == "image", T=end, shrink_slots=True)
    sample = functools.partial(sample, velocity, batch_size=config.training.batch_size)
    return functools.partial(make_pairs, row, sample, points, eps, device)


def make_pairs(row, sample, points, eps, device, indices, finished):
    """Return (z0, z1, label, nfe) of the pairs with the numbers `indices`, a range, by the `Coupling` row.

    z0, z1: float32 `(n, C, H, W)`, label one-hot float32 `(n, num_classes)` or None, nfe int64 `(n,)`, all on the CPU.
    `finished(k)` is called whenever k more pairs are done. A pair is bit-identical only in the same range (at its end
    rk45 drops idle slots) with the same number of threads and instruction set.
    """
    label = points.label(indices)

    def solve(x):
        x, nfe = sample(x.to(device), None if label is None else label.to(device), indices=indices, finished=finished)
        return x.cpu(), nfe

    if not row.velocity:
        finished(len(indices))
    z0, z1, nfe = row.pairs(points, indices, solve, eps)
    return z0, z1, label, nfe
