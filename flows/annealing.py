"""Annealing reflow: from fresh noise to the noise of the pairs, over training (arXiv 2407.12718, Annealing Reflow)."""

import math
import re

from runtime.errors import UserError


def anneal(z0, xi, beta):
    """Return z0' = sqrt(1-β²)·z0 + β·ξ: standard normal, as `z0` and `xi` are (arXiv 2407.12718, Annealing Reflow).

    `z0`, `xi`: (N, …); `beta`: float in [0, 1]. β = 0 gives `z0` untouched, β = 1 gives `xi`.
    """
    return z0 if beta == 0 else math.sqrt(1 - beta**2) * z0 + beta * xi


def fixed(r):
    """Return the schedule β(i) = r."""
    return lambda update: r


def linear(n):
    """Return the schedule β(i) = 1 - min(1, i/n)."""
    return lambda update: 1 - min(1.0, update / n)


def exponential(n):
    """Return the schedule β(i) = exp(-i/n)."""
    return lambda update: math.exp(-update / n)


def cosine(n):
    """Return the schedule β(i) = (1 + cos(π·min(1, i/n))) / 2."""
    return lambda update: (1 + math.cos(math.pi * min(1.0, update / n))) / 2


def create_annealing(name):
    """Return the schedule `beta(update) -> float in [0, 1]` that `training.x0_randomness` names.

    `name`: fix_<r>, warmup_<N>, warmup_exp_<N> or warmup_cos_<N>, N in updates. Raises UserError for another name,
    r outside [0, 1] or N below 1.
    """
    schedules = {"fix": fixed, "warmup": linear, "warmup_exp": exponential, "warmup_cos": cosine}
    match = re.fullmatch(r"(fix|warmup|warmup_exp|warmup_cos)_(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+)", name)
    if match is None:
        raise UserError(f"config.training.x0_randomness is {name!r}: use fix_<r>, warmup_<N>, warmup_exp_<N> or "
                        "warmup_cos_<N>")
    kind, number = match[1], float(match[2])
    if kind == "fix" and not 0 <= number <= 1:
        raise UserError(f"config.training.x0_randomness is {name!r}, but r of fix_r must lie in [0, 1]")
    if kind != "fix" and number < 1:
        raise UserError(f"config.training.x0_randomness is {name!r}, but N must be at least one update")
    return schedules[kind](number)
