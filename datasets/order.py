"""The order of training samples: endless, shuffled anew each epoch, and known at any position without history."""

import functools

import numpy as np

from runtime import seeds


class EndlessOrder:
    """Indices 0..count-1 for ever: epoch e is a permutation drawn from (seed, e), batches run across its end.

    The place of a sample in the whole sequence is `update * batch_size + place`, so any update of any run can
    be looked up directly, and processes that take disjoint places get disjoint samples.
    """

    def __init__(self, count, batch_size, seed):
        """Take the number of samples, the global batch size (over all processes) and the seed."""
        self.count = count
        self.batch_size = batch_size
        self.seed = seed

    def indices(self, update, low, high):
        """Return the samples at places [low, high) of the batch of `update`: int64 array `(high - low,)`.

        The cost does not depend on `update`: at most the permutations of the epochs it touches are drawn.
        """
        first = update * self.batch_size
        positions = np.arange(first + low, first + high)
        epochs, places = np.divmod(positions, self.count)
        indices = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = _permutation(self.count, self.seed, int(epoch))[places[here]]
        return indices


@functools.lru_cache(maxsize=4)  # the epoch in use and the next, of two data sets
def _permutation(count, seed, epoch):
    """Return epoch's permutation of 0..count-1, int64 `(count,)`.

    Sorting raw Philox words: numpy promises that these stay the same in later versions, which it does not
    promise of `permutation`, and a run must resume after an upgrade.
    """
    words = seeds.index_generator(seed, epoch, seeds.ORDER).bit_generator.random_raw(count)
    return np.argsort(words, kind="stable")
