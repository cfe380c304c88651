"""Digits with the released code's hyper-parameters: what docs/miniature.md compares the recommended ones with."""

from configs.default import get_default_config
from configs.rectified_flow import digits_rf_gaussian

UPDATES = 1000
PAIRS = 176  # at 463 evaluations each, as many evaluations as 4,000 pairs at the recommended tolerance


def get_config():
    """Return the config of the 1-flow: CIFAR-10's values, with warm-up and number of pairs scaled to the short run."""
    config, released = digits_rf_gaussian.get_config(), get_default_config()
    warmup = round(released.optim.warmup * UPDATES / released.training.n_iters)
    config.optim.update(lr=released.optim.lr, warmup=warmup)
    config.model.update(dropout=released.model.dropout, ema_rate=released.model.ema_rate)
    config.sampling.update(ode_tol=released.sampling.ode_tol, total_number_of_samples=PAIRS, block_size=PAIRS)
    config.training.n_iters = UPDATES
    return config
