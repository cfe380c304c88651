"""Exported files give PyTorch's images in onnxruntime, for any number of images, and are used without torch."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from configs.command_line import parse_flags
from flows.rectified_flow import velocity_from_network
from flows.samplers import euler, one_step
from models.checkpoint import load_model, write_checkpoint
from runtime.seeds import index_noise
from runtime.terminal import UserError
from tests.helpers import small_checkpoint
from tests.models.released_numbers import fields_of
from tests.processes import ROOT
from tests.tools.test_convert import config_file
from tools import export


def run(*arguments):
    """Run the command with these arguments."""
    export.main(parse_flags([str(word) for word in arguments], export.FLAGS, positional=("checkpoint",)))


@pytest.fixture(scope="module")
def recorded(request):
    return request.config.rootpath / "tests" / "data" / "golden"


@pytest.fixture(scope="module")
def conditional(recorded, tmp_path_factory):
    """A released class-conditional checkpoint, exported; (checkpoint, folder of the files)."""
    folder = tmp_path_factory.mktemp("conditional")
    config = config_file(tmp_path_factory.mktemp("config"), "dhariwal_cond")
    run(recorded / "dhariwal_cond.pth", "--out", folder, "--config", config)
    return recorded / "dhariwal_cond.pth", folder


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """An unconditional checkpoint, exported with two Euler steps."""
    folder = tmp_path_factory.mktemp("two_steps")
    write_checkpoint(folder / "colour.pth", small_checkpoint(data__num_channels=3))
    run(folder / "colour.pth", "--out", folder / "export", "--sampler", "euler", "--steps", 2, "--raw")
    return folder / "colour.pth", folder / "export"


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_conditional_model_takes_class_numbers_and_any_number_of_images(conditional, count):
    checkpoint, folder = conditional
    net = load_model(checkpoint, fields=fields_of("dhariwal_cond"))
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
    net = load_model(checkpoint, use_ema=False)
    noise = index_noise(6, range(3), (3, 8, 8))
    with torch.no_grad():
        expected = euler(velocity_from_network(net), noise, steps=2)[0]
    found = session(folder / "colour.onnx").run(None, {"noise": noise.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_report_says_size_latency_and_difference_of_each_form(two_steps):
    _, folder = two_steps
    report = json.loads((folder / "colour.json").read_text())
    rows = {row["name"]: row for row in report["files"]}
    assert set(rows) == {"PyTorch", "onnx float32", "onnx int8"}
    assert rows["onnx float32"]["largest_difference"] <= 1e-4
    assert 0 < rows["onnx int8"]["mean_difference"] < 0.1
    assert all(row["latency_ms"] > 0 for row in rows.values())
    assert (report["steps"], report["sampler"]) == (2, "euler")
    assert sorted(path.name for path in folder.iterdir()) == [
        "colour.json", "colour.onnx", "colour_int8.onnx"]


def test_eight_bits_need_less_than_half_of_the_bytes(conditional):
    _, folder = conditional
    small, full = (folder / f"dhariwal_cond{kind}.onnx" for kind in ("_int8", ""))
    assert small.stat().st_size < 0.5 * full.stat().st_size


def shown_lines():
    """Return what docs/export.md shows: (the checkpoint of its command, the lines that use the file)."""
    page = (ROOT / "docs/export.md").read_text()
    checkpoint = re.search(r"python -m tools.export (logs/\S+\.pth)", page)[1]
    return pathlib.Path(checkpoint), re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]


def run_without_torch(lines, folder):
    """Run Python lines as they are in `folder`, in a process in which importing torch fails."""
    blocked = "import sys\nsys.modules['torch'] = None\n"
    done = subprocess.run([sys.executable, "-c", blocked + lines], cwd=folder, capture_output=True, text=True,
                          check=False)
    return done.returncode, done.stderr


def test_the_ten_lines_shown_make_an_image_without_torch_of_what_the_command_shown_exports(tmp_path, monkeypatch):
    checkpoint, lines = shown_lines()
    assert len([line for line in lines.splitlines() if line]) <= 10
    write_checkpoint(tmp_path / checkpoint, small_checkpoint(
        model__ch_mult=(1, 2), model__attn_resolutions=(4,), flow__eps=0.1, sampling__init_noise_scale=1.5))
    monkeypatch.chdir(tmp_path)
    run(checkpoint)
    status, err = run_without_torch(lines, tmp_path)
    assert status == 0, err
    velocity = velocity_from_network(load_model(checkpoint))
    noise = np.random.default_rng(0).standard_normal((16, 1, 8, 8), dtype=np.float32)
    with torch.no_grad():
        images = one_step(velocity, 1.5 * torch.from_numpy(noise), t_start=0.1)[0]  # as the run was trained
    expected = (255 * ((images + 1) / 2).clamp(0, 1)).to(torch.uint8)[:, 0].numpy()
    with Image.open(tmp_path / "samples.png") as opened:
        found = np.asarray(opened)[8::16, 8::16].reshape(4, 8, 4, 8).transpose(0, 2, 1, 3).reshape(16, 8, 8)
    assert expected.std() > 10
    assert np.abs(found.astype(int) - expected).max() <= 1  # truncation turns the last bit of a float into a level


def test_the_lines_shown_make_colour_images_too(two_steps, tmp_path):
    _, folder = two_steps
    _, lines = shown_lines()
    path = tmp_path / re.search(r'"(logs/[^"]+\.onnx)"', lines)[1]
    path.parent.mkdir(parents=True)
    path.symlink_to(folder / "colour.onnx")
    status, err = run_without_torch(lines, tmp_path)
    assert status == 0, err
    with Image.open(tmp_path / "samples.png") as opened:
        assert (opened.mode, opened.size) == ("RGB", (512, 512))


def test_the_process_of_these_tests_cannot_import_torch(tmp_path):
    status, err = run_without_torch("import torch", tmp_path)
    assert status == 1
    assert "import of torch halted" in err


def test_missing_packages_and_wrong_arguments_are_one_sentence(recorded, monkeypatch):
    for arguments, sentence in (([recorded / "dhariwal_cond.pth", "--steps", 0], "--steps must be at least 1"),
                            ([recorded / "absent.pth"], "absent.pth cannot be opened"),
                            ([], "name a checkpoint: python -m tools.export CHECKPOINT")):
        with pytest.raises(UserError, match=sentence):
            run(*arguments)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime"):
        run(recorded / "dhariwal_cond.pth")


@pytest.mark.parametrize("kind", ["", "_int8"])
@pytest.mark.parametrize("label", [99, -1])
def test_a_number_that_is_no_class_is_refused_by_the_file_itself(conditional, kind, label):
    _, folder = conditional
    noise = np.zeros((2, 3, 16, 16), dtype=np.float32)
    with pytest.raises(Exception, match="out of data bounds"):
        session(folder / f"dhariwal_cond{kind}.onnx").run(None, {"noise": noise, "label": np.array([0, label])})


def test_a_file_that_differs_from_pytorch_fails_the_command(conditional, tmp_path, monkeypatch, capsys):
    """Three Euler steps are asked for, and the file of a single one is put in their place."""
    checkpoint, folder = conditional
    other = (folder / "dhariwal_cond.onnx").read_bytes()
    monkeypatch.setattr(export, "write_onnx", lambda model, path, *_: path.write_bytes(other))
    monkeypatch.setattr(export, "write_int8", lambda model, path, small, _: small.write_bytes(other))
    with pytest.raises(UserError, match="do not use it"):
        run(checkpoint, "--sampler", "euler", "--steps", 3, "--out", tmp_path, "--config",
            config_file(tmp_path, "dhariwal_cond"))
    assert f"exporting {checkpoint}; the first stage, tracing it, takes most of the time\n" in capsys.readouterr().err
