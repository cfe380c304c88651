"""ImageNet at 64×64 with its 1,000 classes: the 80.7M DhariwalUNet of the paper."""

from configs.default import get_default_config


def get_config():
    """Return the ImageNet64 config."""
    config = get_default_config()
    config.data.dataset = "ImageNet64"
    config.data.image_size = 64
    config.data.num_classes = 1000
    config.model.name = "DhariwalUNet"
    config.model.num_res_blocks = 2
    config.model.ch_mult = (1, 2, 2, 4)
    config.model.attn_resolutions = (32, 16)
    config.model.dropout = 0.13
    return config
