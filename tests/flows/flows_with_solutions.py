"""Velocities that the sampler tests integrate: one with a closed-form solution, and a tiny network."""

import torch
import torch.nn.functional as F

MEAN, STD = 0.3, 0.5


def noise(*shape, seed=0, dtype=torch.float32):
    """Return standard normal numbers of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian_velocity(x, t, label=None):
    """Velocity of the rectified flow from N(0, 1) to N(MEAN, STD²): E[z1 - z0 | x_t = x]."""
    t = t.view(-1, *(1,) * (x.ndim - 1))
    variance = t**2 * STD**2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def gaussian_flow(z):
    """Where `gaussian_velocity` takes z from t = 0 to t = 1."""
    return MEAN + STD * z


def tiny_network(channels=2, seed=0):
    """Return a velocity of convolutions, normalisation and a matrix product, with random float32 weights.

    It adds label[:, 0], when there is a label, so that a label given to the wrong sample shows.
    """
    generator = torch.Generator().manual_seed(seed)
    enter = torch.randn(8, channels + 1, 3, 3, generator=generator) / 3
    middle = torch.randn(8, 8, generator=generator) / 2
    leave = torch.randn(channels, 8, 3, 3, generator=generator) / 4

    def velocity(x, t, label=None):
        time = t.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        h = F.silu(F.conv2d(torch.cat([x, 3 * time], 1), enter, padding=1))
        h = h + (F.group_norm(h, 2).movedim(1, -1) @ middle).movedim(-1, 1)
        v = F.conv2d(torch.sin(2 * h), leave, padding=1)
        return v if label is None else v + label[:, :1, None, None]

    return velocity
