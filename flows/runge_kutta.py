"""Adaptive integration: Dormand-Prince 5(4) on the device, each sample with its own steps or all with one.

The pair of formulas is of Dormand and Prince (1980); the control law is that of Hairer, Nørsett and Wanner,
"Solving Ordinary Differential Equations I", section II.4, as `scipy.integrate.RK45` has it: root-mean-square error
norm, safety factor 0.9, step factors between 0.2 and 10, none above 1 after a refused step, automatic first step.
`StepControl` says where the steps of single samples differ from it.

What decides a step is computed in operations that IEEE 754 rounds correctly (+ - × ÷ √), so a sample's steps follow
from its states alone. The states come from the network: they are the same to the last bit with the same number of slots
and threads on the same instruction set, and up to rounding otherwise, since a network's rows are then rounded
differently (with 3 or 6 threads even in one batch).
"""

import dataclasses
from collections.abc import Callable

import torch

from flows.rectified_flow import per_sample
from runtime.errors import UserError

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

START_EVALUATIONS = 2  # the first slope, and one more to choose the first step
STEP_EVALUATIONS = 6  # of every attempted step, accepted or not
SAFETY, SMALLEST_FACTOR, LARGEST_FACTOR = 0.9, 0.2, 10.0
ROOTS_OF_2 = (1.148698354997035, 1.3195079107728942, 1.515716566510398, 1.7411011265922482)  # 2^(r/5), r = 1..4
SMALLEST_STEP = 10 * torch.finfo(torch.float64).eps

# What a slot reports after a step.
RUNNING, FINISHED, VANISHED, NOT_FINITE = range(4)


@dataclasses.dataclass
class Slots:
    """B samples in integration, each at its own time: everything that one step hands to the next.

    x and slope (the velocity there) `(B, ...)` float64; t and h (size of the next step, positive) `(B,)` float64;
    refused `(B,)` bool: the last attempt was; label `(B, K)` or None.
    """

    x: torch.Tensor
    slope: torch.Tensor
    t: torch.Tensor
    h: torch.Tensor
    refused: torch.Tensor
    label: torch.Tensor | None

    def refill(self, places, source, rows):
        """Put the samples in `rows` of the slots `source` into the slots `places` (int64 tensors on the device)."""
        for name, tensor in vars(self).items():
            if tensor is not None:
                tensor.index_copy_(0, places, getattr(source, name)[rows])


def per_sample_norm(mean_squares):
    """Error norm per sample, `(B,)`, of mean squares per sample: every sample is stepped on its own."""
    return mean_squares.sqrt()


def joint_norm(mean_squares):
    """One error norm for all, `(B,)`: the batch is stepped as if it were one long vector."""
    return mean_squares.mean().sqrt().expand_as(mean_squares)


def chosen_step(h, to_go):
    """Take the step h `(B,)` as it was chosen; the last one is cut."""
    return h


def split_last_step(h, to_go):
    """Return h `(B,)`, or 0.65 of what is left where that is less than h, so that no tiny step remains at the end.

    The longer part comes first: velocities of 1-flows change fastest near the data, where two halves would be refused
    more often.
    """
    return torch.where((h < to_go) & (0.65 * to_go < h), 0.65 * to_go, h)


@dataclasses.dataclass(frozen=True)
class StepControl:
    """How a step follows from the error of the one before: by an integral controller, at all tolerances.

    norm: whose errors count together; a step is accepted with an error e below 1, in units of the tolerance
    gain: the integral gain k of h ← 0.9·e^(-k/5)·h after an accepted step (after a refused one k is 1): 1 or 1/2
    fit: `fit(h, to_go)` has the last word on each step
    """

    norm: Callable
    gain: float
    fit: Callable


JOINT = StepControl(joint_norm, gain=1.0, fit=chosen_step)  # scipy's
# Half the gain (Söderlind, "Automatic control and adaptive time-stepping", Numerical Algorithms 31, 2002, section 4:
# k in (0, 1] trades speed for smoothness): the error of a single sample is a noisier guide than that of a batch, and
# the velocity of a network is rough on the scale of a step, so a slower controller refuses fewer steps and leaves
# smaller errors. Measured by benchmarks/ode.py.
PER_SAMPLE = StepControl(per_sample_norm, gain=0.5, fit=split_last_step)


