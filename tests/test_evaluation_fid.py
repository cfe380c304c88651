"""evaluation_fid.py as users run it: sweeps, resuming, waiting, several processes, files, Inception's whole path."""

import collections
import dataclasses
import errno
import itertools
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import evaluation_fid
from configs.command_line import load_config, parse_command_line
from datasets import load_images
from metrics.features import InceptionExtractor
from metrics.results import key_of, read_results
from metrics.statistics import ArrayImages, Reference, measure_source, write_statistics
from models.checkpoint import write_checkpoint
from runtime.devices import Processes
from runtime.terminal import UserError
from tests.helpers import ALONE, DIGITS, config_of, small_checkpoint
from tests.metrics.inception_stand_in import FILE_NAME, write_stand_in
from tests.processes import Script, output_of, run_ranks, start_ranks

QUICK = ("--config.sampling.use_ode_sampler=one_step", "--config.eval.num_samples=100", "--config.eval.nearest=50")


def tiny_checkpoint(number):
    """The content of a checkpoint of a small random network; the run's last is number 2."""
    return small_checkpoint(number, 500 * number + 1, training__n_iters=1000, training__snapshot_freq=500,
                            flow__eps=0.002)


@pytest.fixture
def run(tmp_path):
    """A run folder with the checkpoints 1 and 2."""
    for number in (1, 2):
        write_checkpoint(tmp_path / "run" / "checkpoints" / f"checkpoint_{number}.pth", tiny_checkpoint(number))
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def without_cost_and_figures(monkeypatch):
    """main() in this process times no network and draws nothing; scripts in processes of their own do."""
    monkeypatch.setattr(evaluation_fid, "cost_of", lambda net: {})
    monkeypatch.setattr(evaluation_fid, "cost_line", lambda cost: "cost not measured")
    monkeypatch.setattr(evaluation_fid.results, "draw_figure", lambda *arguments: None)


def run_main(*arguments):
    """Run main() in this process."""
    evaluation_fid.main(*parse_command_line(["evaluation_fid.py", "--config", DIGITS, *map(str, arguments)], "",
                                            evaluation_fid.FLAGS))


def results(folder):
    return read_results(folder / "eval" / "results.jsonl")


def test_a_sweep_measures_every_checkpoint_and_names_the_best(run):
    out = output_of(run.parent, "evaluation_fid.py", "--config", DIGITS, "--ckpt_dir", run, *QUICK)
    found = results(run)
    assert [(r["checkpoint"], r["step"]) for r in found] == [("checkpoint_1.pth", 501), ("checkpoint_2.pth", 1001)]
    for r in found:
        assert (r["sampler"], r["nfe"], r["num_samples"], r["seeds"]["samples"]) == ("one_step", 1, 100, 42)
        assert r["eps"] == 0.002  # the run's, not the config file's
        assert r["parameters"] == sum(p.numel() for p in tiny_checkpoint(1)["ema"]["shadow_params"])
        assert r["pixel_frechet_distance"] > 0 and r["nn_distance"] > 0 and 1.5 < r["nn_distance_real"] < 3
        assert {"torch", "slimflow", "numpy"} <= set(r["versions"])
    best = min(found, key=lambda r: r["pixel_frechet_distance"])
    assert f"best: {best['checkpoint']}, pixel Fréchet distance {best['pixel_frechet_distance']:.4g}" in out
    assert "FID" not in out
    assert out.count("as in training, not as in the config file: flow.eps 0.002 (not 0.001)") == 1
    assert (run / "eval" / "fid.png").stat().st_size > 1000


def test_processes_and_batch_size_change_nothing_and_files_of_the_samples_measure_the_same(run):
    arguments = ("--ckpt_dir", run / "checkpoints" / "checkpoint_1.pth", *QUICK, "--config.eval.save_samples=true")
    run_main(*arguments)
    (file,) = (run / "eval").glob("checkpoint_1_one_step_*.npy")
    alone = np.load(file)
    file.unlink()  # samples that are asked for and missing are drawn again
    ranks = start_ranks(run.parent, "evaluation_fid.py", "--config", DIGITS, *arguments, "--config.eval.batch_size=7")
    assert [rank.wait() for rank in ranks] == [0, 0], "\n".join(rank.log for rank in ranks)
    assert ["best: " in rank.log for rank in ranks] == [True, False]
    together = np.load(file)
    assert alone.shape == (100, 1, 8, 8)
    assert np.abs(alone.astype(int) - together).max() <= 1  # truncation turns the last bit of a float into a level
    assert (alone == together).mean() > 0.99
    one, two = results(run)
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("pixel_frechet_distance", "pixel_kernel_distance", "pixel_precision", "pixel_recall", "nn_distance"):
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6)

    run_main("--data_dir", file, *QUICK)
    of_files = results(run / "eval")[0]
    assert of_files["sampler"] is None
    assert of_files["pixel_frechet_distance"] == pytest.approx(two["pixel_frechet_distance"], rel=1e-9)


