"""The networks: the table of them here, building them (create.py), their checkpoints (checkpoint.py)."""

from models.dhariwal_unet import DhariwalUNet
from models.ncsnpp import NCSNpp

# Every network, by its model.name. A network is an `nn.Module` class such that
# - each argument of `__init__` is a config field: data.image_size, data.num_channels and data.num_classes, any other
#   name model.NAME; its default is that of the field. One without `num_classes` is unconditional;
# - `net(x, t999, label=None)` returns the velocity (N, C, H, W) at x (N, C, H, W) and 999·t (N,); label is one-hot
#   (N, num_classes), or None without classes;
# - `idle_parameters()` returns the parameters that no output depends on, where there are any.
# `create_from_fields` gives each network `config_fields`, {dotted field: value} of all that makes its architecture.
NETWORKS = {"ncsnpp": NCSNpp, "DhariwalUNet": DhariwalUNet}
