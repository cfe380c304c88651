"""Adaptive integration: Dormand-Prince 5(4) on the device, with step sizes per sample or one step size per batch.

The pair of formulas is that of Dormand and Prince (1980); the step-size control is that of Hairer, Nørsett and Wanner,
"Solving Ordinary Differential Equations I", section II.4, as in `scipy.integrate.RK45`: root-mean-square error norm,
safety factor 0.9, step factors between 0.2 and 10, none above 1 after a rejected step, automatic first step.
With one step size per batch (`joint`) this is scipy's control of the flattened batch, which the released code uses.
Per sample it differs in two ways, both measured by benchmarks/ode.py. The gain is halved (Söderlind, "Automatic
control and adaptive time-stepping", Numerical Algorithms 31, 2002, section 4): the error of one sample is noisier than
that of a batch, and a slower controller rejects fewer steps and leaves smaller errors. And instead of a tiny last step
the rest is split in two, the longer part first, since velocities of 1-flows change fastest near the data.

Step sizes are computed with operations that IEEE 754 rounds correctly (+ - × ÷ √), so a sample's steps depend on its
states alone. The states come from the network: they are bit-identical with the same number of slots and threads on the
same instruction set, and equal up to rounding otherwise, since a network then rounds its rows differently (with 3 or 6
threads even within one batch).
"""

from typing import NamedTuple

import torch

from flows.rectified_flow import per_sample
from runtime.terminal import UserError

# Stage times, stage weights (the last row is the fifth-order solution: first same as last), and the weights of
# the difference to the embedded fourth-order solution.
STAGE_TIMES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
STAGE_WEIGHTS = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR_WEIGHTS = (-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)

SAFETY, SMALLEST_FACTOR, LARGEST_FACTOR = 0.9, 0.2, 10.0
ROOTS_OF_2 = (1.148698354997035, 1.3195079107728942, 1.515716566510398, 1.7411011265922482)  # 2^(r/5), r = 1..4
SMALLEST_STEP = 10 * torch.finfo(torch.float64).eps

FINISHED, RUNNING, VANISHED = range(3)  # status of a slot after a step; VANISHED: rejected and too small to shrink


class Slots(NamedTuple):
    """The state of B samples in integration, each at its own time.

    x and slope (the velocity there) `(B, ...)` float64; t and h (size of the next step, positive) `(B,)` float64;
    rejected `(B,)` bool: whether the last attempted step was; label `(B, K)` or None.
    """

    x: torch.Tensor
    slope: torch.Tensor
    t: torch.Tensor
    h: torch.Tensor
    rejected: torch.Tensor
    label: torch.Tensor | None

    def take(self, rows):
        """Return the slots with the numbers `rows`, a slice or an int64 tensor on the device."""
        return Slots(*(None if tensor is None else tensor[rows] for tensor in self))

    def put(self, places, others):
        """Return these slots with those at `places`, an int64 tensor on the device, replaced by `others`."""
        return Slots(*(None if old is None else old.index_copy(0, places, new)
                       for old, new in zip(self, others, strict=True)))


def on_device(numbers, device):
    """Return a list of integers as a tensor on `device`; the host does not wait for the copy."""
    numbers = torch.tensor(numbers)
    return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)


def inverse_fifth_root(x):
    """Return `x ** (-1/5)` of a positive float64 `(B,)` tensor: the same bits at every index and on every processor.

    (A vectorised `pow` treats the last few entries of a tensor differently, so a sample's step would depend on its
    slot.) With x = m·2^(5q - r), m in [0.5, 1), Newton's iteration y ← y(6 - m·y⁵)/5 finds m^(-1/5). The relative
    error is 3e-15; x is clamped to [1e-300, 1e300].
    """
    m, exponent = torch.frexp(x.clamp(1e-300, 1e300))
    exponent = exponent.to(torch.int64)
    q = torch.div(exponent + 4, 5, rounding_mode="floor")
    y = torch.full_like(m, 1.07)
    for _ in range(5):
        power_5 = y * y * y * y * y
        y = y * (6 - m * power_5) / 5
    root_of_2 = torch.ones_like(m)  # 2^(r/5), r = 5q - exponent in 0..4
    for r, root in enumerate(ROOTS_OF_2, start=1):
        root_of_2 = torch.where(5 * q - exponent == r, root, root_of_2)
    return y * root_of_2 * ((1023 - q) << 52).view(torch.float64)


