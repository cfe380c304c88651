"""Exported files give PyTorch's images in onnxruntime, for any number of images, and are used without torch."""

import json
import re
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch

from flows.rectified_flow import velocity_from_network
from flows.samplers import euler, one_step
from models import load_model
from runtime.seeds import index_noise
from tools import export


@pytest.fixture(scope="module")
def recorded(request):
    return request.config.rootpath / "tests" / "data" / "golden"


@pytest.fixture(scope="module")
def conditional(recorded, tmp_path_factory):
    """A released class-conditional checkpoint, exported; (checkpoint, folder of the files)."""
    folder = tmp_path_factory.mktemp("conditional")
    assert export.main([str(recorded / "dhariwal_cond.pth"), "--out", str(folder)]) == 0
    return recorded / "dhariwal_cond.pth", folder


@pytest.fixture(scope="module")
def two_steps(recorded, tmp_path_factory):
    """An unconditional checkpoint, exported with two Euler steps."""
    folder = tmp_path_factory.mktemp("two_steps")
    words = [str(recorded / "ncsnpp_cifar.pth"), "--out", str(folder), "--sampler", "euler", "--steps", "2",
             "--image_size", "16", "--raw"]
    assert export.main(words) == 0
    return recorded / "ncsnpp_cifar.pth", folder


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_conditional_model_takes_class_numbers_and_any_number_of_images(conditional, count):
    checkpoint, folder = conditional
    net = load_model(checkpoint)
    classes = net.config_fields["data.num_classes"]
    noise = index_noise(5, range(count), (3, *[net.config_fields["data.image_size"]] * 2))
    labels = torch.arange(count) % classes
    with torch.no_grad():
        one_hot = torch.nn.functional.one_hot(labels, classes).float()
        expected = one_step(velocity_from_network(net), noise, one_hot)[0]
    found = session(folder / "dhariwal_cond.onnx").run(None, {"noise": noise.numpy(), "label": labels.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_euler_steps_and_raw_weights_are_exported_as_asked(two_steps):
    checkpoint, folder = two_steps
    net = load_model(checkpoint, use_ema=False, fields={"data.image_size": 16})
    noise = index_noise(6, range(3), (3, 16, 16))
    with torch.no_grad():
        expected = euler(velocity_from_network(net), noise, steps=2)[0]
    found = session(folder / "ncsnpp_cifar.onnx").run(None, {"noise": noise.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_report_says_size_latency_and_difference_of_each_form(two_steps):
    _, folder = two_steps
    report = json.loads((folder / "ncsnpp_cifar.json").read_text())
    rows = {row["name"]: row for row in report["files"]}
    assert set(rows) == {"PyTorch", "onnx float32", "onnx int8"}
    assert rows["onnx float32"]["largest_difference"] <= 1e-4
    assert 0 < rows["onnx int8"]["mean_difference"] < 0.1
    assert all(row["latency_ms"] > 0 for row in rows.values())
    assert (report["steps"], report["sampler"]) == (2, "euler")
    assert sorted(path.name for path in folder.iterdir()) == [
        "ncsnpp_cifar.json", "ncsnpp_cifar.onnx", "ncsnpp_cifar_int8.onnx"]


def test_eight_bits_need_less_than_half_of_the_bytes(conditional):
    _, folder = conditional
    small, full = (folder / f"dhariwal_cond{kind}.onnx" for kind in ("_int8", ""))
    assert small.stat().st_size < 0.5 * full.stat().st_size


def test_the_lines_of_the_documentation_make_a_picture_without_torch(repository, two_steps, tmp_path):
    _, folder = two_steps
    lines = re.search(r"```python\n(.*?)```", (repository / "docs" / "export.md").read_text(), re.DOTALL)[1]
    assert len([line for line in lines.splitlines() if line and "import" not in line]) <= 10
    lines = re.sub(r'"logs/[^"]+\.onnx"', repr(str(folder / "ncsnpp_cifar.onnx")), lines)
    blocked = "import sys\nsys.modules['torch'] = None\n"
    done = subprocess.run([sys.executable, "-c", blocked + lines], cwd=tmp_path, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "images.png").read_bytes().startswith(b"\x89PNG")


def test_missing_packages_and_wrong_words_are_one_sentence(recorded, monkeypatch, capsys):
    assert export.main([str(recorded / "dhariwal_cond.pth"), "--steps", "0"]) == 2
    assert "--steps must be 1 or more" in capsys.readouterr().err
    assert export.main([str(recorded / "absent.pth")]) == 2
    assert "absent.pth" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export.main([str(recorded / "dhariwal_cond.pth")]) == 2
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err


def test_a_file_that_differs_from_pytorch_fails_the_command(conditional, tmp_path, monkeypatch, capsys):
    """Three Euler steps are asked for, and the file of a single one is put in their place."""
    checkpoint, folder = conditional
    other = (folder / "dhariwal_cond.onnx").read_bytes()
    monkeypatch.setattr(export, "write_onnx", lambda model, path, settings: path.write_bytes(other))
    monkeypatch.setattr(export, "write_int8", lambda model, path, small: small.write_bytes(other))
    assert export.main([str(checkpoint), "--sampler", "euler", "--steps", "3", "--out", str(tmp_path)]) == 2
    assert "do not use it" in capsys.readouterr().err
