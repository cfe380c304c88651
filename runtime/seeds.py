"""Random numbers that depend on (seed, index) alone."""

import concurrent.futures

import numpy as np
import torch

from runtime.terminal import UserError

# One stream per purpose, so that draws for the same (seed, index) are independent.
NOISE, LABEL, PATH_NOISE, SUBSET, ORDER, FLIP, AUGMENT, DRAWS, DROPOUT, EVALUATION = range(10)
PARALLEL_VALUES = 1 << 20  # below, threads cost more than they save


def index_generator(seed, index, stream=NOISE):
    """Return numpy's Philox generator of sample `index` under `seed`: the same on every machine.

    Philox is counter-based (Salmon et al. 2011): the seed and stream are its key, the index the high word
    of its counter, so generators of different indices never overlap.
    """
    bits = np.random.Philox(key=np.array([seed % 2**64, stream], np.uint64), counter=[0, 0, 0, index])
    return np.random.Generator(bits)


def index_noise(seed, indices, shape, stream=NOISE):
    """Return standard normal noise, float32 tensor `(len(indices), *shape)`, row k a function of (seed, indices[k]).

    Large arrays are drawn by as many threads as torch has (at most 8): numpy releases the interpreter lock.
    """
    noise = np.empty((len(indices), *shape), dtype=np.float32)

    def fill(low, high):
        generator = index_generator(seed, 0, stream)  # reset for every row: creating one costs as much as 100 draws
        state = generator.bit_generator.state
        for row in range(low, high):
            state["state"]["counter"][:] = 0, 0, 0, indices[row]
            generator.bit_generator.state = state
            generator.standard_normal(dtype=np.float32, out=noise[row])

    threads = min(8, torch.get_num_threads()) if noise.size >= PARALLEL_VALUES else 1
    bounds = np.linspace(0, len(indices), threads + 1).astype(int)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, bounds[:-1], bounds[1:]))
    return torch.from_numpy(noise)


def index_labels(seed, indices, num_classes, chosen=-1):
    """Return class numbers, int64 tensor `(len(indices),)`: `chosen`, or for -1 uniform ones; None without classes.

    Entry k is a function of (seed, indices[k]). Raises UserError if the model does not have the class `chosen`.
    """
    if chosen >= num_classes:
        raise UserError(f"config.sampling.class_label is {chosen}, but the model has {num_classes} classes, from 0")
    if not num_classes:
        return None
    draws = [index_generator(seed, int(i), LABEL).integers(num_classes) if chosen < 0 else chosen for i in indices]
    return torch.tensor(draws, dtype=torch.int64)


def step_generator(seed, update, stream, device):
    """Return a `torch.Generator` on `device` for update number `update`: seeded by (seed, update, stream) alone."""
    return torch.Generator(device).manual_seed(_torch_seed(seed, update, stream))


def seed_dropout(seed, update, rank):
    """Seed torch's global generators, which dropout draws from, by (seed, update, rank)."""
    torch.manual_seed(_torch_seed(seed, update, rank, DROPOUT))


def _torch_seed(*words):
    high, low = np.random.SeedSequence(words).generate_state(2, np.uint32)
    return int(high) << 31 ^ int(low)
