"""A network of a user's own: no levels, no attention, no classes."""

import torch
from torch import nn

from models.create import NETWORKS


class Perceptron(nn.Module):
    """One hidden layer over all pixels and the time."""

    def __init__(self, image_size=32, num_channels=3, nf=128):
        super().__init__()
        pixels = num_channels * image_size**2
        self.layers = nn.Sequential(nn.Linear(pixels + 1, nf), nn.SiLU(), nn.Linear(nf, pixels))

    def forward(self, x, t999, label=None):
        """Return the velocity (N, C, H, W) at x (N, C, H, W) and 999·t (N,)."""
        return self.layers(torch.cat([x.flatten(1), t999[:, None] / 999], dim=1)).view_as(x)


def add_perceptron():
    """Add it to the table of networks."""
    NETWORKS["perceptron"] = Perceptron