def on_device(numbers, device):
    """Return a list of integers as a tensor on `device`; the host does not wait for the copy."""
    numbers = torch.tensor(numbers)
    if device.type == "cuda":
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)


def inverse_fifth_root(x):
    """Return `x ** (-1/5)` of a positive float64 `(B,)` tensor: the same bits in every place and on every processor.

    A vectorised `pow` treats the last few entries of a tensor differently, so a sample's step would depend on its
    slot. Here only operations are used that IEEE 754 rounds correctly: with x = m·2^(5q - r), m in [0.5, 1), Newton's
    iteration y ← y(6 - m·y⁵)/5 finds m^(-1/5). Relative error 3e-15; 0 and infinity are taken as 1e±300.
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


def mean_square(x):
    """Mean over everything but the slots: `(B, ...)` to `(B,)`."""
    return x.square().flatten(1).mean(1)


def weighted_sum(weights, tensors):
    """Sum of weight·tensor in the order given: each product and sum is rounded alike in every slot."""
    first, *others = [weight * tensor for weight, tensor in zip(weights, tensors, strict=True) if weight]
    return sum(others, first)


def start_slots(velocity, z, label, t_start, t_end, tol, control):
    """Return `Slots` at `t_start` with slope and first step, for samples `z` `(B, ...)`: two evaluations.

    The first step is that of Hairer, Nørsett and Wanner: small enough that an explicit Euler step changes neither
    the state nor the slope by much.
    """
    direction = 1.0 if t_end > t_start else -1.0
    x = z.to(torch.float64)
    t = torch.full((len(z),), t_start, dtype=torch.float64, device=z.device)

    def slope_at(x, t):
        return velocity(x.to(z.dtype), t.to(z.dtype), label).to(torch.float64)

    slope = slope_at(x, t)
    scale = tol + x.abs() * tol
    d0, d1 = control.norm(mean_square(x / scale)), control.norm(mean_square(slope / scale))
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp(max=abs(t_end - t_start))
    slope_1 = slope_at(x + per_sample(direction * h0, x) * slope, t + direction * h0)
    d2 = control.norm(mean_square((slope_1 - slope) / scale)) / h0
    steepest = torch.maximum(d1, d2)
    h1 = torch.where(steepest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), inverse_fifth_root(steepest / 0.01))
    h = torch.minimum(100 * h0, h1).clamp(max=abs(t_end - t_start))
    return Slots(x, slope, t, h, torch.zeros_like(t, dtype=torch.bool), label)


def attempt_step(velocity, slots, t_end, tol, control, dtype):
    """Attempt one step of every slot towards `t_end`: six evaluations at `(B, ...)` in `dtype`.

    Returns the new `Slots` and an int8 tensor `(B,)` of RUNNING, FINISHED, VANISHED (a refused step that cannot
    shrink) or NOT_FINITE (the same, because the velocity is not finite). Finished slots stay as they are.
    """
    x, t = slots.x, slots.t
    to_go = t_end - t
    h = control.fit(slots.h, to_go.abs())
    last = h >= to_go.abs()
    h = torch.where(last, to_go, torch.copysign(h, to_go))
    h_x = per_sample(h, x)
    slopes = [slots.slope]
    for time, weights in zip(STAGE_TIMES, STAGE_WEIGHTS, strict=True):
        x_new = x + h_x * weighted_sum(weights, slopes)
        stage = velocity(x_new.to(dtype), (t + time * h).to(dtype), slots.label)
        slopes.append(stage.to(torch.float64))

    scale = tol + torch.maximum(x.abs(), x_new.abs()) * tol
    own_error = mean_square(h_x * weighted_sum(ERROR_WEIGHTS, slopes) / scale)
    error = control.norm(own_error)
    accepted = error < 1
    root = inverse_fifth_root(error)
    factor = SAFETY * torch.where(accepted, root if control.gain == 1 else root.sqrt(), root)
    factor = factor.clamp(SMALLEST_FACTOR, LARGEST_FACTOR)
    factor = torch.where(slots.refused & accepted, factor.clamp(max=1), factor)
    factor = torch.where(error.isfinite(), factor, SMALLEST_FACTOR)

    keep_x = per_sample(accepted, x)
    t_new = torch.where(accepted, torch.where(last, t_end, t + h), t)
    h_next = h.abs() * factor
    finished = t_new == t_end
    vanished = ~finished & ~(h_next >= SMALLEST_STEP) & ~(own_error < 1)  # negated: true of NaN, too
    status = FINISHED * finished + torch.where(own_error.isfinite(), VANISHED, NOT_FINITE) * vanished
    return Slots(
        x=torch.where(keep_x, x_new, x), slope=torch.where(keep_x, slopes[-1], slots.slope), t=t_new, h=h_next,
        refused=~accepted, label=slots.label,
    ), status.to(torch.int8)


def read_status(status):
    """Return the slots' status as a list: the one read from the device per step."""
    return status.tolist()