def error_norm(x, joint):
    """Return the root mean square `(B,)` of each sample `(B, ...)`, or with `joint` of the whole batch."""
    squares = x.square().flatten(1).mean(1)
    return (squares.mean().expand_as(squares) if joint else squares).sqrt()


def weighted_sum(weights, tensors):
    """Return the sum of weight·tensor in the given order, so that it is rounded alike in every slot."""
    first, *others = [weight * tensor for weight, tensor in zip(weights, tensors, strict=True) if weight]
    return sum(others, first)


def start_slots(velocity, z, label, t_start, t_end, tol, joint):
    """Return `Slots` at `t_start` with slope and first step, for samples `z` `(B, ...)`: two evaluations.

    The first step is that of Hairer, Nørsett and Wanner: an explicit Euler step of this size changes neither the state
    nor the slope by much.
    """
    direction = 1.0 if t_end > t_start else -1.0
    x = z.to(torch.float64)
    t = torch.full((len(z),), t_start, dtype=torch.float64, device=z.device)

    def slope_at(x, t):
        return velocity(x.to(z.dtype), t.to(z.dtype), label).to(torch.float64)

    slope = slope_at(x, t)
    scale = tol + x.abs() * tol
    d0, d1 = (error_norm(tensor / scale, joint) for tensor in (x, slope))
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp(max=abs(t_end - t_start))
    slope_1 = slope_at(x + per_sample(direction * h0, x) * slope, t + direction * h0)
    d2 = error_norm((slope_1 - slope) / scale, joint) / h0
    steepest = torch.maximum(d1, d2)
    h1 = torch.where(steepest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), inverse_fifth_root(steepest / 0.01))
    h = torch.minimum(100 * h0, h1).clamp(max=abs(t_end - t_start))
    return Slots(x, slope, t, h, torch.zeros_like(t, dtype=torch.bool), label)


def attempt_step(velocity, slots, t_end, tol, joint, dtype):
    """Attempt one step of every slot towards `t_end`, with six evaluations at `(B, ...)` in `dtype`.

    Returns the new `Slots` and the status of each, FINISHED, RUNNING or VANISHED, `(B,)`; finished slots do not change.
    """
    x, t, h = slots.x, slots.t, slots.h
    to_go = t_end - t
    if not joint:
        h = torch.where((h < to_go.abs()) & (0.65 * to_go.abs() < h), 0.65 * to_go.abs(), h)
    last = h >= to_go.abs()
    h = torch.where(last, to_go, torch.copysign(h, to_go))
    h_x = per_sample(h, x)
    slopes = [slots.slope]
    for time, weights in zip(STAGE_TIMES, STAGE_WEIGHTS, strict=True):
        x_new = x + h_x * weighted_sum(weights, slopes)
        stage = velocity(x_new.to(dtype), (t + time * h).to(dtype), slots.label)
        slopes.append(stage.to(torch.float64))

    scale = tol + torch.maximum(x.abs(), x_new.abs()) * tol
    scaled = h_x * weighted_sum(ERROR_WEIGHTS, slopes) / scale
    error = error_norm(scaled, joint)
    accepted = error < 1
    root = inverse_fifth_root(error)
    factor = SAFETY * torch.where(accepted, root if joint else root.sqrt(), root)
    factor = factor.clamp(SMALLEST_FACTOR, LARGEST_FACTOR)
    factor = torch.where(slots.rejected & accepted, factor.clamp(max=1), factor)
    factor = torch.where(error.isfinite(), factor, SMALLEST_FACTOR)

    keep_x = per_sample(accepted, x)
    t_new = torch.where(accepted, torch.where(last, t_end, t + h), t)
    h_next = h.abs() * factor
    vanished = ~(h_next >= SMALLEST_STEP) & ~(error_norm(scaled, joint=False) < 1)  # negated, to be true for NaN
    status = torch.where(t_new == t_end, FINISHED, torch.where(vanished, VANISHED, RUNNING))
    return Slots(x=torch.where(keep_x, x_new, x), slope=torch.where(keep_x, slopes[-1], slots.slope), t=t_new,
                 h=h_next, rejected=~accepted, label=slots.label), status


