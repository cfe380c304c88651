"""The smallest complete use, to copy: one-step samples of a checkpoint (ours, SlimFlow's or EDM's) as a grid.

    python example.py logs/distilled/checkpoints/checkpoint_1.pth samples.png
"""

import sys

import torch

from configs.default import get_default_config
from datasets import one_hot
from flows.rectified_flow import velocity_from_network
from flows.samplers import create_sampler
from models.checkpoint import load_with_config
from runtime.errors import one_sentence
from runtime.pictures import save_grid


def main(checkpoint, picture="samples.png"):
    """Sample 64 images, seed 0, and write them to `picture`."""
    config, net, _ = load_with_config(checkpoint, get_default_config(), given=())
    config.sampling.use_ode_sampler = "one_step"  # the others: flows.samplers.SAMPLERS
    data = config.data  # of the run: image_size, num_channels, num_classes (0: unconditional)
    torch.manual_seed(0)
    z0 = config.sampling.init_noise_scale * torch.randn(64, data.num_channels, data.image_size, data.image_size)
    label = one_hot(torch.arange(64) % data.num_classes, data.num_classes) if data.num_classes else None
    images, _ = create_sampler(config)(velocity_from_network(net), z0, label)
    save_grid(picture, images, columns=8)


if __name__ == "__main__":
    with one_sentence("example.py"):
        main(*sys.argv[1:]) if sys.argv[1:] else print(__doc__)