def check_status(statuses, samples, steps, max_steps, slots):
    """Raise `UserError` naming sample and time if a slot failed, or took `max_steps` steps without arriving.

    `samples` holds each slot's sample number (None: the slot is idle), `steps` the steps it has taken.
    """
    problems = (
        (NOT_FINITE, 0, "the velocity is not finite; check the checkpoint's weights"),
        (VANISHED, 0, "the step size shrank to nothing: the velocity jumps there, or sampling.ode_tol is too small"),
        (RUNNING, max_steps, f"{max_steps} steps were not enough; raise sampling.max_steps or sampling.ode_tol"),
    )
    for problem, least_steps, words in problems:
        for slot, sample in enumerate(samples):
            if sample is not None and statuses[slot] == problem and steps[slot] >= least_steps:
                raise UserError(f"rk45, sample {sample} at t = {slots.t[slot].item():.6g}: {words}")


class Queue:
    """The samples that wait for a slot, in their order.

    They are prepared (first slope, first step) as many at a time as there are slots, so that these evaluations are
    as full as all others; behind the last sample its copies fill the rows.
    """

    def __init__(self, velocity, z, label, t_start, t_end, tol, slots, control):
        self.velocity, self.z, self.label = velocity, z, label
        self.start = (t_start, t_end, tol, control)
        self.slots, self.taken = slots, 0

    def prepare(self):
        """Return the next `slots` samples as `Slots`."""
        first = self.taken
        rows = torch.arange(first, first + self.slots, device=self.z.device).clamp(max=len(self.z) - 1)
        label = None if self.label is None else self.label[rows]
        return start_slots(self.velocity, self.z[rows], label, *self.start)

    def first(self):
        """Return slots with the first samples, and each slot's sample number (None where there is none)."""
        self.block = self.prepare()
        self.taken = min(self.slots, len(self.z))
        # Steps make new tensors, but carry the label on, and a refill writes into it.
        label = None if self.label is None else self.block.label.clone()
        samples = [slot if slot < self.taken else None for slot in range(self.slots)]
        return dataclasses.replace(self.block, label=label), samples

    def refill(self, state, samples, free):
        """Put the next samples, while there are any, into the slots numbered in `free`; `samples` learns of it."""
        while free and self.taken < len(self.z):
            row = self.taken % self.slots
            if row == 0:
                self.block = self.prepare()
            now, free = free[: self.slots - row], free[self.slots - row :]
            now = now[: len(self.z) - self.taken]
            rows = torch.arange(row, row + len(now), device=self.z.device)
            state.refill(on_device(now, self.z.device), self.block, rows)
            for slot in now:
                samples[slot], self.taken = self.taken, self.taken + 1


