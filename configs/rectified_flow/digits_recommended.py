"""Digits with the hyper-parameters that docs/miniature.md recommends for short runs (1,000 updates a flow)."""

from configs.rectified_flow import digits_rf_gaussian


def get_config():
    """Return the config of the 1-flow; docs/miniature.md says what the later stages change."""
    config = digits_rf_gaussian.get_config()
    config.optim.lr = 2e-3
    config.sampling.ode_tol = 1e-2
    config.training.n_iters = 1000
    return config
