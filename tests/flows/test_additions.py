"""What is added to a table of flows/ from outside works in every script, through the table alone."""

import json

import pytest

from configs.command_line import config_to_dict, load_config
from models import create_model
from models.checkpoint import write_checkpoint
from models.ema import ExponentialMovingAverage
from tests.flows.additions import add_loss, add_midpoint
from tests.processes import run_script

CONFIG = "configs/rectified_flow/digits_rf_gaussian.py"


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a tiny network on digits, in a run folder."""
    config = load_config(CONFIG)
    config.model.update(nf=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
    net = create_model(config)
    ema = ExponentialMovingAverage(net.parameters(), 0.9)
    path = tmp_path / "run" / "checkpoints" / "checkpoint_1.pth"
    write_checkpoint(path, {"model": net.state_dict(), "ema": ema.state_dict(), "optimizer": {}, "step": 1,
                            "config": config_to_dict(config)})
    return path


def run(folder, script, *words, prepare=add_midpoint):
    return run_script(folder, script, "--config", CONFIG, "--config.sampling.use_ode_sampler", "midpoint",
                      "--config.sampling.sample_N", "3", *words, prepare=prepare)


def test_a_sampler_added_to_the_table_makes_pairs_pictures_and_figures(tmp_path, checkpoint):
    pairs = ["--config.sampling.direction", "from_z0", "--ckpt_path", checkpoint, "--data_root", tmp_path / "pairs",
             "--config.sampling.total_number_of_samples", "20", "--config.training.batch_size", "10"]
    status, log = run(tmp_path, "generate_data.py", *pairs)
    assert status == 0, log
    record = json.loads((tmp_path / "pairs" / "42" / "pairs.json").read_text())
    assert record["identity"]["sampling.use_ode_sampler"] == "midpoint" and record["nfe_mean"] == 6
    assert record["identity"]["sampling.sample_N"] == 3
    status, log = run(tmp_path, "generate_data.py", *pairs, "--config.sampling.sample_N", "4")
    assert status == 2 and "sampling.sample_N is 3 there and 4 here" in log

    status, log = run(tmp_path, "image_sampling.py", "--sampling_dir", checkpoint, "--config.eval.batch_size", "4")
    assert status == 0 and len(list((tmp_path / "run" / "eval_sample").glob("*/midpoint_sample_6*.png"))) == 1, log

    figures = ["--ckpt_dir", checkpoint, "--config.eval.num_samples", "20", "--config.eval.nearest", "0"]
    status, log = run(tmp_path, "evaluation_fid.py", *figures)
    assert status == 0 and "midpoint-3" in log, log
    status, log = run(tmp_path, "evaluation_fid.py", *figures)
    assert status == 0 and "already measured" in log, log


def test_a_distance_a_weight_and_a_time_schedule_added_to_their_tables_train(tmp_path):
    words = ["--config", CONFIG, "--config.work_dir", tmp_path, "--config.expr", "added", "--config.model.nf", "8",
             "--config.training.n_iters", "2", "--config.training.batch_size", "4",
             "--config.training.record_iters", "1", "--config.training.snapshot_sampling", "0",
             "--config.training.loss_type", "cubed", "--config.training.weight_schedule", "t",
             "--config.flow.flow_t_schedule", "half_2"]
    status, log = run_script(tmp_path, "train.py", *words, prepare=add_loss)
    assert status == 0, log
    rows = [json.loads(line) for line in (tmp_path / "added" / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["loss"] > 0 for row in rows)
    status, log = run_script(tmp_path, "train.py", *words)
    assert status == 2 and "training.loss_type must be one of l2, l1" in log


def test_without_the_row_the_name_is_refused_with_the_samplers_there_are(tmp_path):
    status, log = run(tmp_path, "image_sampling.py", "--sampling_dir", "x", prepare=None)
    assert status == 2 and "one_step, euler, heun, edm, rk45, cm_stochastic" in log
