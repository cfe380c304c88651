"""The paper's own road on a recorded network: pairs of an EDM teacher, annealing reflow, distillation."""

import json

import numpy as np
import pytest
import torch

from models.checkpoint import load_model, read_checkpoint
from runtime.files import file_digest
from tests.helpers import CIFAR10, overrides
from tests.models.edm_networks import golden_file, golden_numbers
from tests.processes import output_of

TEACHER = "edm_ddpmpp_cond"  # 16×16, 10 classes: nothing of the config's but the channels
FAST = {"sampling__use_ode_sampler": "heun", "sampling__sample_N": 3, "training__batch_size": 4,
        "sampling__total_number_of_samples": 16}
STUDENT = {"training__batch_size": 4, "training__snapshot_freq": 4, "training__snapshot_freq_for_preemption": 4,
           "training__snapshot_sampling": 0, "training__n_iters": 4, "training__record_iters": 2,
           "data__image_size": 16, "data__num_classes": 10, "model__nf": 8, "model__ch_mult": (1, 2),
           "model__num_res_blocks": 1, "model__attn_resolutions": (8,)}


def pair_arguments(root, *flags, teacher=None, **fields):
    return ["--config", CIFAR10, "--ckpt_path", teacher or golden_file(f"{TEACHER}.pkl"), "--data_root", root, *flags,
            *overrides(**(FAST | fields))]


def train(folder, expr, pairs, **fields):
    """Train a student on pairs; return the path of its first checkpoint, and what train.py printed."""
    fields = STUDENT | {"work_dir": folder, "data__reflow_data_root": pairs.parent} | fields
    printed = output_of(folder, "train.py", "--config", CIFAR10, *overrides(expr=expr, **fields))
    return folder / expr / "checkpoints/checkpoint_1.pth", printed


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder of 16 pairs of the teacher."""
    folder = tmp_path_factory.mktemp("edm")
    (folder / "log").write_text(output_of(folder, "generate_data.py", *pair_arguments(folder)))
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


def test_recorded_latents_become_the_recorded_images(tmp_path):
    """--z0_path and the sampler edm: EDM's own protocol through our script."""
    _, numbers = golden_numbers("edm_ncsnpp")
    np.save(tmp_path / "z0.npy", numbers["latents"].float().numpy())
    output_of(tmp_path, "generate_data.py", *pair_arguments(
        tmp_path, "--z0_path", tmp_path / "z0.npy", teacher=golden_file("edm_ncsnpp.pkl"),
        sampling__use_ode_sampler="edm", sampling__sample_N=18, sampling__total_number_of_samples=3))
    images = np.load(tmp_path / "42/z1.npy")
    assert np.abs(images - numbers["images_18"].numpy()).max() < 1e-4


def test_annealing_reflow_and_distillation_from_the_teachers_pairs(pairs, tmp_path):
    """A smaller student is trained on the pairs, and then guided: by its 2-flow, and by the snapshot itself."""
    two_flow, _ = train(tmp_path, "reflow", pairs, training__x0_randomness="warmup_3", flow__h_flip=True)
    distilled = {"flow__flow_t_schedule": "t0", "flow__flow_alpha_t": "t0", "flow__use_teacher": True,
                 "flow__pre_train_model": two_flow}
    one, _ = train(tmp_path, "one_step", pairs, **distilled)
    other, _ = train(tmp_path, "guided_by_edm", pairs, flow__teacher_model=golden_file(f"{TEACHER}.pkl"), **distilled)
    one, other = load_model(one), load_model(other)
    assert any(not torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_student_that_starts_as_its_teacher_is_trained_resumed_and_used(pairs, tmp_path):
    """model.preconditioning edm: from the snapshot, through an interruption, to pairs of its own."""
    snapshot = golden_file(f"{TEACHER}.pkl")
    own = {"model__nf": 16, "model__preconditioning": "edm", "flow__pre_train_model": snapshot}
    start, log = train(tmp_path, "start", pairs, optim__lr=0.0, **own)
    assert "0 did not" in log
    start, teacher = load_model(start), load_model(snapshot)
    assert all(torch.equal(p, q) for p, q in zip(start.parameters(), teacher.parameters(), strict=True))
    for expr, updates in (("twice", 4), ("twice", 8), ("once", 8)):
        train(tmp_path, expr, pairs, training__n_iters=updates, **own)
    files = [tmp_path / f"{name}/checkpoints/checkpoint_2.pth" for name in ("twice", "once")]
    twice, once = (read_checkpoint(file)["model"] for file in files)
    assert all(torch.equal(twice[name], once[name]) for name in once)
    output_of(tmp_path, "generate_data.py", *pair_arguments(tmp_path / "pairs", teacher=files[0]))
    assert np.isfinite(np.load(tmp_path / "pairs/42/z1.npy")).all()


def test_teacher_can_be_sampled_measured_and_described(tmp_path):
    """image_sampling.py, evaluation_fid.py and tools.describe take a snapshot where they take a checkpoint."""
    snapshot = tmp_path / f"{TEACHER}.pkl"
    snapshot.write_bytes(golden_file(snapshot.name).read_bytes())
    output_of(tmp_path, "image_sampling.py", "--config", CIFAR10, "--sampling_dir", snapshot, "--classes", "0,3",
              *overrides(sampling__use_ode_sampler="euler", sampling__sample_N=2))
    assert list((tmp_path / "eval_sample" / TEACHER).glob("euler*.png"))
    assert "decoder 2" in output_of(tmp_path, "tools.describe", "--config", CIFAR10, "--ckpt_path", snapshot)
    np.save(tmp_path / "images.npy", np.random.default_rng(0).uniform(-1, 1, (16, 3, 16, 16)).astype(np.float32))
    log = output_of(tmp_path, "evaluation_fid.py", "--config", CIFAR10, "--ckpt_dir", snapshot, "--target_path",
                    tmp_path / "images.npy", *overrides(eval__feature_extractor="pixels", eval__num_samples=16,
                    sampling__use_ode_sampler="edm", sampling__sample_N=2, data__data_root=tmp_path))
    assert f"best: {snapshot.name}" in log
