"""evaluation_fid.py as users run it: sweeps, resuming, waiting, several processes, files, Inception's whole path."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from configs.command_line import config_to_dict, load_config
from configs.validation import check_fields
from datasets.images import load_images
from metrics.features import inception_extractor
from metrics.image_files import array_source
from metrics.reference import measure_source, write_statistics
from metrics.results import read_results
from models import create_model
from models.checkpoint import write_checkpoint
from models.ema import ExponentialMovingAverage
from runtime.devices import Processes
from tests.metrics.inception_stand_in import FILE_NAME, write_stand_in

CONFIG = "configs/rectified_flow/digits_rf_gaussian.py"
HANGING = 1800  # seconds after which a process of seconds, on a machine a hundred times too busy, counts as hanging
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
QUICK = ("--config.sampling.use_ode_sampler=one_step", "--config.eval.num_samples=100", "--config.eval.nearest=50")


def tiny_checkpoint(number):
    """The content of a checkpoint of a small random network; the run's last is number 2."""
    config = load_config(CONFIG)
    config.model.nf, config.model.ch_mult, config.model.num_res_blocks = 8, (1,), 1
    config.model.attn_resolutions = ()
    config.training.n_iters, config.training.snapshot_freq = 1000, 500
    check_fields(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        net = create_model(config)
        for parameter in net.parameters():  # the last layers start at zero: such a network would return the noise
            parameter.data += 0.05 * torch.randn_like(parameter)
    ema = ExponentialMovingAverage(net.parameters(), 0.9)
    return {"model": net.state_dict(), "ema": ema.state_dict(), "optimizer": {}, "step": 500 * number + 1,
            "config": config_to_dict(config)}


@pytest.fixture
def run(tmp_path):
    """A run folder with the checkpoints 1 and 2."""
    for number in (1, 2):
        write_checkpoint(tmp_path / "run" / "checkpoints" / f"checkpoint_{number}.pth", tiny_checkpoint(number))
    return tmp_path / "run"


def command(*words, launcher=()):
    return [sys.executable, *launcher, "evaluation_fid.py", "--config", CONFIG, *map(str, words)]


def evaluate(repository, *words, launcher=()):
    """Run the script; return (exit status, stdout, stderr)."""
    done = subprocess.run(command(*words, launcher=launcher), cwd=repository, capture_output=True, text=True,
                          timeout=HANGING, check=False)
    return done.returncode, done.stdout, done.stderr


def results(folder):
    path = folder / "eval" / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_a_result(folder, started):
    """Return when the process `started` has written its first result, however slow the machine is."""
    deadline = time.monotonic() + HANGING
    while not read_results(folder / "eval" / "results.jsonl"):
        assert started.poll() is None, "the script ended without a result"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_sweep_measures_every_checkpoint_and_names_the_best(repository, run):
    status, out, err = evaluate(repository, "--ckpt_dir", run, *QUICK)
    assert status == 0, err
    found = results(run)
    assert [(r["checkpoint"], r["step"]) for r in found] == [("checkpoint_1.pth", 501), ("checkpoint_2.pth", 1001)]
    for r in found:
        assert r["sampler"] == "one_step"
        assert r["nfe"] == 1
        assert r["num_samples"] == 100
        assert r["parameters"] == sum(p.numel() for p in tiny_checkpoint(1)["ema"]["shadow_params"])
        assert r["pixel_frechet_distance"] > 0
        assert r["nn_distance"] > 0
        assert 1.5 < r["nn_distance_real"] < 3
        assert r["seeds"]["samples"] == 42
        assert {"torch", "slimflow", "numpy"} <= set(r["versions"])
    best = min(found, key=lambda r: r["pixel_frechet_distance"])
    assert f"best: {best['checkpoint']}, pixel Fréchet distance {best['pixel_frechet_distance']:.4g}" in out
    assert "FID" not in out
    assert (run / "eval" / "fid.png").stat().st_size > 1000


def test_processes_and_batch_size_change_nothing_and_files_of_the_samples_measure_the_same(repository, run):
    words = ("--ckpt_dir", run / "checkpoints" / "checkpoint_1.pth", *QUICK, "--config.eval.save_samples=true")
    status, _, err = evaluate(repository, *words)
    assert status == 0, err
    alone = np.load(run / "eval" / "checkpoint_1_one_step.npy")
    status, out, err = evaluate(repository, *words, "--config.eval.batch_size=7", "--force", launcher=TWO_PROCESSES)
    assert status == 0, err
    assert out.count("best: ") == 1
    together = np.load(run / "eval" / "checkpoint_1_one_step.npy")
    assert alone.shape == (100, 1, 8, 8)
    assert np.abs(alone.astype(int) - together).max() <= 1  # truncation turns the last bit of a float into a level
    assert (alone == together).mean() > 0.99
    one, two = results(run)
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("pixel_frechet_distance", "pixel_kernel_distance", "pixel_precision", "pixel_recall", "nn_distance"):
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6)

    status, _, err = evaluate(repository, "--data_dir", run / "eval" / "checkpoint_1_one_step.npy", *QUICK)
    assert status == 0, err
    of_files = results(run / "eval")[0]
    assert of_files["sampler"] is None
    assert of_files["pixel_frechet_distance"] == pytest.approx(two["pixel_frechet_distance"], rel=1e-9)