def test_samples_of_another_tolerance_seed_or_checkpoint_of_the_same_name_have_their_own_file(run):
    checkpoint = run / "checkpoints/checkpoint_1.pth"
    arguments = ("--ckpt_dir", checkpoint, "--config.sampling.use_ode_sampler=rk45", "--config.eval.num_samples=8",
             "--config.eval.save_samples=true", "--config.eval.nearest=0", "--config.sampling.ode_tol=0.1")
    for more in ((), ("--config.sampling.ode_tol=0.01",), ("--config.seed=1",), ("--use_ema=false",)):
        run_main(*arguments, *more)
    write_checkpoint(checkpoint, tiny_checkpoint(2))
    run_main(*arguments)
    assert len({r["samples"] for r in results(run)}) == 5
    arrays = [np.load(run / "eval" / r["samples"]) for r in results(run)]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(arrays, 2) if a is not arrays[3])


def test_what_one_process_finds_wrong_is_one_sentence_in_both(run):
    images = np.zeros((40, 1, 8, 8), np.float32)
    images[33, 0, 2, 2] = np.nan
    np.save(run / "samples.npy", images)
    ranks = start_ranks(run.parent, "evaluation_fid.py", "--config", DIGITS, "--data_dir", run / "samples.npy")
    assert [rank.wait() for rank in ranks] == [2, 2]
    for rank in ranks:
        assert "samples.npy: sample 33 is not finite" in rank.log
        assert "Traceback" not in rank.log
    assert not (run / "eval").exists()


