"""From noise to images and back: samplers over a callable `velocity(x, t, label)`, all of one signature.

A sampler takes z `(N, ...)` and returns `(x, nfe)`: x `(N, ...)`, and the number of function evaluations of each
sample, int64 `(N,)` on the CPU. t is 0 at noise and 1 at data and stays in [eps, T]; velocity sees t `(N,)`.
`record(t, x)`, if given, sees every point of the way, and costs nothing otherwise.
Formulas: SlimFlow (arXiv 2407.12718) and the works named at each.
"""

import difflib
import functools

import torch

from flows.runge_kutta import rk45_joint, rk45_per_sample
from runtime.errors import UserError
from runtime.seeds import PATH_NOISE, index_generator

SAMPLERS = ("one_step", "euler", "heun", "rk45", "cm_stochastic")
REVERSIBLE = ("euler", "rk45")


def times_like(t, x):
    """Return the time `t` for every sample of `x`, `(N,)`."""
    return torch.full((x.shape[0],), t, dtype=x.dtype, device=x.device)


def evaluations(count, x):
    """Return `count` evaluations for every sample of `x`, int64 `(N,)` on the CPU."""
    return torch.full((x.shape[0],), count, dtype=torch.int64)


def note(record, t, x):
    """Show a point of the way to `record`, if anybody records."""
    if record:
        record(times_like(t, x), x)


def one_step(velocity, z, label=None, *, eps=1e-3, T=1.0, record=None):
    """x = z + (T-eps)·v(z, eps): one evaluation."""
    note(record, eps, z)
    x = z + (T - eps) * velocity(z, times_like(eps, z), label)
    note(record, T, x)
    return x, evaluations(1, z)


def euler(velocity, z, label=None, *, steps, eps=1e-3, T=1.0, record=None):
    """Euler's rule with N = `steps`: t_i = eps + (i/N)(T-eps), x += v(x, t_i)/N.

    The step is 1/N and not (T-eps)/N: the published figures of rectified flows were made so.
    """
    x = z
    for i in range(steps):
        t = eps + i / steps * (T - eps)
        note(record, t, x)
        x = x + velocity(x, times_like(t, x), label) / steps
    note(record, T, x)
    return x, evaluations(steps, z)


def euler_reverse(velocity, z, label=None, *, steps, eps=1e-3, T=1.0, record=None):
    """Euler's rule from data `z` at T to noise at eps: t_i = T - (i/N)(T-eps), x -= v(x, t_i)/N."""
    x = z
    for i in range(steps):
        t = T - i / steps * (T - eps)
        note(record, t, x)
        x = x - velocity(x, times_like(t, x), label) / steps
    note(record, eps, x)
    return x, evaluations(steps, z)


def heun(velocity, z, label=None, *, steps, rho=1.0, eps=1e-3, T=1.0, record=None):
    """Heun's rule on the grid of EDM (Karras et al. 2022): 2N-1 evaluations for N = `steps`.

    t_i = (eps^ρ + (i/N)(T^ρ - eps^ρ))^(1/ρ); trapezoid steps, and Euler's rule for the last one.
    """
    grid = [(eps**rho + i / steps * (T**rho - eps**rho)) ** (1 / rho) for i in range(steps)] + [T]
    x = z
    for i in range(steps):
        t, h = grid[i], grid[i + 1] - grid[i]
        note(record, t, x)
        v = velocity(x, times_like(t, x), label)
        if i < steps - 1:
            v = (v + velocity(x + h * v, times_like(t + h, x), label)) / 2
        x = x + h * v
    note(record, T, x)
    return x, evaluations(2 * steps - 1, z)


def cm_stochastic(velocity, z, label=None, *, steps, noise, eps=1e-3, T=1.0, record=None):
    """Multistep sampling of consistency models (Song et al. 2023) on Euler's grid: jump to data, noise again.

    x1 = x + (1-t_i)·v(x, t_i); x = t_{i+1}·x1 + (1-t_{i+1})·ξ. `noise()` returns fresh ξ, standard normal like z.
    """
    x = z
    for i in range(steps):
        t, t_next = (eps + j / steps * (T - eps) for j in (i, i + 1))
        note(record, t, x)
        x = x + (1 - t) * velocity(x, times_like(t, x), label)
        if t_next < 1:  # at t = 1 the noise has weight 0
            x = t_next * x + (1 - t_next) * noise()
    note(record, T, x)
    return x, evaluations(steps, z)


@torch.no_grad()
def straightness(velocity, z0, label=None, *, steps=100, eps=1e-3, T=1.0):
    """Return Σ_i (1/N)·‖v_i - (x_T - z0)‖₂ of each sample, `(B,)`: 0 for straight ways; the measure is its mean.

    The v_i are those of Euler's rule with N = `steps` (Liu et al. 2022). All of them are held at once:
    `steps` times the memory of z0.
    """
    velocities = []

    def remember(x, t, label):
        velocities.append(velocity(x, t, label))
        return velocities[-1]

    x, _ = euler(remember, z0, label, steps=steps, eps=eps, T=T)
    return sum((v - (x - z0)).flatten(1).norm(dim=1) for v in velocities) / steps