def test_an_interrupted_sweep_goes_on_with_what_is_missing(repository, run):
    words = ("--ckpt_dir", run, *QUICK)
    second = run / "checkpoints" / "checkpoint_2.pth"
    content = second.read_bytes()
    second.write_bytes(content[:100])  # the sweep waits for it to be whole, however slow this machine is
    started = subprocess.Popen(command(*words, "--config.eval.wait=true"), cwd=repository, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    wait_for_a_result(run, started)
    started.send_signal(signal.SIGKILL)
    started.wait()
    before = results(run)
    assert [r["checkpoint"] for r in before] == ["checkpoint_1.pth"]
    second.write_bytes(content)
    status, out, err = evaluate(repository, *words)
    assert status == 0, err
    assert "checkpoint_1.pth: already measured" in out
    assert results(run)[:1] == before
    assert [r["checkpoint"] for r in results(run)] == ["checkpoint_1.pth", "checkpoint_2.pth"]


def test_a_waiting_sweep_takes_checkpoints_as_training_completes_them_and_ends_with_the_last(repository, run):
    second = run / "checkpoints" / "checkpoint_2.pth"
    content = second.read_bytes()
    second.unlink()
    started = subprocess.Popen(command("--ckpt_dir", run, *QUICK, "--config.eval.wait=true"), cwd=repository,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_a_result(run, started)
    second.write_bytes(content[: len(content) // 2])  # a copy on its way
    time.sleep(0.5)
    assert started.poll() is None
    second.write_bytes(content)
    out, err = started.communicate(timeout=HANGING)
    assert started.returncode == 0, err
    assert [r["checkpoint"] for r in results(run)] == ["checkpoint_1.pth", "checkpoint_2.pth"]


def test_inception_metrics_come_from_one_pass_against_a_reference_with_features(repository, run, tmp_path):
    inception = (f"--config.eval.inception_path={write_stand_in(tmp_path)}",
                 "--config.eval.feature_extractor=inception")
    extractor = inception_extractor(tmp_path / FILE_NAME, "cpu")
    images = array_source(load_images(load_config(CONFIG)).images[:90], "90 digits")
    reference = measure_source(images, extractor, 30, Processes(0, 1, torch.device("cpu")), max_features=60)
    reference.sigma.diagonal().add_(1e-3)  # of full rank, which is quicker
    write_statistics(tmp_path / "reference.npz", reference, extractor)
    status, out, err = evaluate(repository, "--ckpt_dir", run / "checkpoints" / "checkpoint_1.pth", *QUICK, *inception,
                                "--target_path", tmp_path / "reference.npz")
    assert status == 0, err
    assert "100 samples for 2048 features: their covariance is singular" in err
    found = results(run)[0]
    assert f"FID {found['fid']:.4g}: 100 samples" in out
    assert found["kid"] > 0
    assert 0 <= found["precision"] <= 1
    assert 0 <= found["recall"] <= 1
    assert found["inception_score"] >= 1
    assert found["target"] == str(tmp_path / "reference.npz")


@pytest.mark.parametrize("launcher", [(), TWO_PROCESSES], ids=["one process", "two processes"])
def test_the_reference_of_a_data_set_holds_all_its_images_in_their_order(repository, tmp_path, launcher):
    path = tmp_path / "digits.npz"
    words = [sys.executable, *launcher, "-m", "tools.reference_statistics", "--config", CONFIG, "--output", str(path)]
    done = subprocess.run(words, cwd=repository, capture_output=True, text=True, timeout=HANGING, check=False)
    assert done.returncode == 0, done.stderr
    pixels = load_images(load_config(CONFIG)).images.reshape(1797, 64) / 127.5 - 1
    with np.load(path) as arrays:
        np.testing.assert_allclose(arrays["mu"], pixels.mean(0), atol=1e-6)
        np.testing.assert_allclose(arrays["sigma"], np.cov(pixels, rowvar=False), atol=1e-6)
        np.testing.assert_allclose(arrays["features"], pixels, atol=1e-6)
        assert arrays["count"] == 1797
