"""The command line: what it accepts, and the sentence that each mistake gets."""

import json
import pathlib
import re

import pytest

from configs.command_line import (
    config_from_dict,
    config_to_dict,
    help_text,
    load_config,
    parse_command_line,
    save_config,
)
from configs.default import FIELDS, Field, field_names, find_field, get_default_config, get_field
from configs.validation import check_fields, check_network, check_training
from runtime.errors import UserError

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "rectified_flow"
CONFIG = str(FOLDER / "cifar10_rf_gaussian.py")
CONFIGS = sorted(FOLDER.glob("*.py"))


FLAGS = {"use_ema": Field(True, "use the EMA weights"), "ckpt_dir": Field("", "run folder")}


def parse(*words):
    """Return (config, args, given) of a command line on the CIFAR-10 config."""
    return parse_command_line(["script.py", "--config", CONFIG, *words], "", FLAGS)


@pytest.mark.parametrize("words, field, value", [
    (["--config.model.ch_mult", "(1, 2, 2)"], "model.ch_mult", (1, 2, 2)),
    (["--config.model.attn_resolutions", "32, 16"], "model.attn_resolutions", (32, 16)),
    (["--config.model.attn_resolutions=16"], "model.attn_resolutions", (16,)),
    (["--config.model.attn_resolutions", "()"], "model.attn_resolutions", ()),
    (["--config.flow.h_flip=true"], "flow.h_flip", True),
    (["--config.flow.h_flip"], "flow.h_flip", True),
    (["--config.data.random_flip", "False"], "data.random_flip", False),
    (["--config.sampling.class_label", "-1"], "sampling.class_label", -1),
    (["--config.optim.grad_clip", "-1.5"], "optim.grad_clip", -1.5),
    (["--config.optim.lr", "1e-3"], "optim.lr", 1e-3),
    (["--config.training.n_iters", "2e3"], "training.n_iters", 2000),
    (["--config.flow.flow_t_schedule", "4"], "flow.flow_t_schedule", "4"),
    (["--config.flow.flow_t_schedule", "range_0.2_0.8"], "flow.flow_t_schedule", "range_0.2_0.8"),
    (["--config.training.x0_randomness", "warmup_300000"], "training.x0_randomness", "warmup_300000"),
    (["--config.training.progress", "true"], "training.progress", "true"),
    (["--config.expr", "a run=1"], "expr", "a run=1"),
])
def test_override_reaches_its_field_with_its_type(words, field, value):
    config, _, given = parse(*words)
    found = get_field(config, field)
    assert found == value and type(found) is type(value)
    assert given == {field}


BOOLEANS = [name for name in field_names() if isinstance(find_field(name).default, bool)]


@pytest.mark.parametrize("name", BOOLEANS)
def test_space_form_sets_both_values_of_every_boolean_field(name):
    for text, value in (("true", True), ("false", False)):
        assert get_field(parse(f"--config.{name}", text)[0], name) is value


def test_script_boolean_takes_the_space_form():
    assert parse("--use_ema", "false")[1].use_ema is False
    assert parse("--use_ema", "true")[1].use_ema is True
    assert parse("--nouse_ema")[1].use_ema is False


