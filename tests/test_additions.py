"""What is added to a table from outside, such as the rows of docs/extending.md, works wherever the table is read."""

import json
import types

import numpy as np
import pytest

import train
from configs.command_line import help_text, parse_command_line, parse_flags
from datasets import DATASETS, array_set, load_images
from datasets.image_files import ImageSpec
from flows.losses import DISTANCES, WEIGHTS
from flows.samplers import SAMPLERS
from flows.schedules import TIME_SCHEDULES, Schedule, constant
from models import NETWORKS
from models.checkpoint import load_model, read_checkpoint, write_checkpoint
from models.create import create_from_fields, create_model
from models.describe import describe
from runtime.terminal import UserError
from tests.helpers import DIGITS, SMALL, overrides, same
from tests.processes import output_of, run_script
from tests.test_docs import blocks
from tools import convert
from training.run import check_training
from training.update import ExponentialMovingAverage

TABLES = (DATASETS, DISTANCES, NETWORKS, SAMPLERS, TIME_SCHEDULES, WEIGHTS)


@pytest.fixture
def page():
    """The names of docs/extending.md; what a test adds to a table is taken out afterwards."""
    before, names = [dict(table) for table in TABLES], {}
    exec("\n\n".join(blocks("extending.md")), names)
    yield types.SimpleNamespace(**names)
    for table, rows in zip(TABLES, before, strict=True):
        table.clear()
        table.update(rows)


def test_the_four_rows_of_the_page_run_through_the_scripts_from_one_config_file(tmp_path):
    config = tmp_path / "my_config.py"
    config.write_text("\n\n".join(blocks("extending.md")))
    common = ["--config", config, *overrides(training__progress="false")]
    printed = output_of(tmp_path, "train.py", *common, *overrides(
        work_dir=tmp_path, expr="stripes", training__n_iters=6, training__snapshot_freq=6))
    assert "small of 449 parameters" in printed and "64 images of 1×8×8" in printed
    checkpoint = tmp_path / "stripes/checkpoints/checkpoint_1.pth"
    pairs = [*common, "--ckpt_path", checkpoint, "--data_root", tmp_path / "pairs",
             *overrides(sampling__total_number_of_samples=16)]
    output_of(tmp_path, "generate_data.py", *pairs)
    about = json.loads((tmp_path / "pairs/42/pairs.json").read_text())
    assert about["identity"]["sampling.use_ode_sampler"] == "midpoint" and about["nfe_mean"] == 8
    status, printed = run_script(tmp_path, "generate_data.py", *pairs, *overrides(sampling__sample_N=5))
    assert status == 2 and "sampling.sample_N is 4 there and 5 here" in printed
    output_of(tmp_path, "image_sampling.py", *common, "--sampling_dir", checkpoint, *overrides(
        sampling__use_ode_sampler="midpoint", eval__batch_size=4))
    assert list((tmp_path / "stripes").rglob("midpoint_sample_8*.png"))
    figures = [*common, "--ckpt_dir", checkpoint, *overrides(
        eval__num_samples=20, eval__nearest=0, eval__feature_extractor="pixels")]
    assert "midpoint-4" in output_of(tmp_path, "evaluation_fid.py", *figures)
    assert "already measured" in output_of(tmp_path, "evaluation_fid.py", *figures)


def test_a_network_without_levels_keeps_just_its_own_fields_in_a_checkpoint(page, tmp_path):
    config = page.get_config()
    net = create_model(config)
    write_checkpoint(tmp_path / "checkpoint_1.pth", {
        "model": net.state_dict(), "ema": ExponentialMovingAverage(net.parameters(), 0.9).state_dict(),
        "optimizer": {}, "step": 1, "config": json.loads(config.to_json())})
    fields = read_checkpoint(tmp_path / "checkpoint_1.pth")["fields"]
    assert (fields["model.name"], fields["model.nf"], fields["data.num_classes"]) == ("small", 16, 0)
    assert "model.ch_mult" not in fields and isinstance(load_model(tmp_path / "checkpoint_1.pth"), page.Small)
    assert describe(fields)[-1].parameters == 449


def test_a_checkpoint_of_such_a_network_is_converted_with_its_config_file(page, tmp_path):
    """The config file adds the class to the table, so it runs before the checkpoint is read."""
    net = create_model(config := page.get_config())
    write_checkpoint(tmp_path / "checkpoint_1.pth", {
        "model": net.state_dict(), "weights": "EMA", "config": json.loads(config.to_json())})
    (tmp_path / "my_config.py").write_text("\n\n".join(blocks("extending.md")))
    arguments = [str(tmp_path / name) for name in ("checkpoint_1.pth", "model.safetensors")]
    del NETWORKS["small"]
    with pytest.raises(UserError, match="model.name must be one of ncsnpp, DhariwalUNet, not 'small'"):
        convert.main(parse_flags(arguments, convert.FLAGS, positional=("source", "target")))
    arguments += ["--config", str(tmp_path / "my_config.py")]
    convert.main(parse_flags(arguments, convert.FLAGS, positional=("source", "target")))
    assert same(load_model(tmp_path / "model.safetensors").state_dict(), net.state_dict())


def test_what_a_network_has_no_use_for_is_refused_or_left_to_the_others(page):
    """Sizes that every config file sets are ignored; classes and options of one network are not."""
    class Plain(page.Small):
        def __init__(self, image_size=32, num_channels=3, nf=128):
            super().__init__(image_size, num_channels, 0, nf)

    NETWORKS["plain"] = Plain
    fields = {"model.name": "plain", "model.ch_mult": (1, 2), "data.image_size": 9}
    assert create_from_fields(fields).config_fields["data.image_size"] == 9
    for name, value in (("data.num_classes", 10), ("model.fir", True)):
        with pytest.raises(UserError, match=f"{name} is {value}, but plain has no such option"):
            create_from_fields(fields | {name: value})


def test_a_data_set_has_its_classes_its_conversions_and_its_place_in_help(page):
    config = page.get_config()
    config.data.train_subset = "vertical"
    assert len(load_images(config)) == 32
    assert "| stripes" in " ".join(help_text("", {}, ["data"]).split())
    config.expr, config.data.num_channels = "run", 3
    with pytest.raises(UserError, match="num_channels is 3, but stripes has 1"):
        check_training(config)
    converted = array_set(np.zeros((2, 1, 16, 16), np.uint8), np.arange(2), ImageSpec(8, 1))
    assert converted.notes == {"resampled to 8×8 with the lanczos filter": 2}


def test_a_weight_and_a_time_schedule_train(page, tmp_path, monkeypatch):
    """The weight t at the time 1/4: a weight of 0.25."""
    WEIGHTS["t"] = lambda values, t, eps: values * t
    TIME_SCHEDULES["half_<int>"] = Schedule(lambda generator, count, device, low, high, k: constant(
        generator, count, device, low, high, tau=2.0**-k))
    monkeypatch.chdir(tmp_path)
    losses = []
    for weight in ("t", "uniform"):
        arguments = overrides(expr=weight, training__n_iters=1, training__batch_size=4, training__snapshot_sampling=0,
                          training__progress="false", flow__eps=0.0, training__weight_schedule=weight,
                          flow__flow_t_schedule="half_2", **SMALL)
        assert not train.main(*parse_command_line(["train.py", "--config", DIGITS, *arguments]))
        losses.append(json.loads((tmp_path / f"logs/{weight}/log.jsonl").read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1] / 4, rel=1e-5)
