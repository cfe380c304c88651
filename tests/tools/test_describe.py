"""The describe command."""

import sys

import pytest

from configs.command_line import run_script
from models.checkpoint import write_checkpoint
from models.describe import describe as count
from tests.models.test_checkpoint import tiny_checkpoint
from tools import describe

CIFAR = ["--config", "configs/rectified_flow/cifar10_rf_gaussian.py"]


def run(monkeypatch, repository, *words):
    monkeypatch.chdir(repository)
    monkeypatch.setattr(sys, "argv", ["describe", *CIFAR, *words])
    with pytest.raises(SystemExit) as ended:
        run_script(describe.main, describe.__doc__, describe.FLAGS)
    return ended.value.code


def test_configuration_is_described_in_a_table(monkeypatch, repository, capsys):
    """The smallest published network: 3,437,123 parameters, 0.74 GMACs."""
    status = run(monkeypatch, repository, "--config.model.nf", "64", "--config.model.num_res_blocks", "1",
                 "--config.model.ch_mult", "(1, 1, 2)")
    lines = capsys.readouterr().out.splitlines()
    assert not status and lines[-2].split()[:3] == ["total", "3,437,123", "0.7356"]
    total = count({"model.nf": 64, "model.num_res_blocks": 1, "model.ch_mult": (1, 1, 2)})[-1]
    bytes_of_16 = 20 * total.parameters + 16 * total.activation_bytes  # five numbers of four bytes a parameter
    assert lines[-1].startswith(f"GiB to train in float32, by images a pass: 16: {bytes_of_16 / 2**30:.1f}, 32: ")


def test_seconds_of_an_update_are_measured_on_request(monkeypatch, repository, capsys):
    """With accumulation, in the config's precision, and for a network with classes."""
    status = run(monkeypatch, repository, "--measure", "--config.training.batch_size", "4", "--config.model.nf", "8",
                 "--config.training.accumulation_steps", "2", "--config.model.ch_mult", "(1, 2)",
                 "--config.model.num_res_blocks", "1", "--config.data.num_classes", "3")
    last = capsys.readouterr().out.splitlines()[-1]
    assert not status and float(last.split()[0]) > 0 and "s an update of 4 images" in last and "on the CPU" in last


def test_checkpoint_is_described_without_its_architecture_given(monkeypatch, repository, capsys, tmp_path):
    """A file of ours; what the config says otherwise does not count."""
    write_checkpoint(tmp_path / "ours.pth", tiny_checkpoint(**{"model.ch_mult": (1, 1, 2)})[1])
    status = run(monkeypatch, repository, "--ckpt_path", str(tmp_path / "ours.pth"))
    out = capsys.readouterr().out
    assert not status and "decoder 3" in out and "8²" in out


def test_contradiction_is_one_sentence_and_status_2(monkeypatch, repository, capsys, tmp_path):
    """The checkpoint's field and the given one."""
    write_checkpoint(tmp_path / "ours.pth", tiny_checkpoint()[1])
    status = run(monkeypatch, repository, "--ckpt_path", str(tmp_path / "ours.pth"), "--config.model.nf", "64")
    assert status == 2 and "model.nf is 8 in the checkpoint and 64 here" in capsys.readouterr().err