@pytest.mark.parametrize("words, sentence", [
    (["--config.training.batchsize", "3"], "did you mean config.training.batch_size?"),
    (["--config.training.lr", "3"], "did you mean config.optim.lr?"),
    (["--config.optim", "3"], "config.optim is a group of fields"),
    (["--config.model.nf", "1.5"], "config.model.nf is a whole number, not '1.5'"),
    (["--config.model.nf", "0"], "config.model.nf must be at least 1, not 0"),
    (["--config.model.dropout", "nan"], "config.model.dropout must be finite"),
    (["--config.model.name", "ncsnp"], "did you mean ncsnpp?"),
    (["--config.sampling.use_ode_sampler", "rk54"], "did you mean rk45?"),
    (["--config.model.ch_mult", "one"], "config.model.ch_mult is numbers"),
    (["--config.model.ch_mult", "()"], "config.model.ch_mult must hold at least one number"),
    (["--config.model.ch_mult", "1, -2"], "config.model.ch_mult must hold positive numbers"),
    (["--config.flow.use_teacher", "perhaps"], "config.flow.use_teacher is true or false, not 'perhaps'"),
    (["--config.training.x0_randomness", "warmup_0"], "config.training.x0_randomness must be one of"),
    (["--config.optim.lr"], "--config.optim.lr needs a value"),
    (["--ckpt_dri", "x"], "ckpt_dri"),
    (["--use_ema", "maybe"], "--use_ema is true or false"),
    (["stray"], "what is 'stray' on the command line?"),
    (["--config.flow.h_flip=true", "false"], "what is 'false' on the command line?"),
])
def test_mistake_gets_one_sentence_that_names_it(words, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        parse(*words)


def test_missing_and_broken_config_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no config: name one"):
        parse_command_line(["script.py"])
    with pytest.raises(UserError, match="absent.py does not exist"):
        load_config(tmp_path / "absent.py")
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    with pytest.raises(UserError, match="broken.py fails: SyntaxError"):
        load_config(tmp_path / "broken.py")
    (tmp_path / "empty.json").write_text("{")
    with pytest.raises(UserError, match="empty.json is not JSON"):
        load_config(tmp_path / "empty.json")


def test_unknown_field_of_a_config_file_is_named():
    with pytest.raises(UserError, match="model.nff is not a field; did you mean config.model.nf?"):
        config_from_dict({"model": {"nff": 3}})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_survives_saving(path, tmp_path):
    config = load_config(path)
    check_fields(config)
    check_network(config)
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config
    assert json.loads((tmp_path / "config.json").read_text()) == config_to_dict(config)


def test_cifar10_config_has_the_papers_values():
    config = load_config(CONFIG)
    assert (config.model.nf, config.model.num_res_blocks, config.model.ch_mult) == (128, 4, (1, 2, 2, 2))
    assert (config.optim.lr, config.optim.warmup, config.optim.grad_clip) == (2e-4, 5000, 1.0)
    assert (config.training.batch_size, config.training.n_iters) == (128, 1300001)
    assert (config.model.dropout, config.model.ema_rate, config.flow.eps) == (0.15, 0.999999, 1e-3)
    assert (config.eval.begin_ckpt, config.eval.end_ckpt, config.eval.num_samples) == (9, 26, 50000)


def test_dhariwal_unet_gets_its_own_dropout_unless_it_is_given():
    dhariwal = ["--config.model.name", "DhariwalUNet"]
    assert parse(*dhariwal)[0].model.dropout == 0.13
    assert parse(*dhariwal, "--config.model.dropout", "0.15")[0].model.dropout == 0.15
    assert parse()[0].model.dropout == 0.15


def test_help_lists_every_field_with_meaning_choices_and_default():
    text = help_text("What the script does.", FLAGS)
    for name in field_names():
        line = next(line for line in text.splitlines() if line.startswith(f"  {name}: "))
        field = find_field(name)
        assert field.meaning in line and f"(default: {field.default!r})" in line
        assert all(str(choice) in line for choice in field.choices)
    assert "--ckpt_dir" in text


def test_every_field_has_a_meaning():
    def fields(group):
        for field in group.values():
            yield from fields(field) if isinstance(field, dict) else [field]

    assert all(len(field.meaning) > 3 for field in fields(FIELDS))


@pytest.mark.parametrize("changes, sentence", [
    ({"model.attn_resolutions": (7,)}, "config.model.attn_resolutions has 7"),
    ({"data.num_channels": 1}, "config.data.num_channels is 1, but CIFAR10 has 3"),
    ({"data.image_size": 36, "model.attn_resolutions": ()}, "cannot be halved 3 times"),
    ({"data.centered": False}, "config.data.centered must be true"),
    ({"expr": ""}, "config.expr is empty: name the run, for instance"),
    ({"expr": "../x"}, "must be a name inside config.work_dir"),
    ({"training.accumulation_steps": 3}, "is not a multiple of config.training.accumulation_steps 3"),
    ({"flow.use_teacher": True}, "use_teacher"),
    ({"flow.flow_t_schedule": "t0"}, "reflow_data_root"),
    ({"training.x0_randomness": "warmup_10"}, "reflow_data_root"),
])
def test_contradiction_stops_training_in_one_sentence(changes, sentence):
    config = get_default_config()
    config.expr = "run"
    for name, value in changes.items():
        group, _, last = name.rpartition(".")
        (config[group] if group else config)[last] = value
    with pytest.raises(UserError, match=re.escape(sentence)):
        check_training(config)
