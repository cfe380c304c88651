"""Pictures of a run in training: the same noise through the EMA weights, in one step and in a few."""

import torch

from datasets import one_hot
from flows import samplers
from runtime.pictures import save_grid
from runtime.seeds import index_labels, index_noise

COLUMNS = 10
STEPS = (2, 10)  # of Euler's rule, below the one-step row


@torch.no_grad()
def sample_grids(network, ema, velocity, config, shape, path):
    """Write a picture with a labelled row per sampler to `path` and return the path.

    Row after row the same noise, the samples 0, 1, … of config.seed, so that pictures of different steps compare.
    `network` (that `velocity` calls) has its training weights and mode again afterwards, and no global random
    number is drawn. shape: (C, H, W).
    """
    device = next(network.parameters()).device
    z0 = index_noise(config.seed, range(COLUMNS), shape).to(device) * config.sampling.init_noise_scale
    label = None
    if config.data.num_classes:
        label = one_hot(index_labels(config.seed, range(COLUMNS), config.data.num_classes).to(device),
                        config.data.num_classes)
    eps = config.flow.eps
    network.eval()
    with ema.average_parameters():
        rows = [samplers.one_step(velocity, z0, label, t_start=eps)[0]]
        rows += [samplers.euler(velocity, z0, label, steps=steps, t_start=eps)[0] for steps in STEPS]
    network.train()
    save_grid(path, torch.cat(rows), columns=COLUMNS, labels=["one step", *(f"Euler {n}" for n in STEPS)])
    return path
