"""Every objective trains a network on digits through train.py: switches on the command line, losses in the log."""

import functools
import json
import math
import urllib.error

import lpips
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import train
from configs.command_line import parse_command_line
from flows import losses
from models.checkpoint import read_checkpoint
from runtime.terminal import UserError

UPDATES = 3
SMALL = (f"--config.training.n_iters {UPDATES} --config.training.batch_size 4 --config.training.record_iters 1 "
         "--config.training.snapshot_sampling 0 --config.training.progress false --config.optim.warmup 0")
UNLABELLED = "--config.model.nf 8"
LABELLED = ("--config.model.name DhariwalUNet --config.model.nf 16 --config.data.num_classes 10 "
            "--config.model.dropout 0.1")


def run_training(name, arguments, config="configs/rectified_flow/digits_rf_gaussian.py"):
    """Train as `python train.py …` does, in this process; return the rows of its log and its last checkpoint."""
    argv = ["train.py", "--config", config, "--config.expr", name, "--config.work_dir", "logs", *arguments.split()]
    assert train.main(*parse_command_line(argv)) == 0
    with open(f"logs/{name}/log.jsonl") as log:
        rows = [json.loads(line) for line in log]
    return rows, read_checkpoint(f"logs/{name}/checkpoints-meta/checkpoint.pth")


def write_pairs(folder, seed):
    """Write digits with random noise in the layout of pairs, with labels: `{folder}/{seed}/z0.npy` and so on."""
    digits = load_digits()
    images = (digits.images[:200, None] / 8 - 1).astype(np.float32)
    folder = folder / str(seed)
    folder.mkdir(parents=True)
    np.save(folder / "z0.npy", np.random.default_rng(seed).standard_normal(images.shape, dtype=np.float32))
    np.save(folder / "z1.npy", images)
    np.save(folder / "label.npy", np.eye(10, dtype=np.float32)[digits.target[:200]])


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, torch_home):
    """A working folder with pairs, pairs of real images, and two trained teachers; VGG16's file in the cache."""
    folder = tmp_path_factory.mktemp("objectives")
    write_pairs(folder / "pairs", 0)
    write_pairs(folder / "real_pairs", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(torch_home))
        patch.setattr(losses, "load_lpips", functools.cache(losses.load_lpips))  # 500 MB while loading
        patch.chdir(folder)
        (folder / "configs").symlink_to(train.__file__.removesuffix("train.py") + "configs")
        run_training("teacher", f"{SMALL} --config.model.nf 16")
        run_training("labelled_teacher", f"{SMALL} {LABELLED}")
        yield folder


IMAGES = {
    "u_shaped_huber": "flow.flow_t_schedule=u_shaped training.loss_type=huber",
    "exp_l1_half_sum": "flow.flow_t_schedule=exp_10 training.loss_type=l1 training.reduce_mean=false",
    "ends_l2_half_sum": "flow.flow_t_schedule=t0t1 training.reduce_mean=false training.weight_schedule=snr+1",
    "range_snr": "flow.flow_t_schedule=range_0.2_0.8 training.weight_schedule=snr",
    "fixed_snr_inv": "flow.flow_t_schedule=fix_0.5 training.weight_schedule=snr_inv",
    "images_lpips_l1": "training.loss_type=lpips+l1 training.weight_schedule=truncated-snr",
}
PAIRS = {
    "reflow": "flow.h_flip=true training.weight_schedule=karras",
    "annealing": "training.x0_randomness=warmup_4 training.weight_schedule=1mt",
    "annealing_exp": "training.x0_randomness=warmup_exp_4 training.loss_type=huber",
    "annealing_cos": "training.x0_randomness=warmup_cos_4 flow.flow_alpha_t=t0",
    "annealing_fixed": "training.x0_randomness=fix_0.5 flow.flow_t_schedule=t1 flow.flow_alpha_t=t1",
    "one_step": "flow.flow_t_schedule=t0 training.loss_type=lpips+l2",
    "k_step": "flow.flow_t_schedule=4",
    "real_images": "flow.real_data_share=0.25 data.real_pairs_root=real_pairs",
    "guided_by_student": "flow.flow_t_schedule=t0 training.loss_type=lpips flow.use_teacher=true "
                         "flow.teacher_model=logs/teacher/checkpoints-meta/checkpoint.pth",
    "guided_by_teacher": "flow.flow_t_schedule=t0 flow.use_teacher=true flow.guidance_first_step=teacher "
                         "flow.pre_train_model=logs/teacher/checkpoints-meta/checkpoint.pth model.nf=16",
}
LABELLED_OBJECTIVES = {
    "labelled": "training.loss_type=l2",
    "labelled_annealing": "data.reflow_data_root=pairs training.x0_randomness=warmup_4",
    "labelled_guided": "data.reflow_data_root=pairs flow.flow_t_schedule=t0 flow.use_teacher=true "
                       "flow.pre_train_model=logs/labelled_teacher/checkpoints-meta/checkpoint.pth",
}


def flags_of(fields):
    """Return the flags of `fields`; with LPIPS, whose VGG16 is what takes the time here, a batch of one."""
    fields += " training.batch_size=1" if "lpips" in fields else ""
    return " ".join(f"--config.{field}" for field in fields.split())


EVERY = [
    *((name, f"{UNLABELLED} {flags_of(fields)}") for name, fields in IMAGES.items()),
    *((name, f"{UNLABELLED} {flags_of(f'data.reflow_data_root=pairs {fields}')}") for name, fields in PAIRS.items()),
    *((name, f"{LABELLED} {flags_of(fields)}") for name, fields in LABELLED_OBJECTIVES.items()),
]


@pytest.mark.parametrize(("name", "arguments"), EVERY, ids=[name for name, _ in EVERY])
def test_the_objective_trains_on_digits_and_leaves_its_teacher_as_it_was(workshop, name, arguments):
    teacher = workshop / "logs/teacher/checkpoints-meta/checkpoint.pth"
    before = teacher.read_bytes()
    rows, checkpoint = run_training(name, f"{SMALL} {arguments}")
    assert teacher.read_bytes() == before
    assert name != "annealing" or [row["beta"] for row in rows] == [1.0, 0.75, 0.5]
    assert [row["step"] for row in rows] == list(range(1, UPDATES + 1))
    assert all(math.isfinite(row["loss"]) and row["loss"] > 0 and row["skipped"] == 0 for row in rows)
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    averages = checkpoint["ema"]["shadow_params"]
    moved = [m for m, s in zip(checkpoint["optimizer"]["state"].values(), averages, strict=True) if m["exp_avg"].any()]
    assert len(moved) > len(averages) / 2  # gradients have reached the network


def test_missing_lpips_weights_stop_training_before_its_folder_is_made(workshop, random_lpips, tmp_path, monkeypatch):
    def fail(url, *args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(lpips, "LPIPS", lambda **options: random_lpips)  # building one takes seconds
    monkeypatch.setattr(losses, "load_lpips", losses.load_lpips.__wrapped__)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="vgg16-397923af.pth.*TORCH_HOME"):
        run_training("no_weights", f"{SMALL} {UNLABELLED} --config.training.loss_type lpips")
    assert not (workshop / "logs/no_weights").exists()
