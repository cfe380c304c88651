"""The smallest use, to copy: `python example.py CHECKPOINT` draws 64 one-step samples, of SlimFlow's and EDM's, too."""

import sys

from configs.default import get_default_config
from datasets import one_hot
from flows.rectified_flow import velocity_from_network
from flows.samplers import create_sampler
from models.checkpoint import load_with_config
from runtime import plots, seeds, terminal


def main(checkpoint, grid="samples.png"):
    config, net, _ = load_with_config(checkpoint, get_default_config(), given=(), say=lambda text: None)
    config.sampling.use_ode_sampler = "one_step"  # the others: flows.samplers.SAMPLERS
    size, channels, classes = config.data.image_size, config.data.num_channels, config.data.num_classes
    z0 = config.sampling.init_noise_scale * seeds.index_noise(0, range(64), (channels, size, size))
    label = one_hot(seeds.index_labels(0, range(64), classes), classes) if classes else None
    plots.save_grid(grid, create_sampler(config)(velocity_from_network(net), z0, label)[0], columns=8)
    print(f"{grid}: 64 samples of {checkpoint} in one step")


if __name__ == "__main__":
    with terminal.one_sentence("example.py"):
        main(*sys.argv[1:]) if sys.argv[1:] else sys.exit("usage: python example.py CHECKPOINT [GRID]")