class Trajectories:
    """Points of the ways of samples: pass it as `record`, then read `of(sample)`."""

    def __init__(self):
        self.points = []

    def __call__(self, samples, t, x):
        """Keep states x `(n, ...)` of the sample numbers `(n,)` at times `(n,)`, where they are."""
        self.points.append((samples, t, x.clone()))

    def of(self, sample):
        """Return times `(K,)` and states `(K, ...)` of one sample on the CPU, each time once, in order of the way."""
        found = {}
        for samples, t, x in self.points:
            for row in (samples == sample).nonzero()[:, 0].tolist():
                found[t[row].item()] = x[row].cpu()
        return torch.tensor(list(found), dtype=torch.float64), torch.stack(list(found.values()))


def path_noise(seed, indices, shape, device):
    """Return a function whose n-th call gives noise `(len(indices), *shape)` that belongs to (seed, index, n)."""
    generators = [index_generator(seed, int(index), PATH_NOISE) for index in indices]

    def noise():
        rows = [torch.from_numpy(g.standard_normal(shape, dtype="float32")) for g in generators]
        return torch.stack(rows).to(device)

    return noise


def create_sampler(config, reverse=False, T=1.0, shrink_lanes=False):
    """Return the sampler that `config.sampling` asks for: `sample(velocity, z, label=None, …) -> (x, nfe)`.

    Forward it runs from noise at config.flow.eps to data at T; with `reverse`, from data to noise (euler and rk45).
    T below 1 is for velocities that end before the data, as the closed form does. shrink_lanes: see `rk45_per_sample`.
    `sample` takes any number of samples N, `batch_size` (default config.sampling.batch_size) at a time, and
    further keywords: `indices`, the samples' numbers, which the noise of cm_stochastic belongs to (default 0…N-1);
    `record(rows, t, x)`, e.g. a `Trajectories`; `finished(n)`, told how many more samples are done.
    Raises `UserError` for a sampler that does not exist or does not run in reverse, and for less than one step.
    """
    name, settings = config.sampling.use_ode_sampler, config.sampling
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name, SAMPLERS, n=1, cutoff=0)[0]
        raise UserError(f"sampling.use_ode_sampler is '{name}', did you mean '{near}'? Choices: {', '.join(SAMPLERS)}")
    if reverse and name not in REVERSIBLE:
        raise UserError(f"sampling.use_ode_sampler '{name}' does not run from data to noise; "
                        f"use {' or '.join(REVERSIBLE)}")
    for field, value in (("sample_N", settings.sample_N), ("batch_size", settings.batch_size)):
        if value < 1:
            raise UserError(f"sampling.{field} is {value}; give 1 or more")
    if name == "rk45":
        return _create_rk45(settings, *(T, config.flow.eps) if reverse else (config.flow.eps, T), shrink_lanes)

    steps, ends = settings.sample_N, {"eps": config.flow.eps, "T": T}
    rule = {
        "one_step": functools.partial(one_step, **ends),
        "euler": functools.partial(euler_reverse if reverse else euler, steps=steps, **ends),
        "heun": functools.partial(heun, steps=steps, rho=settings.rho, **ends),
        "cm_stochastic": functools.partial(cm_stochastic, steps=steps, **ends),
    }[name]
    return _create_fixed(rule, settings.batch_size, config.seed if name == "cm_stochastic" else None)


def _create_rk45(settings, t_start, t_end, shrink_lanes):
    """Return `sample` for rk45 with the step control that the config asks for."""
    per_sample = functools.partial(rk45_per_sample, shrink_lanes=shrink_lanes)
    solver = {"sample": per_sample, "batch": rk45_joint}[settings.step_control]

    def sample(velocity, z, label=None, *, indices=None, batch_size=settings.batch_size, record=None, finished=None):
        return solver(velocity, z, label, t_start=t_start, t_end=t_end, tol=settings.ode_tol, lanes=batch_size,
                      max_steps=settings.max_steps, record=record, finished=finished)

    return sample


def _create_fixed(rule, default_batch_size, noise_seed):
    """Return `sample` for a rule with fixed steps, batch by batch; a rule that needs noise has a `noise_seed`."""

    @torch.no_grad()
    def sample(velocity, z, label=None, *, indices=None, batch_size=default_batch_size, record=None, finished=None):
        x, nfe = torch.empty_like(z), torch.zeros(len(z), dtype=torch.int64)
        indices = range(len(z)) if indices is None else indices
        for first in range(0, len(z), batch_size):
            part = slice(first, min(first + batch_size, len(z)))
            extra = {} if noise_seed is None else {
                "noise": path_noise(noise_seed, indices[part], z.shape[1:], z.device)}
            if record:
                extra["record"] = functools.partial(record, torch.arange(part.start, part.stop))
            x[part], nfe[part] = rule(velocity, z[part], None if label is None else label[part], **extra)
            if finished:
                finished(part.stop - part.start)
        return x, nfe

    return sample
