"""A network added to the table from outside trains, is saved, and is sampled from, through the table alone."""

import pytest

from models.checkpoint import load_model, read_checkpoint
from models.create import NETWORKS, create_from_fields
from models.describe import describe
from runtime.terminal import UserError
from tests.models.added_network import Perceptron, add_perceptron
from tests.processes import run_script

CONFIG = "configs/rectified_flow/digits_rf_gaussian.py"


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(NETWORKS, "perceptron", Perceptron)


def test_a_network_without_levels_runs_through_training_and_sampling(tmp_path, added):
    words = ["--config", CONFIG, "--config.work_dir", tmp_path, "--config.expr", "run", "--config.model.name",
             "perceptron", "--config.model.nf", "16", "--config.training.n_iters", "4", "--config.training.batch_size",
             "8", "--config.training.snapshot_freq", "4", "--config.training.snapshot_sampling", "4"]
    status, log = run_script(tmp_path, "train.py", *words, prepare=add_perceptron)
    assert status == 0, log
    path = tmp_path / "run" / "checkpoints" / "checkpoint_1.pth"
    fields = read_checkpoint(path)["fields"]
    assert (fields["model.name"], fields["model.nf"], fields["data.num_classes"]) == ("perceptron", 16, 0)
    assert "model.ch_mult" not in fields and isinstance(load_model(path), Perceptron)
    status, log = run_script(tmp_path, "image_sampling.py", "--config", CONFIG, "--sampling_dir", tmp_path / "run",
                             "--config.eval.batch_size", "4", "--config.sampling.use_ode_sampler", "one_step",
                             prepare=add_perceptron)
    assert status == 0 and list((tmp_path / "run").glob("eval_sample/checkpoint_1/one_step_sample_1*.png")), log


def test_what_it_has_no_use_for_is_refused_or_left_to_the_others(added):
    """Sizes that every config file sets are ignored; classes and options of one network are not."""
    fields = {"model.name": "perceptron", "model.ch_mult": (1, 2), "data.image_size": 9}
    assert create_from_fields(fields).config_fields["data.image_size"] == 9
    for name, value in (("data.num_classes", 10), ("model.fir", True)):
        with pytest.raises(UserError, match=f"{name} is {value}, but perceptron has no such option"):
            create_from_fields(fields | {name: value})


def test_it_is_described(added):
    total = describe({"model.name": "perceptron", "data.image_size": 8, "data.num_channels": 1, "model.nf": 16})[-1]
    assert (total.parameters, total.gmacs) == (65 * 16 + 16 + 16 * 64 + 64, (65 * 16 + 16 * 64) / 1e9)
