"""CIFAR-10, 32×32 (the paper's 1-flow network, 61.8M parameters): the defaults are its values."""

from configs.default import get_default_config


def get_config():
    """Return the CIFAR-10 config."""
    return get_default_config()
