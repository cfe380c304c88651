"""Randomness that belongs to (seed, index) and to nothing else."""

import numpy as np
import torch

# One stream per purpose, so that two draws for the same (seed, index) are independent.
NOISE, LABEL, PATH_NOISE, SUBSET, ORDER, FLIP, AUGMENT, DRAWS, DROPOUT, EVALUATION = range(10)


def index_generator(seed, index, stream=NOISE):
    """Return numpy's Philox generator of sample `index` under `seed`: the same on every machine.

    Philox is counter-based (Salmon et al. 2011): the seed and stream are its key, the index the high word
    of its counter, so generators of different indices never overlap.
    """
    bits = np.random.Philox(key=[seed % 2**64, stream], counter=[0, 0, 0, index])
    return np.random.Generator(bits)


def index_noise(seed, indices, shape, stream=NOISE):
    """Return standard normal noise, float32 tensor `(len(indices), *shape)`, row k a function of (seed, indices[k])."""
    noise = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in zip(noise, indices, strict=True):
        index_generator(seed, int(index), stream).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(noise)


def index_labels(seed, indices, num_classes):
    """Return uniform class numbers, int64 tensor `(len(indices),)`, entry k a function of (seed, indices[k])."""
    draws = [index_generator(seed, int(i), LABEL).integers(num_classes) for i in indices]
    return torch.tensor(draws, dtype=torch.int64)


def step_generator(seed, update, stream, device):
    """Return a `torch.Generator` on `device` for update number `update`: seeded by (seed, update, stream) alone."""
    words = np.random.SeedSequence([seed, update, stream]).generate_state(2, np.uint32)
    generator = torch.Generator(device)
    generator.manual_seed(int(words[0]) << 31 ^ int(words[1]))
    return generator


def seed_dropout(seed, update, rank):
    """Seed torch's global generators, which dropout draws from, by (seed, update, rank)."""
    words = np.random.SeedSequence([seed, update, rank, DROPOUT]).generate_state(2, np.uint32)
    torch.manual_seed(int(words[0]) << 31 ^ int(words[1]))
