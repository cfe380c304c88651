"""Distributions of the training time t (`flow.flow_t_schedule`) and the place on the path (`flow.flow_alpha_t`).

A time schedule is a function `draw(generator, count, device) -> t`, float32 (count,) in [eps, 1].
"""

import math
import re

import torch

from runtime.errors import UserError

U_SHAPE = 4.0  # a of density e^{at} + e^{a(1-t)}; arXiv 2405.20320, section 4.1


def uniform(low, high):
    """Return the schedule t ~ U(low, high)."""

    def draw(generator, count, device):
        return torch.rand(count, generator=generator, device=device) * (high - low) + low

    return draw


def constant(time):
    """Return the schedule of the one time `time`."""

    def draw(generator, count, device):
        return torch.full((count,), time, dtype=torch.float32, device=device)

    return draw


def grid(low, high, k):
    """Return the schedule t = low + j·(high-low)/k, j uniform in 0..k-1: the start times of k Euler steps."""

    def draw(generator, count, device):
        return torch.randint(k, (count,), generator=generator, device=device) * ((high - low) / k) + low

    return draw


def either_end(low, high):
    """Return the schedule of `low` and `high`, with probability 1/2 each, each sample on its own."""

    def draw(generator, count, device):
        at_end = torch.randint(2, (count,), generator=generator, device=device, dtype=torch.bool)
        return torch.where(at_end, high, low)

    return draw


def u_shaped(low, high, a=U_SHAPE):
    """Return the schedule with density ∝ e^{as} + e^{a(1-s)}, s = (t-low)/(high-low) (arXiv 2405.20320, section 4.1).

    Its distribution function is 1/2 + sinh(a(s-1/2)) / (2·sinh(a/2)), inverted here.
    """

    def draw(generator, count, device):
        u = torch.rand(count, generator=generator, device=device)
        s = 0.5 + torch.asinh((2 * u - 1) * math.sinh(a / 2)) / a
        return s.clamp(0, 1) * (high - low) + low

    return draw


def exponential(low, high, base):
    """Return the schedule with density ∝ base^{1-s}, s = (t-low)/(high-low): for base > 1 more often near the noise.

    Simple ReFlow (arXiv 2410.07815, section 3) weighs its times so, with base 10; there time runs from data to
    noise. The distribution function (1 - base^{-s}) / (1 - 1/base) is inverted here.
    """

    def draw(generator, count, device):
        u = torch.rand(count, generator=generator, device=device)
        s = -torch.log1p(u * (1 / base - 1)) / math.log(base)
        return s.clamp(0, 1) * (high - low) + low

    return draw


def create_time_schedule(name, eps, end=1.0):
    """Return the schedule `draw(generator, count, device) -> t (count,)` that `flow.flow_t_schedule` names.

    `name`: uniform, t0, t1, t0t1, u_shaped, exp_<base>, fix_<τ>, range_<a>_<b>, or k > 1 for k-step distillation.
    Raises UserError for another name, or one whose numbers are out of range.
    """
    named = {
        "uniform": lambda: uniform(eps, end),
        "t0": lambda: constant(eps),
        "t1": lambda: constant(end),
        "t0t1": lambda: either_end(eps, end),
        "u_shaped": lambda: u_shaped(eps, end),
    }
    if name in named:
        return named[name]()
    kind, numbers = _split(str(name))
    if kind == "fix" and len(numbers) == 1:
        _require(0 <= numbers[0] <= 1, name, "τ of fix_τ must lie in [0, 1]")
        return constant(eps + numbers[0] * (end - eps))
    if kind == "range" and len(numbers) == 2:
        low, high = numbers
        _require(0 <= low < high <= end, name, f"range_a_b needs 0 <= a < b <= {end:g}")
        return uniform(low, high)
    if kind == "exp" and len(numbers) == 1:
        _require(numbers[0] > 0 and numbers[0] != 1, name, "the base of exp_<base> must be positive and not 1")
        return exponential(eps, end, numbers[0])
    if kind == "" and len(numbers) == 1 and numbers[0].is_integer():
        _require(numbers[0] > 1, name, "k-step distillation needs an integer k > 1 (one step is t0)")
        return grid(eps, end, int(numbers[0]))
    raise UserError(f"config.flow.flow_t_schedule is {name!r}: use uniform, t0, t1, t0t1, u_shaped, exp_<base>, "
                    "fix_<τ>, range_<a>_<b> or an integer k > 1")


def create_path_place(name, eps, end=1.0):
    """Return the function from times t (N,) to places a (N,) on the path that `flow.flow_alpha_t` names.

    `uniform`: a = t; `t0`: a = eps; `t1`: a = 1. Raises UserError for another name.
    """
    places = {
        "uniform": lambda t: t,
        "t0": lambda t: torch.full_like(t, eps),
        "t1": lambda t: torch.full_like(t, end),
    }
    if name not in places:
        raise UserError(f"config.flow.flow_alpha_t is {name!r}: use one of {', '.join(places)}")
    return places[name]


def _split(name):
    """Split "range_0.2_0.8" into its word and its numbers; the word is None where that is not its form."""
    number = r"\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+"
    match = re.fullmatch(rf"([a-z]*?)_?({number})(?:_({number}))?", name)
    if match is None:
        return None, []
    return match[1], [float(n) for n in match.groups()[1:] if n is not None]


def _require(holds, name, rule):
    if not holds:
        raise UserError(f"config.flow.flow_t_schedule is {name!r}, but {rule}")