def test_a_killed_sweep_goes_on_with_what_is_missing_and_waits_until_the_last_checkpoint_is_complete(run):
    second = run / "checkpoints" / "checkpoint_2.pth"
    content = second.read_bytes()
    second.unlink()
    arguments = ("--config", DIGITS, "--ckpt_dir", run, *QUICK, "--config.eval.wait=true")
    Script(run.parent, "evaluation_fid.py", arguments).kill_when(lambda: results(run))
    before = results(run)
    assert [r["checkpoint"] for r in before] == ["checkpoint_1.pth"]
    second.write_bytes(content[: len(content) // 2])  # a copy on its way
    again = Script(run.parent, "evaluation_fid.py", arguments)
    while "checkpoint_1.pth: already measured" not in again.log:
        assert again.process.is_alive(), again.log
        time.sleep(0.02)
    time.sleep(0.5)
    assert again.process.is_alive()
    second.write_bytes(content)
    assert again.wait() == 0, again.log
    assert results(run)[:1] == before
    assert [r["checkpoint"] for r in results(run)] == ["checkpoint_1.pth", "checkpoint_2.pth"]


def test_inception_metrics_come_from_one_pass_against_a_reference_with_features(run, tmp_path, capsys):
    inception = (f"--config.eval.inception_path={write_stand_in(tmp_path)}",
                 "--config.eval.feature_extractor=inception")
    extractor = InceptionExtractor(tmp_path / FILE_NAME, "cpu")
    images = ArrayImages(load_images(load_config(DIGITS)).images[:30], "30 digits")
    reference = measure_source(images, extractor, 30, ALONE, max_features=20)
    reference.sigma.diagonal().add_(1e-3)  # of full rank, which is quicker
    write_statistics(tmp_path / "reference.npz", reference, extractor)
    run_main("--ckpt_dir", run / "checkpoints" / "checkpoint_1.pth", *QUICK, "--config.eval.num_samples=30", *inception,
             "--target_path", tmp_path / "reference.npz")
    out = capsys.readouterr()
    assert "30 samples for 2048 features: their covariance is singular" in out.out + out.err
    found = results(run)[0]
    assert f"FID {found['fid']:.4g}: 30 samples" in out.out
    assert found["kid"] > 0 and 0 <= found["precision"] <= 1 and 0 <= found["recall"] <= 1
    assert found["inception_score"] >= 1
    assert found["target"] == str(tmp_path / "reference.npz")


def test_what_was_measured_is_measured_again_when_its_files_or_the_targets_changed(run):
    source, target = run / "samples.npy", run / "target.npy"
    images = load_images(load_config(DIGITS)).images
    np.save(source, images[:60])
    np.save(target, images[:500])
    arguments = ("--data_dir", source, "--target_path", target, "--config.eval.nearest=0")
    for changed in (None, None, source, target):
        if changed:
            np.save(changed, images[-len(np.load(changed)):])
        run_main(*arguments)
    found = [r["pixel_frechet_distance"] for r in results(run)]
    assert len(found) == len(set(found)) == 3  # the second call has found what the first one wrote


def test_images_in_the_working_directory_have_a_name_and_their_results_are_not_among_them(run, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for number, level in enumerate((0, 9, 200)):
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(tmp_path / "images" / f"{number}.png")
    monkeypatch.chdir(tmp_path / "images")
    for _ in range(2):
        run_main("--data_dir=.", "--config.eval.nearest=0")
    assert [r["checkpoint"] for r in results(tmp_path)] == ["images"]


@pytest.mark.parametrize("count", [1, 2])
def test_the_reference_of_a_data_set_holds_all_its_images_in_their_order(tmp_path, count):
    path = tmp_path / "digits.npz"
    for status, log in run_ranks(tmp_path, "tools.reference_statistics", "--config", DIGITS, "--output", path,
                                 count=count):
        assert status == 0, log
    pixels = load_images(load_config(DIGITS)).images.reshape(1797, 64) / 127.5 - 1
    with np.load(path) as arrays:
        np.testing.assert_allclose(arrays["mu"], pixels.mean(0), atol=1e-6)
        np.testing.assert_allclose(arrays["sigma"], np.cov(pixels, rowvar=False), atol=1e-6)
        np.testing.assert_allclose(arrays["features"], pixels, atol=1e-6)
        assert arrays["count"] == 1797


# What one sampling of a network does, in this process.


def small_config(**fields):
    return config_of(DIGITS, **({"eval__num_samples": 12, "eval__batch_size": 4, "training__progress": "false",
                                 "training__precision": "fp32", "sampling__use_ode_sampler": "euler",
                                 "sampling__sample_N": 3} | fields))


def samples(net, config):
    """All samples of a network, as the script makes them, and the evaluations that they took."""
    nfes = []
    batches = evaluation_fid.sample_batches(net, config, ALONE, "net", nfes.append)
    return torch.cat(list(batches)), torch.cat(nfes)


class Linear(torch.nn.Module):
    """A network of one layer that notes its inputs; `limit` is the largest batch that the memory holds."""

    def __init__(self, limit=12):
        super().__init__()
        self.layer, self.limit, self.seen = torch.nn.Conv2d(1, 1, 1), limit, []

    def forward(self, x, t, label=None):
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.seen.append(x.clone())
        return self.layer(x)


def test_evaluation_starts_at_its_own_noise_and_not_at_that_of_the_pairs():
    net = Linear()
    samples(net, small_config())
    first = net.seen[0][0].flatten().numpy()
    own = [np.random.Generator(np.random.Philox(key=[42, stream], counter=[0, 0, 0, 0])).standard_normal(
        64, dtype=np.float32) for stream in range(10)]
    assert [np.array_equal(first, noise) for noise in own] == [stream == 9 for stream in range(10)]


def test_the_training_images_are_searched_only_for_samples_that_are_asked_for(monkeypatch):
    found = []
    monkeypatch.setattr(evaluation_fid, "nearest_distances", lambda queries, images: (
        found.append(len(queries)), torch.zeros(len(queries)))[1])
    monkeypatch.setattr(Processes, "from_main", lambda self, work: work())
    reference = Reference(small_config(eval__nearest=0), "", ALONE)
    target = reference.statistics
    for nearest, rank, searches in ((0, 0, 0), (5, 0, 2), (5, 1, 0)):
        reference.config.eval.nearest, reference.processes = nearest, Processes(rank, 2, torch.device("cpu"))
        samples = dataclasses.replace(target, count=12, images=torch.zeros(max(0, nearest - 6 * rank), 1, 8, 8))
        found.clear()
        evaluation_fid.metrics_of(samples, samples.images, target, reference, 0.0)
        assert len(found) == searches and sum(found) == nearest * (searches > 0)


def test_a_batch_too_large_for_the_memory_is_halved_with_a_sentence_and_gives_the_same_samples(capsys):
    net = Linear()
    expected, nfe = samples(net, small_config())
    net.limit = 1
    again, nfe_again = samples(net, small_config())
    assert torch.equal(again, expected)
    assert torch.equal(nfe_again, nfe)
    assert "config.eval.batch_size 4 does not fit the GPU: trying 2" in capsys.readouterr().err
    with pytest.raises(torch.OutOfMemoryError):
        samples(Linear(limit=0), small_config())


def test_samples_that_share_their_steps_belong_to_their_batch_size_and_number_of_processes():
    def identities(step_control):
        return {key_of(evaluation_fid.sampling_identity(small_config(
            sampling__use_ode_sampler="rk45", sampling__step_control=step_control, eval__batch_size=size), processes))
            for size in (4, 8) for processes in (1, 2)}

    assert len(identities("batch")) == 4 and len(identities("sample")) == 1


def test_the_images_of_a_folder_that_are_searched_are_of_all_its_classes(tmp_path):
    images = load_images(load_config(DIGITS)).images
    for name, part in (("copies", images[:8, 0]), ("others", 255 - images[:12, 0])):
        (tmp_path / "folder" / name).mkdir(parents=True)
        for number, image in enumerate(part):
            Image.fromarray(image).save(tmp_path / "folder" / name / f"{number}.png")
    run_main("--data_dir", tmp_path / "folder", "--config.eval.nearest=5", "--config.eval.num_samples=20")
    assert results(tmp_path)[-1]["nn_distance"] > 1  # the median of two copies and three others


def test_a_batch_whose_samples_share_their_steps_is_not_halved():
    config = small_config(sampling__use_ode_sampler="rk45", sampling__step_control="batch")
    with pytest.raises(torch.OutOfMemoryError):
        samples(Linear(limit=2), config)


def test_a_compiled_batch_that_is_halved_is_compiled_again_in_the_smaller_size(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)
    net, config = Linear(), small_config(eval__batch_size=10)
    expected, _ = samples(net, config)
    net.limit, config.training.compile = 5, True
    net.seen.clear()
    found, _ = samples(net, config)
    assert (expected.int() - found.int()).abs().max() <= 1 and [len(x) for x in net.seen] == [5] * 9
    assert capsys.readouterr().out.count("the first time takes a minute or more") == 2


def test_weights_are_cast_once_for_all_evaluations_of_a_batch_in_bf16():
    class Casts(TorchDispatchMode):
        counts = collections.Counter()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
                self.counts[tuple(args[0].shape)] += 1
            return function(*args, **(kwargs or {}))

    net, config = Linear(), small_config(training__precision="bf16")
    with Casts() as casts:
        samples(net, config)
    assert len(net.seen) == 9  # three batches of three steps
    assert casts.counts[(1, 1, 1, 1)] == 1
    assert net.seen[1].dtype == torch.float32  # what the sampler adds up stays exact


def test_a_result_that_cannot_be_written_is_printed(tmp_path, capsys, monkeypatch):
    def full(path, result):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(evaluation_fid.results, "append_result", full)
    result = {"checkpoint": "c.pth", "sampler": None, "num_samples": 7, "fid": 4.25, "protocol": "p", "reference": "r",
              "versions": {}}
    with pytest.raises(OSError, match="no space"):
        evaluation_fid.publish(result, tmp_path / "results.jsonl", ALONE)
    assert json.dumps(result) in capsys.readouterr().out


def test_compiled_checkpoints_of_a_sweep_share_one_graph_and_measure_the_same(run, cuda_graphs):
    arguments = ("--ckpt_dir", run, *QUICK, "--config.eval.batch_size=30", "--config.training.progress=false")
    run_main(*arguments)
    run_main(*arguments, "--config.training.compile=true", "--force")
    assert cuda_graphs == ["default"]
    first, second, *again = (r["pixel_frechet_distance"] for r in results(run))
    assert again == pytest.approx([first, second], rel=1e-3) and first != pytest.approx(second, rel=1e-2)


@pytest.fixture
def sampled(monkeypatch):
    """A list of the titles of the networks that main() in this process samples and measures, which is left out."""
    titles = []

    def pretend(net, title, config, reference):
        titles.append(title)
        return {"nfe": 1.0, "pixel_frechet_distance": 1.0, "reference": "r", "protocol": "p", "versions": {},
                "seconds": 1.0}, None

    monkeypatch.setattr(evaluation_fid, "measure_network", pretend)
    return titles


def test_what_a_number_depends_on_makes_it_another_evaluation(run, sampled, tmp_path):
    for brightness in range(2):
        Image.fromarray(np.full((8, 8), brightness, np.uint8)).save(tmp_path / f"{brightness}.png")
    own = ("data.dataset=custom", f"data.data_root={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}")
    for fields in ((), ("eval.num_samples=50",), ("seed=1",), ("sampling.ode_tol=0.5",), ("flow.eps=0.01",),
                   ("eval.nearest=7",), ("sampling.init_noise_scale=0.9",), ("training.precision=fp32",),
                   ("eval.precision_recall=false",), own):
        run_main("--ckpt_dir", run, "--config.eval.end_ckpt=1", *(f"--config.{field}" for field in fields))
        assert sampled == ["checkpoint_1"], fields
        sampled.clear()
    run_main("--ckpt_dir", run, "--config.eval.end_ckpt=1")
    assert sampled == []


def test_a_flag_that_contradicts_the_checkpoint_is_refused_also_where_a_result_is_there(run, sampled):
    run_main("--ckpt_dir", run)
    with pytest.raises(UserError, match="model.nf is 8 in the checkpoint and 16 here"):
        run_main("--ckpt_dir", run, "--config.model.nf=16")
    assert len(sampled) == 2
