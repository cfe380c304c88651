"""The paper's own road on a recorded network: pairs of an EDM teacher, annealing reflow, distillation."""

import json

import numpy as np
import pytest
import torch

from models import load_model
from models.checkpoint import read_checkpoint
from runtime.files import file_digest
from tests.models.edm_networks import golden_file, golden_numbers
from tests.processes import run_ranks, run_script

CONFIG = "configs/rectified_flow/cifar10_rf_gaussian.py"
TEACHER = "edm_ddpmpp_cond"  # 16×16, 10 classes: nothing of the config's but the channels
FAST = ["--config.sampling.use_ode_sampler", "heun", "--config.sampling.sample_N", 3, "--config.training.batch_size", 4]
STUDENT = ["--config", CONFIG, "--config.training.batch_size", 4, "--config.training.snapshot_freq", 4,
           "--config.training.snapshot_freq_for_preemption", 4, "--config.training.snapshot_sampling", 0,
           "--config.training.n_iters", 4, "--config.training.record_iters", 2, "--config.data.image_size", 16,
           "--config.data.num_classes", 10, "--config.model.nf", 8, "--config.model.ch_mult", "(1, 2)",
           "--config.model.num_res_blocks", 1, "--config.model.attn_resolutions", "(8,)"]


@pytest.fixture(autouse=True)
def in_repository(repository, monkeypatch):
    monkeypatch.chdir(repository)


def run(folder, script, *words):
    """Run a script to its end and return what it printed."""
    status, log = run_script(folder, script, *words)
    assert status == 0, log
    return log


def pair_words(root, *more, teacher=TEACHER):
    return ["--config", CONFIG, "--ckpt_path", golden_file(f"{teacher}.pkl"), "--data_root", root,
            "--config.sampling.total_number_of_samples", 16, *FAST, *more]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, request):
    """A folder of 16 pairs of the teacher."""
    folder = tmp_path_factory.mktemp("edm")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        (folder / "log").write_text(run(folder, "generate_data.py", *pair_words(folder)))
    return folder / "42"


def test_pairs_say_which_teacher_made_them_and_how(pairs):
    """File, digest, solver, evaluations and class are in pairs.json, and the licence was printed once."""
    about = json.loads((pairs / "pairs.json").read_text())
    file = golden_file(f"{TEACHER}.pkl")
    assert about["checkpoint"] == str(file) and about["checkpoint_digest"] == file_digest(file)
    assert about["identity"]["sampling.use_ode_sampler"] == "heun" and about["identity"]["sampling.sample_N"] == 3
    assert about["config"]["sampling"]["class_label"] == -1 and about["config"]["data"]["image_size"] == 16
    assert np.load(pairs / "z1.npy").shape == (16, 3, 16, 16) and np.load(pairs / "label.npy").shape == (16, 10)
    assert (pairs.parent / "log").read_text().count("CC BY-NC-SA 4.0") == 1


