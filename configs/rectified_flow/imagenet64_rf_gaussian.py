"""ImageNet at 64×64 with its 1,000 classes: the 80.7M DhariwalUNet of the paper."""

from configs.default import get_default_config


def get_config():
    """Return the ImageNet64 config."""
    config = get_default_config()
    config.data.update(dataset="ImageNet64", image_size=64, num_classes=1000)
    config.model.update(name="DhariwalUNet", num_res_blocks=2, ch_mult=(1, 2, 2, 4), attn_resolutions=(32, 16),
                        dropout=0.13)
    return config
