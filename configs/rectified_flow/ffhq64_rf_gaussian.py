"""FFHQ at 64×64."""

from configs.default import get_default_config


def get_config():
    """Return the FFHQ64 config."""
    config = get_default_config()
    config.data.update(dataset="FFHQ64", image_size=64)
    return config
