"""EDM's recorded networks: three in tests/data/edm, the others in ../shared/golden/edm where that is there."""

import json
import pathlib

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent.parent
FOLDERS = (ROOT / "tests/data/edm", ROOT.parent / "shared/golden/edm")
OWN = ("edm_ddpmpp_cond", "edm_ncsnpp", "edm_adm_cond")
READABLE = (*OWN, "edm_ddpmpp", "edm_ddpmpp_defaults", "edm_adm_heads", "baseline_ddpmpp", "baseline_ncsnpp")


def golden_file(name):
    """Return the path of a recorded file; skip the test where it is not there."""
    for folder in FOLDERS:
        if (folder / name).is_file():
            return folder / name
    return pytest.skip(f"{name} is not on this machine")


def golden_numbers(name):
    """Return (what NAME.json says, {name: tensor} of NAME.npz)."""
    with np.load(golden_file(f"{name}.npz")) as numbers:
        return json.loads(golden_file(f"{name}.json").read_text()), {
            key: torch.from_numpy(value) for key, value in numbers.items()}
