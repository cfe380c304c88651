"""What a user adds to the tables of flows/ from outside: `prepare` of tests.processes runs it before a script."""

from flows import losses, samplers, schedules


def midpoint(velocity, z, label=None, *, steps, t_start=1e-3, t_end=1.0):
    """The midpoint rule."""
    x, h = z, (t_end - t_start) / steps
    for i in range(steps):
        t = t_start + i * h
        half = x + h / 2 * velocity(x, samplers.times_like(t, x), label)
        x = x + h * velocity(half, samplers.times_like(t + h / 2, x), label)
    return x, 2 * steps


def add_midpoint():
    """Add a sampler."""
    samplers.SAMPLERS["midpoint"] = samplers.Sampler(midpoint, {"sample_N": "steps"})


def cubed(v, point):
    """The mean of |v - (z1 - z0)|³."""
    return losses.mean((v.float() - point.target).abs() ** 3)


def halves(generator, count, device, low, high, k):
    """The time low + (high-low)/2^k."""
    return schedules.constant(generator, count, device, low, high, tau=2.0**-k)


def add_loss():
    """Add a distance, a weight and a time schedule."""
    losses.DISTANCES["cubed"] = losses.Distance(cubed)
    losses.WEIGHTS["t"] = lambda values, t, eps: values * t
    schedules.TIME_SCHEDULES["half_<int>"] = schedules.Schedule(halves)
