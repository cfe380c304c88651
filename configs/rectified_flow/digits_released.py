"""Digits with the released code's hyper-parameters: what docs/miniature.md holds the recommended ones against.

Learning rate, dropout, EMA and tolerance are the defaults, as for CIFAR-10; warm-up and number of pairs are scaled to
a run of 1,000 updates.
"""

from configs.default import get_default_config
from configs.rectified_flow import digits_rf_gaussian

UPDATES, DEFAULT_UPDATES = 1000, 1300001
PAIRS = 176  # at 463 evaluations each, as many evaluations as 4,000 pairs at the recommended tolerance


def get_config():
    """Return the config of the 1-flow; docs/miniature.md says what the later stages change."""
    config, released = digits_rf_gaussian.get_config(), get_default_config()
    config.optim.lr = released.optim.lr
    config.optim.warmup = round(released.optim.warmup * UPDATES / DEFAULT_UPDATES)
    config.model.dropout = released.model.dropout
    config.model.ema_rate = released.model.ema_rate
    config.sampling.ode_tol = released.sampling.ode_tol
    config.sampling.total_number_of_samples = PAIRS
    config.sampling.block_size = PAIRS
    config.training.n_iters = UPDATES
    return config