@torch.no_grad()
def rk45(velocity, z, label=None, *, t_start=1e-3, t_end=1.0, tol=1e-5, step_control="sample", slots=64,
         max_steps=10000, shrink_slots=False, finished=None):
    """Integrate dx/dt = velocity(x, t, label) from `z` `(N, ...)` at `t_start` to `t_end`.

    With `step_control` "sample" each sample has its own steps. The N samples share `slots` slots: a slot whose sample
    is finished takes the next waiting one, so every evaluation has exactly `slots` rows (idle ones at the end are
    computed and ignored). A sample's steps then do not depend on N, on its neighbours or on the order; nor does its
    result, to the last bit, where the network rounds all rows of a batch alike. With `shrink_slots` idle slots are
    dropped, in eighths of all, once no sample is waiting: fewer rows are computed, but the rounding of the last samples
    depends on all of z. With `step_control` "batch" each batch of `slots` samples has one step size, and a sample's
    result depends on its batch.

    velocity: takes x `(slots, ...)`, t `(slots,)` and label `(slots, K)` or None, in the dtype of z; the state is
    float64. tol is both rtol and atol, on the root mean square over a sample (or batch). `finished(n)` is called when
    n more samples are done.
    Returns x `(N, ...)` like z and the number of evaluations of each sample, int64 `(N,)` on the CPU, counted as
    scipy does. Raises UserError, naming sample and time, if no step is small enough (as for a velocity that is not
    finite) or after `max_steps` steps.
    """
    joint, eighth = step_control == "batch", max(1, slots // 8)
    x, steps = torch.empty_like(z), [0] * len(z)
    samples, free, taken = [None] * slots, list(range(slots)), 0  # samples: their numbers, None in idle slots
    while True:
        # Refill free slots. Samples are started `slots` at a time, so that these evaluations have as many rows as all
        # others; copies of the last sample fill the remaining rows.
        while free and taken < len(z):
            row = taken % slots
            if row == 0:
                rows = torch.arange(taken, taken + slots, device=z.device)
                rows = rows[: len(z) - taken] if joint else rows.clamp(max=len(z) - 1)
                waiting = start_slots(velocity, z[rows], None if label is None else label[rows], t_start, t_end, tol,
                                      joint)
            filled, free = free[: min(slots - row, len(z) - taken)], free[slots - row :]
            if joint or taken == 0:
                state = waiting
            else:
                state = state.put(on_device(filled, z.device), waiting.take(slice(row, row + len(filled))))
            for slot in filled:
                samples[slot], taken = taken, taken + 1
        busy = [slot for slot, sample in enumerate(samples) if sample is not None]
        if not busy:
            return x, 2 + 6 * torch.tensor(steps, dtype=torch.int64)  # two of `start_slots`, six an attempted step
        # Once samples have finished and none is waiting, keep only as many slots as round the busy ones up to an eighth
        # of all: so a network sees few batch sizes.
        width = -(-len(busy) // eighth) * eighth
        if shrink_slots and not joint and taken == len(z) > len(busy) and width < len(samples):
            kept = (busy + [slot for slot, sample in enumerate(samples) if sample is None])[:width]
            state, samples = state.take(on_device(kept, z.device)), [samples[slot] for slot in kept]
            busy = list(range(len(busy)))

        state, status = attempt_step(velocity, state, t_end, tol, joint, z.dtype)
        statuses = status.tolist()  # the one read from the device per step
        for slot in busy:
            steps[samples[slot]] += 1
        worst = max(busy, key=lambda slot: (statuses[slot], steps[samples[slot]]))
        problem = None
        if statuses[worst] == VANISHED:
            problem = ("the velocity is not finite or jumps, so that no step is small enough; check the checkpoint's "
                       "weights, or raise sampling.ode_tol")
        elif statuses[worst] == RUNNING and steps[samples[worst]] >= max_steps:
            problem = f"{max_steps} steps were not enough; raise sampling.max_steps or sampling.ode_tol"
        if problem:
            raise UserError(f"rk45, sample {samples[worst]} at t = {state.t[worst].item():.6g}: {problem}")
        free = [slot for slot in busy if statuses[slot] == FINISHED]
        if free:
            numbers = [samples[slot] for slot in free]
            x[on_device(numbers, z.device)] = state.x[on_device(free, z.device)].to(x.dtype)
            for slot in free:
                samples[slot] = None
            if finished:
                finished(len(free))
