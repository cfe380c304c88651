"""example.py makes a grid of any checkpoint: ours, a published one, EDM's."""

import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import example
from models.checkpoint import load_model
from models.create import create_from_fields
from models.released import PUBLISHED, to_released
from runtime.plots import GAP, SMALLEST_CELL, to_uint8
from runtime.seeds import index_noise
from tests.processes import ROOT
from tests.test_image_sampling import write_run
from training.update import ExponentialMovingAverage


def write_published(path, monkeypatch):
    """Write a small network as published ones are, with fresh weights; the table of published ones has it, too."""
    fields = PUBLISHED["CIFAR32 3.4M"][1] | {"model.nf": 8}
    net = create_from_fields(fields)
    monkeypatch.setitem(PUBLISHED, "tiny", (sum(p.numel() for p in net.parameters()), fields))
    ema = ExponentialMovingAverage(net.parameters(), 0.999).state_dict()
    state = to_released({"model": net.state_dict(), "ema": ema, "step": 1,
                         "optimizer": torch.optim.Adam(net.parameters()).state_dict()}, net)
    torch.save(state, path)
    return path


@pytest.mark.parametrize("kind", ["SlimFlow's", "EDM's"])
def test_a_published_checkpoint_becomes_a_grid_of_64_images(data_folder, tmp_path, monkeypatch, kind):
    path = data_folder / "edm/edm_adm_cond.pkl"
    if kind == "SlimFlow's":
        path = write_published(tmp_path / "released.pth", monkeypatch)
    example.main(path, tmp_path / "samples.png")
    size = 8 * (SMALLEST_CELL + GAP) + GAP
    assert Image.open(tmp_path / "samples.png").size == (size, size)


def test_one_of_ours_is_sampled_at_the_eps_and_noise_scale_of_its_run(tmp_path):
    write_run(tmp_path, flow__eps=0.3, sampling__init_noise_scale=0.5)
    path = tmp_path / "checkpoints" / "checkpoint_1.pth"
    example.main(path, tmp_path / "samples.png")
    z0 = 0.5 * index_noise(0, range(64), (1, 8, 8))
    with torch.no_grad():
        images = z0 + 0.7 * load_model(path)(z0, torch.full((64,), 999 * 0.3))
    first = slice(GAP, GAP + SMALLEST_CELL, 8)
    found = np.asarray(Image.open(tmp_path / "samples.png"))[first, first]
    assert np.abs(found.astype(int) - to_uint8(images[:1])[0, :, :, 0]).max() <= 1


def test_a_file_that_is_missing_is_one_sentence(repository, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["example.py", "absent.pth"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(repository / "example.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert said.startswith("example.py: absent.pth ") and said.count("\n") == 1


def test_without_a_checkpoint_it_says_how_it_is_used(repository, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["example.py"])
    with pytest.raises(SystemExit, match=r"^usage: python example.py CHECKPOINT \[GRID\]$"):  # text: status 1
        runpy.run_path(str(repository / "example.py"), run_name="__main__")


def test_an_installation_has_all_packages_of_the_notebook_and_what_they_need(tmp_path):
    """pip install -e . refuses a folder of several packages unless pyproject.toml names them."""
    pytest.importorskip("setuptools")
    for name in ("pyproject.toml", "requirements.txt", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for package in {path.parent.relative_to(ROOT) for path in ROOT.glob("*/__init__.py")} | {pathlib.Path("logs")}:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    subprocess.run([sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "egg_info"], cwd=tmp_path,
                   check=True, capture_output=True)
    packages = (tmp_path / "slimflow.egg-info" / "top_level.txt").read_text().split()
    notebook = re.findall(r"```python\n(from .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[-1]
    assert set(re.findall(r"^from (\w+)", notebook, re.MULTILINE)) <= set(packages) and "logs" not in packages
    assert "torch>=" in (tmp_path / "slimflow.egg-info" / "requires.txt").read_text()
