"""Rewriting a checkpoint in the other layout."""

import pytest
import torch

from models import load_model
from models.safe_load import read_file
from tests.models.released_numbers import fields_of, inputs_of, path_of
from tests.models.test_released import assert_same
from tools.convert import main


def config_file(folder, name):
    """Write a config file with the architecture of a recorded network; return its path."""
    lines = [f"    config.{field} = {value!r}" for field, value in fields_of(name).items()]
    path = folder / "my_config.py"
    path.write_text("\n".join(["from configs.default import get_default_config", "def get_config():",
                               "    config = get_default_config()", *lines, "    return config"]))
    return str(path)


@pytest.mark.parametrize("name", ["ncsnpp_cifar", "ncsnpp_fourier_fir_residual"])
def test_there_and_back_is_the_same_checkpoint(tmp_path, name, capsys):
    """Weights, averages, Adam's moments and step: nothing is lost in our layout. The config stays with the file."""
    ours, released = str(tmp_path / "ours.pth"), str(tmp_path / "released.pth")
    assert main([str(path_of(name)), ours, "--config", config_file(tmp_path, name)]) == 0
    assert main([ours, released]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{ours}: our layout", f"{released}: released layout"]
    expected, found = read_file(path_of(name))[0], read_file(released)[0]
    assert {key: found.pop(key) for key in ["config"]}["config"]["data"]["image_size"] == 16
    assert_same(found, {key: expected[key] for key in found})
    assert set(found) == set(expected)


def test_converted_file_needs_no_flags(tmp_path):
    """In our layout, and in the released one with our config, the image size is told."""
    ours, released = tmp_path / "ours.pth", tmp_path / "released.pth"
    main([str(path_of("ncsnpp_cifar")), str(ours), "--config", config_file(tmp_path, "ncsnpp_cifar")])
    main([str(ours), str(released)])
    x, t999, label, recorded = inputs_of("ncsnpp_cifar")
    for path in (ours, released):
        net = load_model(path)
        assert net.config_fields["data.image_size"] == fields_of("ncsnpp_cifar")["data.image_size"]
        with torch.no_grad():
            assert (net(x, t999, label) - torch.from_numpy(recorded["v_ema"])).abs().max() < 1e-4


def test_unreadable_file_is_one_sentence_and_status_2(tmp_path, capsys):
    """Nothing is written."""
    (tmp_path / "text.pth").write_text("text")
    assert main([str(tmp_path / "text.pth"), str(tmp_path / "out.pth")]) == 2
    assert capsys.readouterr().err.startswith("convert: ") and not (tmp_path / "out.pth").exists()
