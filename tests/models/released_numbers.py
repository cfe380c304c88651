"""The recorded numbers of the released networks, read from tests/data/golden."""

import json
import pathlib

import numpy as np
import torch

FOLDER = pathlib.Path(__file__).parent.parent / "data/golden"
NAMES = sorted(path.stem for path in FOLDER.glob("*.pth"))
WITH_EMA = ("dhariwal_cond", "ncsnpp_cifar", "ncsnpp_fourier_fir_residual")
LAYOUTS = json.loads((FOLDER / "state_dict_layouts.json").read_text())


def path_of(name):
    """Return the checkpoint file of a recorded network."""
    return FOLDER / f"{name}.pth"


def fields_of(name):
    """Return the dotted config fields of a recorded network that differ from the defaults, but for dropout."""
    fields = json.loads((FOLDER / f"{name}.json").read_text())
    del fields["model.dropout"]
    return fields


def inputs_of(name):
    """Return (x, 999·t, label or None, {name: array}) of a recorded network."""
    recorded = dict(np.load(FOLDER / f"{name}.npz"))
    x, t, label = (torch.from_numpy(recorded[key]) for key in ("x", "t", "label"))
    return x, 999 * t, label if label.numel() else None, recorded


def layout_fields(name):
    """Return the dotted config fields of a configuration of the paper, such as "ffhq64_3.4M"."""
    data, size = name.split("_")[0], name.split("_")[-1]
    if data == "imagenet64":
        mult = {"80.7M": (1, 2, 2, 4), "44.7M": (1, 2, 2, 2)}[size]
        return {"model.name": "DhariwalUNet", "model.num_res_blocks": 2, "model.ch_mult": mult,
                "data.num_classes": 1000, "data.image_size": 64, "model.attn_resolutions": (32, 16)}
    if data == "cifar10":
        return {}
    nf, blocks, mult = {"61.8M": (128, 4, (1, 2, 2, 2)), "27.9M": (128, 2, (1, 2, 2)), "15.7M": (96, 2, (1, 2, 2)),
                        "7.0M": (64, 2, (1, 2, 2)), "3.4M": (64, 1, (1, 1, 2))}[size]
    return {"model.nf": nf, "model.num_res_blocks": blocks, "model.ch_mult": mult,
            "data.image_size": int(data[-2:])}


def layout_state(name):
    """Return a state dict in the released layout of a configuration of the paper, its tensors without content."""
    return {key: torch.empty(shape, dtype=getattr(torch, kind.removeprefix("torch.")), device="meta")
            for key, shape, kind in LAYOUTS[name]["state_dict"]}