def drop_idle_slots(state, samples, steps, slots):
    """Return state, samples and steps with no more idle slots than fill up an eighth of `slots`.

    In eighths, so that a network meets few batch sizes.
    """
    busy = [slot for slot, sample in enumerate(samples) if sample is not None]
    eighth = max(1, slots // 8)
    width = -(-len(busy) // eighth) * eighth
    if not busy or width >= len(samples):
        return state, samples, steps
    idle = [slot for slot, sample in enumerate(samples) if sample is None]
    kept = (busy + idle)[:width]
    places = on_device(kept, state.t.device)
    narrow = {name: None if tensor is None else tensor[places] for name, tensor in vars(state).items()}
    return Slots(**narrow), [samples[slot] for slot in kept], [steps[slot] for slot in kept]


@torch.no_grad()
def rk45_per_sample(velocity, z, label=None, *, t_start=1e-3, t_end=1.0, tol=1e-5, slots=64, max_steps=10000,
                    control=PER_SAMPLE, record=None, finished=None, shrink_slots=False):
    """Integrate dx/dt = velocity(x, t, label) from `z` `(N, ...)` at `t_start` to `t_end`, each sample on its own.

    N samples flow through `slots` slots: a slot whose sample is finished takes the next one waiting, so that every
    evaluation has exactly `slots` rows (idle ones at the end are computed and ignored), and a sample's steps do not
    depend on N, on its neighbours or on the order; nor does its result, to the last bit, where the network rounds all
    rows of a batch alike. With `shrink_slots` idle slots are given up, in eighths of all, when no sample waits: fewer
    rows are computed, but the rounding of the last samples then depends on all of z.

    velocity: takes x `(slots, ...)`, t `(slots,)` and label `(slots, K)` or None, in the dtype of z; the state is
    float64. tol is both rtol and atol, on the root mean square over a sample. `record(samples, t, x)`, if given, sees
    sample numbers `(n,)`, times `(n,)` and states `(n, ...)` at the start and after every step.
    `finished(n)` is told how many more samples are done, for a progress bar.
    Returns x `(N, ...)` like z and the number of evaluations of each sample, int64 `(N,)` on the CPU, counted as
    scipy does. Raises `UserError` naming sample and time for a velocity that is not finite, a step that shrinks
    to nothing and more than `max_steps` steps.
    """
    x, nfe = torch.empty_like(z), torch.zeros(len(z), dtype=torch.int64)
    if len(z) == 0:
        return x, nfe
    queue = Queue(velocity, z, label, t_start, t_end, tol, slots, control)
    state, samples = queue.first()
    steps = [0] * slots

    def record_slots(chosen):
        places = on_device(chosen, z.device)
        record(torch.tensor([samples[slot] for slot in chosen]), state.t[places], state.x[places])

    while busy := [slot for slot, sample in enumerate(samples) if sample is not None]:
        if record:
            record_slots(busy)
        state, status = attempt_step(velocity, state, t_end, tol, control, z.dtype)
        steps = [taken + 1 for taken in steps]
        statuses = read_status(status)
        check_status(statuses, samples, steps, max_steps, state)
        done = [slot for slot in busy if statuses[slot] == FINISHED]
        if not done:
            continue
        if record:
            record_slots(done)
        numbers = [samples[slot] for slot in done]
        x[on_device(numbers, z.device)] = state.x[on_device(done, z.device)].to(x.dtype)
        for slot, number in zip(done, numbers, strict=True):
            nfe[number] = START_EVALUATIONS + STEP_EVALUATIONS * steps[slot]
            samples[slot], steps[slot] = None, 0
        queue.refill(state, samples, done)
        if shrink_slots and queue.taken == len(z):
            state, samples, steps = drop_idle_slots(state, samples, steps, slots)
        if finished:
            finished(len(done))
    return x, nfe


@torch.no_grad()
def rk45_joint(velocity, z, label=None, *, t_start=1e-3, t_end=1.0, tol=1e-5, slots=64, max_steps=10000,
               control=JOINT, record=None, finished=None):
    """Integrate as `rk45_per_sample` does, but with one step size for each batch of `slots` samples.

    This is what scipy's RK45 does on the flattened batch, and what the released code uses; a sample's result
    depends on its batch.
    """
    x, nfe = torch.empty_like(z), torch.zeros(len(z), dtype=torch.int64)
    for first in range(0, len(z), slots):
        part = slice(first, min(first + slots, len(z)))
        samples, rows = range(part.start, part.stop), torch.arange(part.start, part.stop)
        own_label = None if label is None else label[part]
        state = start_slots(velocity, z[part], own_label, t_start, t_end, tol, control)
        statuses, steps = [RUNNING], 0
        while statuses[0] != FINISHED:
            if record:
                record(rows, state.t, state.x)
            state, status = attempt_step(velocity, state, t_end, tol, control, z.dtype)
            steps += 1
            statuses = read_status(status)
            check_status(statuses, samples, [steps] * len(samples), max_steps, state)
        if record:
            record(rows, state.t, state.x)
        x[part] = state.x.to(x.dtype)
        nfe[part] = START_EVALUATIONS + STEP_EVALUATIONS * steps
        if finished:
            finished(len(samples))
    return x, nfe


def rk45(velocity, z, label=None, *, step_control="sample", shrink_slots=False, **options):
    """Integrate by `rk45_per_sample`, or with `step_control` "batch" by `rk45_joint`; `options` are those of both."""
    if step_control == "batch":
        return rk45_joint(velocity, z, label, **options)
    return rk45_per_sample(velocity, z, label, shrink_slots=shrink_slots, **options)
