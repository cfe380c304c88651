"""Settings of every test: one thread per worker, no progress bars, no terminal colours."""

import os
import pathlib
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture
def repository():
    """The root of the repository, where the scripts are."""
    return ROOT


@pytest.fixture
def data_folder():
    """The recorded numbers that tests compare with."""
    return ROOT / "tests" / "data"
