"""A TorchScript file with the interface of clean-fid's Inception and random weights: the tests' stand-in for it."""

import warnings

import torch
from torch import nn
from torch.nn import functional as F

FILE_NAME = "inception-2015-12-05.pt"
CLASSES = 10


class StandIn(nn.Module):
    """Images of any size in 0..255 → 2048 features, or class probabilities; `layers` takes 299×299 in [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Linear(3 * 36, 2048), nn.ReLU())
        self.output = nn.Linear(2048, CLASSES)

    def forward(
        self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ):
        x = F.interpolate(img.to(torch.float32), size=[299, 299], mode="bilinear", align_corners=False)
        features = self.layers((x - 128) / 128)
        if return_features:
            return features
        logits = F.linear(features, self.output.weight) if no_output_bias else self.output(features)
        return logits.softmax(dim=1)


def write_stand_in(folder):
    """Write the stand-in under clean-fid's file name into `folder`; return its path."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = StandIn()
        nn.init.normal_(network.output.weight, std=1.0)
    path = folder / FILE_NAME
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have torch.export's files
        torch.jit.script(network.eval()).save(str(path))
    return path