def test_two_processes_and_compact_storage_make_the_same_pairs(pairs, tmp_path):
    """An EDM teacher is divided over processes and stored like any other."""
    run_ranks(tmp_path, "generate_data.py", *pair_words(tmp_path / "two"))
    run(tmp_path, "generate_data.py", *pair_words(tmp_path / "compact", "--config.sampling.pair_storage", "compact"))
    assert (tmp_path / "two/42/z1.npy").read_bytes() == (pairs / "z1.npy").read_bytes()
    assert not (tmp_path / "compact/42/z0.npy").exists()
    np.testing.assert_allclose(np.load(tmp_path / "compact/42/z1.npy"), np.load(pairs / "z1.npy"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [5, 18])
def test_recorded_latents_become_the_recorded_images(tmp_path, steps):
    """--z0_path and the sampler edm: EDM's own protocol through our script."""
    _, numbers = golden_numbers("edm_ncsnpp")
    np.save(tmp_path / "z0.npy", numbers["latents"].float().numpy())
    run(tmp_path, "generate_data.py", *pair_words(
        tmp_path, "--z0_path", tmp_path / "z0.npy", "--config.sampling.use_ode_sampler", "edm",
        "--config.sampling.sample_N", steps, "--config.sampling.total_number_of_samples", 3, teacher="edm_ncsnpp"))
    images = np.load(tmp_path / "42/z1.npy")
    assert np.abs(images - numbers[f"images_{steps}"].numpy()).max() < 1e-4


def test_flag_that_contradicts_the_file_is_refused(tmp_path):
    """A CIFAR-10 config serves for a 16×16 network, but --config.data.image_size 32 does not."""
    status, log = run_script(tmp_path, "generate_data.py", *pair_words(tmp_path, "--config.data.image_size", 32))
    assert status == 2 and "data.image_size is 16 in the checkpoint and 32 here" in log


def test_annealing_reflow_and_distillation_from_the_teachers_pairs(pairs, tmp_path):
    """A smaller student is trained on the pairs, and then guided: by its 2-flow, and by the snapshot itself."""
    common = [*STUDENT, "--config.work_dir", tmp_path, "--config.data.reflow_data_root", pairs.parent]
    run(tmp_path, "train.py", *common, "--config.expr", "reflow", "--config.training.x0_randomness", "warmup_3",
        "--config.flow.h_flip", "true")
    two_flow = tmp_path / "reflow/checkpoints/checkpoint_1.pth"
    distilled = [*common, "--config.flow.flow_t_schedule", "t0", "--config.flow.flow_alpha_t", "t0",
                 "--config.flow.use_teacher", "true", "--config.flow.pre_train_model", two_flow]
    run(tmp_path, "train.py", *distilled, "--config.expr", "one_step")
    run(tmp_path, "train.py", *distilled, "--config.expr", "guided_by_edm", "--config.flow.teacher_model",
        golden_file(f"{TEACHER}.pkl"))
    one, other = (load_model(tmp_path / f"{name}/checkpoints/checkpoint_1.pth") for name in ("one_step",
                                                                                           "guided_by_edm"))
    assert any(not torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_student_that_starts_as_its_teacher_is_trained_resumed_and_used(pairs, tmp_path):
    """model.preconditioning edm: from the snapshot, through an interruption, to pairs of its own."""
    snapshot = golden_file(f"{TEACHER}.pkl")
    words = [*STUDENT, "--config.work_dir", tmp_path, "--config.data.reflow_data_root", pairs.parent,
             "--config.model.nf", 16, "--config.model.preconditioning", "edm",
             "--config.flow.pre_train_model", snapshot]
    log = run(tmp_path, "train.py", *words, "--config.expr", "start", "--config.optim.lr", 0.0)
    assert "0 did not" in log
    start, teacher = (load_model(p) for p in (tmp_path / "start/checkpoints/checkpoint_1.pth", snapshot))
    assert all(torch.equal(p, q) for p, q in zip(start.parameters(), teacher.parameters(), strict=True))
    run(tmp_path, "train.py", *words, "--config.expr", "twice")
    run(tmp_path, "train.py", *words, "--config.expr", "twice", "--config.training.n_iters", 8)
    run(tmp_path, "train.py", *words, "--config.expr", "once", "--config.training.n_iters", 8)
    files = [tmp_path / f"{name}/checkpoints/checkpoint_2.pth" for name in ("twice", "once")]
    twice, once = (read_checkpoint(file)["model"] for file in files)
    assert all(torch.equal(twice[name], once[name]) for name in once)
    words = pair_words(tmp_path / "pairs")
    words[words.index("--ckpt_path") + 1] = files[0]
    run(tmp_path, "generate_data.py", *words)
    assert np.isfinite(np.load(tmp_path / "pairs/42/z1.npy")).all()


def test_teacher_can_be_sampled_measured_and_described(tmp_path):
    """image_sampling.py, evaluation_fid.py and tools.describe take a snapshot where they take a checkpoint."""
    snapshot = tmp_path / f"{TEACHER}.pkl"
    snapshot.write_bytes(golden_file(snapshot.name).read_bytes())
    run(tmp_path, "image_sampling.py", "--config", CONFIG, "--sampling_dir", snapshot, "--classes", "0,3",
        "--config.sampling.use_ode_sampler", "euler", "--config.sampling.sample_N", 2)
    assert list((tmp_path / "eval_sample" / TEACHER).glob("euler*.png"))
    assert "decoder 2" in run(tmp_path, "tools.describe", "--config", CONFIG, "--ckpt_path", snapshot)
    np.save(tmp_path / "images.npy", np.random.default_rng(0).uniform(-1, 1, (16, 3, 16, 16)).astype(np.float32))
    log = run(tmp_path, "evaluation_fid.py", "--config", CONFIG, "--ckpt_dir", snapshot, "--target_path",
              tmp_path / "images.npy", "--config.eval.feature_extractor", "pixels", "--config.eval.num_samples", 16,
              "--config.sampling.use_ode_sampler", "edm", "--config.sampling.sample_N", 2,
              "--config.data.data_root", tmp_path)
    assert f"best: {snapshot.name}" in log
