"""A whole training step, ours and the same step as in the released code, in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.train_step | tee benchmarks/train_step.txt

Ours is the update of train.py. The peer has the same weights, batches and objective, the network as in the released
code (benchmarks/networks.py), per-tensor gradient clipping, Adam and EMA loops, and a read of the loss at every step.
Rounds alternate; figures are medians; operations are those that torch dispatches.
"""

import itertools
import statistics
import time

import numpy as np
import torch

from benchmarks.networks import Count, released_way
from configs.default import get_default_config, set_field
from datasets.sources import DATASETS, DataSet, ImageSet
from flows.objective import Draws
from flows.rectified_flow import velocity_from_network
from runtime.devices import Processes
from runtime.run_folder import git_commit
from runtime.seeds import DRAWS, step_generator
from train import Training

SMALL = {"model.nf": 64, "model.num_res_blocks": 1, "model.ch_mult": (1, 1, 2)}  # CIFAR-10's 3.4M
BATCH, ROUNDS = 16, 9


def random_images(root, spec):
    """Return the data set `benchmark`: 2,000 random images of the given size and channels, two per class."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2000, spec.channels, spec.size, spec.size), dtype=np.uint8)
    return ImageSet(images, np.arange(2000) % 1000, None, "random images")


DATASETS["benchmark"] = DataSet(random_images, channels=None)


def create_training(fields, batch, device):
    """Return train.py's `Training` of the fields on random images."""
    config = get_default_config()
    own = {"data.dataset": "benchmark", "training.batch_size": batch, "optim.warmup": 0}
    for name, value in (own | fields).items():
        set_field(config, name, value)
    return Training(config, Processes(0, 1, device))


def ours(training):
    """Return an iterator that does one update at every `next`."""
    return map(training.update, itertools.count())


def released(training):
    """Do one update at every `next` as in the released code, with a loop over the tensors for everything."""
    device, size = training.device, training.config.training.batch_size
    network = released_way(training.network).to(memory_format=torch.contiguous_format)
    parameters = list(network.parameters())
    optimizer = torch.optim.Adam(parameters, lr=2e-4, foreach=False, fused=False)
    average = [p.detach().clone() for p in parameters]
    for update in itertools.count():
        optimizer.zero_grad()
        draws = Draws(step_generator(0, update, DRAWS, device), size, device=device)
        batch = training.source.batch(update, 0, size)
        loss = training.objective(velocity_from_network(network), batch, draws, update).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
        optimizer.step()
        with torch.no_grad():
            for shadow, parameter in zip(average, parameters, strict=True):
                shadow.sub_((1 - 0.999) * (shadow - parameter))
        yield loss.item()


def main():
    """Print a line for each, and the ratios."""
    training = create_training(SMALL, BATCH, torch.device("cpu"))
    steps = {"released way": released(training), "ours": ours(training)}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CIFAR 3.4M, float32, "
          f"batch {BATCH}, medians of {ROUNDS} rounds, commit {git_commit()}")
    times = {name: [] for name in steps}
    for name in [*steps] * (1 + ROUNDS):  # the first is a warm-up
        started = time.perf_counter(), time.process_time()
        next(steps[name])
        times[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    wall, cpu = ({name: statistics.median(one[clock] for one in taken[1:]) for name, taken in times.items()}
                 for clock in (0, 1))
    for name, step in steps.items():
        with Count() as count:
            next(step)
        print(f"{name:<13} {1e3 * wall[name]:8.1f} ms wall, {1e3 * cpu[name]:8.1f} ms CPU, "
              f"{BATCH / wall[name]:8.1f} images/s, {count.operations:>5} operations")
    print(f"ours is {wall['released way'] / wall['ours']:.2f} times as fast in wall time, "
          f"{cpu['released way'] / cpu['ours']:.2f} in CPU time")


if __name__ == "__main__":
    main()
