"""Schedules: the distribution of the training time t, α of the path as a function of t, and β of annealing.

In the names of TIME_SCHEDULES and ANNEALING_SCHEDULES <number> stands for a decimal number and <int> for a positive
integer; both are passed to the row's function as floats.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import torch

from runtime.terminal import UserError

U_SHAPE = 4.0  # a of the density e^{at} + e^{a(1-t)}; arXiv 2405.20320, section 4.1
PLACEHOLDERS = {"<number>": r"(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+)", "<int>": r"([1-9]\d*)"}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A row of a table."""

    function: Callable
    valid: Callable = lambda *numbers: True  # whether the numbers in the name are in range
    rule: str = ""  # that range in words, for the error message


# Times: `function(generator, count, device, low, high, *numbers) -> t`, float32 (count,) in [low, high].


def uniform(generator, count, device, *bounds):
    """Draw t ~ U(low, high), or U(a, b) where a and b follow."""
    low, high = bounds[-2:]
    return torch.rand(count, generator=generator, device=device) * (high - low) + low


def constant(generator, count, device, low, high, tau):
    """Return t = low + τ·(high - low)."""
    return torch.full((count,), low + tau * (high - low), dtype=torch.float32, device=device)


def grid(generator, count, device, low, high, k):
    """Draw t = low + j·(high-low)/k, j uniform in 0..k-1: the start times of k Euler steps."""
    return torch.randint(int(k), (count,), generator=generator, device=device) * ((high - low) / k) + low


def either_end(generator, count, device, low, high):
    """Draw `low` or `high`, with probability 1/2 each."""
    at_end = torch.randint(2, (count,), generator=generator, device=device, dtype=torch.bool)
    return torch.where(at_end, high, low)


def u_shaped(generator, count, device, low, high, a=U_SHAPE):
    """Draw t with density ∝ e^{as} + e^{a(1-s)}, s = (t-low)/(high-low) (arXiv 2405.20320, section 4.1).

    The distribution function 1/2 + sinh(a(s-1/2)) / (2·sinh(a/2)) is inverted here.
    """
    u = torch.rand(count, generator=generator, device=device)
    s = 0.5 + torch.asinh((2 * u - 1) * math.sinh(a / 2)) / a
    return s.clamp(0, 1) * (high - low) + low


def exponential(generator, count, device, low, high, base):
    """Draw t with density ∝ base^{1-s}, s = (t-low)/(high-low) (arXiv 2410.07815, section 3, with base 10).

    The distribution function (1 - base^{-s}) / (1 - 1/base) is inverted here.
    """
    u = torch.rand(count, generator=generator, device=device)
    s = -torch.log1p(u * (1 / base - 1)) / math.log(base)
    return s.clamp(0, 1) * (high - low) + low


TIME_SCHEDULES = {
    "uniform": Schedule(uniform),
    "t0": Schedule(functools.partial(constant, tau=0.0)),
    "t1": Schedule(functools.partial(constant, tau=1.0)),
    "t0t1": Schedule(either_end),
    "u_shaped": Schedule(u_shaped),
    "fix_<number>": Schedule(constant, lambda tau: 0 <= tau <= 1, "τ of fix_τ must lie in [0, 1]"),
    "range_<number>_<number>": Schedule(uniform, lambda a, b: 0 <= a < b <= 1, "it needs 0 <= a < b <= 1"),
    "exp_<number>": Schedule(exponential, lambda base: base > 0 and base != 1, "its base must be positive and not 1"),
    "<int>": Schedule(grid, lambda k: k > 1, "k-step distillation needs an integer k > 1 (one step is t0)"),
}

# α of x_t = α·z1 + (1-α)·z0: `function(t, eps) -> α`, both (N,).
ALPHA_SCHEDULES = {
    "uniform": lambda t, eps: t,
    "t0": lambda t, eps: torch.full_like(t, eps),
    "t1": lambda t, eps: torch.ones_like(t),
}

# β of annealing reflow (arXiv 2407.12718, equation 9): `function(update, n) -> β` in [0, 1], n in updates.
ANNEALING_SCHEDULES = {
    "fix_<number>": Schedule(lambda update, r: r, lambda r: 0 <= r <= 1, "r of fix_r must lie in [0, 1]"),
    "warmup_<int>": Schedule(lambda update, n: 1 - min(1.0, update / n)),
    "warmup_exp_<int>": Schedule(lambda update, n: math.exp(-update / n)),
    "warmup_cos_<int>": Schedule(lambda update, n: (1 + math.cos(math.pi * min(1.0, update / n))) / 2),
}


def create_time_schedule(name):
    """Return the schedule `draw(generator, count, device, low, high) -> t (count,)` of a flow.flow_t_schedule."""
    return find_schedule(TIME_SCHEDULES, "flow.flow_t_schedule", str(name))


def create_annealing(name):
    """Return the schedule `beta(update) -> float in [0, 1]` of a training.x0_randomness."""
    return find_schedule(ANNEALING_SCHEDULES, "training.x0_randomness", name)


def name_pattern(name):
    """Return the regular expression of the names that `name`, with its <number> and <int>, stands for."""
    return functools.reduce(lambda text, item: text.replace(*item), PLACEHOLDERS.items(), re.escape(name))


def find_schedule(table, field, name):
    """Return the function of the row that `name` matches, with the numbers in `name` as its last arguments.

    Raises UserError for a name that is not in the table, or whose numbers are out of range.
    """
    for pattern, row in table.items():
        if match := re.fullmatch(name_pattern(pattern), name):
            numbers = [float(number) for number in match.groups()]
            if not row.valid(*numbers):
                raise UserError(f"config.{field} is {name!r}, but {row.rule}")
            return lambda *arguments: row.function(*arguments, *numbers)
    raise UserError(f"config.{field} is {name!r}: use one of {', '.join(table)}")
