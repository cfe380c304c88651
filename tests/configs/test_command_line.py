"""The command line: what it accepts, and the sentence that each mistake gets."""

import json
import pathlib
import re
import runpy
import subprocess
import sys

import pytest
import torch
from ml_collections import ConfigDict

import evaluation_fid
import generate_data
import image_sampling
import train
from configs.command_line import config_to_dict, differences, help_text, load_config, parse_command_line
from configs.default import FIELDS, Field, check_fields, get_field
from flows.samplers import sampler_fields
from models.checkpoint import write_checkpoint
from models.create import create_model
from runtime.files import write_json
from runtime.terminal import UserError
from tests.helpers import DIGITS, config_of, small_checkpoint
from training.run import check_training

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "rectified_flow"
CONFIG = str(FOLDER / "cifar10_rf_gaussian.py")
CONFIGS = sorted(FOLDER.glob("*.py"))

SCRIPT_FLAGS = {"use_ema": Field(True, "use the EMA weights"), "ckpt_dir": Field("", "run folder"),
                "images": Field(64, "images in the grid", low=1)}


def parse(*arguments):
    """Return (config, args, given) of a command line on the CIFAR-10 config."""
    return parse_command_line(["script.py", "--config", CONFIG, *arguments], "", SCRIPT_FLAGS)


@pytest.mark.parametrize("arguments, field, value", [
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
    (["--config.model.ch_mult", "(1, 2)", "--config.model.ch_mult", "(1, 3)"], "model.ch_mult", (1, 3)),
    (["--config.model.ch_mult=[1, 2]"], "model.ch_mult", (1, 2)),
    (["--noconfig.flow.h_flip"], "flow.h_flip", False),
])
def test_override_reaches_its_field_with_its_type(arguments, field, value):
    config, _, given = parse(*arguments)
    found = get_field(config, field)
    assert found == value and type(found) is type(value)
    assert given == {field}


def test_script_boolean_takes_the_space_form():
    assert parse("--use_ema", "false")[1].use_ema is False
    assert parse("--use_ema", "true")[1].use_ema is True
    assert parse("--nouse_ema")[1].use_ema is False


@pytest.mark.parametrize("arguments, sentence", [
    (["--config.training.batchsize", "3"], "did you mean config.training.batch_size?"),
    (["--config.training.lr", "3"], "did you mean config.optim.lr?"),
    (["--config.flow.epss", "3"], "did you mean config.flow.eps?"),
    (["--config.traning.n_iter", "3"], "did you mean config.training.n_iters?"),
    (["--config.sede", "3"], "did you mean config.seed?"),
    (["--config.trainig.batch_size", "3"], "did you mean config.training.batch_size?"),
    (["--config.eval.batchsize", "3"], "did you mean config.eval.batch_size?"),
    (["--config.trainingbatch_size", "3"], "did you mean config.training.batch_size?"),
    (["--config.batch_size", "3"],
     "did you mean config.training.batch_size or config.sampling.batch_size or config.eval.batch_size?"),
    (["--expr", "q"], "--expr is not a flag; did you mean --config.expr?"),
    (["--data.datset", "q"], "--data.datset is not a flag; did you mean --config.data.dataset?"),
    (["--config.optim", "3"], "config.optim is a group of fields"),
    (["--config.model.nf", "1.5"], "--config.model.nf=1.5: this takes a whole number"),
    (["--config.model.nf", "many"], "--config.model.nf=many: this takes a whole number"),
    (["--config.optim.lr", "fast"], "--config.optim.lr=fast: "),
    (["--config.seed", str(2**70)], f"config.seed must be at most {2**63 - 1:g}"),
    (["--config.model.nf", "0"], "config.model.nf must be at least 4, not 0"),
    (["--config.training.n_iters", "0"], "config.training.n_iters must be at least 1, not 0"),
    (["--config.optim.beta1", "1"], "config.optim.beta1 must be at most 0.9999, not 1"),
    (["--config.optim.eps", "0"], "config.optim.eps must be at least 1e-30, not 0"),
    (["--config.model.dropout", "nan"], "config.model.dropout must be a number, not nan"),
    (["--config.model.name", "ncsnp"], "did you mean ncsnpp?"),
    (["--config.sampling.use_ode_sampler", "rk54"], "did you mean rk45?"),
    (["--config.sampling.use_ode_sampler", ""], "config.sampling.use_ode_sampler must be one of one_step"),
    (["--config.sampling.init_type", "uniform"], "config.sampling.init_type must be one of gaussian, not 'uniform'"),
    (["--config.data.centered", "false"], "config.data.centered must be one of True, not False"),
    (["--config.model.ch_mult", "one"], "--config.model.ch_mult=one: this takes numbers such as '1, 2, 2'"),
    (["--config.model.ch_mult", "'a', 'b'"], "config.model.ch_mult must be numbers such as '1, 2, 2', not ('a', 'b')"),
    (["--config.flow.use_teacher", "perhaps"], "--config.flow.use_teacher=perhaps: this takes true or false"),
    (["--config.training.x0_randomness", "warmup_0"], "config.training.x0_randomness must be one of"),
    (["--config.optim.lr"], "Missing value for flag --config.optim.lr"),
    (["--config"], "argument --config: expected one argument"),
    (["--images", "0"], "--images must be at least 1, not 0"),
    (["--help", "modle"], "--help modle: the groups of fields are training, flow"),
    (["--config.training.x0_randomness", "fix_-0.5"], "config.training.x0_randomness must be one of"),
    (["--ckpt_dri", "x"], "--ckpt_dri is not a flag; did you mean --ckpt_dir?"),
    (["--use_ema", "maybe"], "--use_ema=maybe: this takes true or false"),
    (["stray"], "unexpected argument 'stray'"),
    (["--config.flow.h_flip=true", "false"], "unexpected argument 'false'"),
])
def test_an_invalid_option_fails_with_one_sentence_that_names_it(arguments, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        parse(*arguments)


@pytest.mark.parametrize("arguments", [["--config.flow.nosuch", "3"], ["--config.nosuch", "3"], ["--nosuch", "x"]])
def test_where_no_name_is_near_none_is_suggested(arguments):
    with pytest.raises(UserError, match="nosuch is not a (field|flag)$"):
        parse(*arguments)


@pytest.mark.parametrize("name, content, sentence", [
    ("absent.py", None, "absent.py does not exist"),
    ("broken.py", "def get_config(:\n", "broken.py fails: SyntaxError"),
    ("empty.json", "{", "empty.json is damaged: it holds no JSON object"),
    ("own.json", '{"model": {"nff": 3}}', "model.nff is not a field; did you mean config.model.nf?"),
])
def test_missing_and_broken_config_files_are_named(tmp_path, name, content, sentence):
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_config(tmp_path / name)
    with pytest.raises(UserError, match="no config: name one"):
        parse_command_line(["script.py"])


def test_an_integer_in_a_config_file_stands_for_a_float_that_the_command_line_may_change(tmp_path):
    (tmp_path / "clip.json").write_text('{"optim": {"grad_clip": 2}}')
    assert load_config(tmp_path / "clip.json").optim.grad_clip == 2.0
    arguments = ["script.py", "--config", str(tmp_path / "clip.json"), "--config.optim.grad_clip", "0.5"]
    assert parse_command_line(arguments)[0].optim.grad_clip == 0.5


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_survives_saving(path, tmp_path):
    config = load_config(path)
    check_fields(config)
    with torch.device("meta"):
        create_model(config)
    write_json(tmp_path / "config.json", config_to_dict(config))
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
    text = " ".join(help_text("What the script does.", SCRIPT_FLAGS).split())
    for name, field in FIELDS.items():
        assert f" {name}: {field.describe(field.default)}" in text
        assert field.meaning in text and all(str(choice) in text for choice in field.choices)
    assert "--ckpt_dir: run folder (default: '')" in text


def test_help_of_a_group_shows_its_fields_alone_with_the_values_of_the_config(capsys):
    assert parse("--help", "optim", "--config", str(FOLDER / "digits_recommended.py")) is None
    text = capsys.readouterr().out
    assert "optim.lr: learning rate after warm-up; at least 0 (now 0.002; default: 0.0002)" in text
    assert "model.nf" not in text
    assert max(map(len, text.splitlines())) <= 120


# Short runs of the scripts, {run} a run's folder, and the marked fields that only other runs read.
TINY_PAIRS = ["--data_root={run}/pairs", "--config.training.batch_size=4", "--config.sampling.ode_tol=0.1",
              "--config.sampling.total_number_of_samples=8"]
TINY_RUNS = {
    train: ([["--config.work_dir={run}", "--config.expr=new", "--config.training.n_iters=2",
              "--config.training.snapshot_sampling=2"]],
            {"flow.h_flip", "flow.teacher_model", "flow.guidance_first_step", "flow.pre_train_partial",
             "training.compile_mode", "data.cache_dir", "data.centered"}),
    generate_data: ([[*TINY_PAIRS, "--ckpt_path={run}/checkpoints/checkpoint_1.pth"],
                     [*TINY_PAIRS, "--config.seed=1", "--config.sampling.direction=random_paired"]],
                    {"training.compile_mode", "data.cache_dir"}),
    evaluation_fid: ([["--ckpt_dir={run}", "--config.sampling.use_ode_sampler=one_step", "--config.eval.nearest=9",
                       "--config.eval.num_samples=70"]],
                     {"eval.wait_limit", "eval.inception_path", "sampling.max_steps", "training.compile_mode",
                      "data.cache_dir"}),
    image_sampling: ([["--sampling_dir={run}", "--config.sampling.ode_tol=0.1", "--config.eval.batch_size=2",
                       "--config.sampling.use_ode_sampler=rk45"]],
                     {"eval.begin_ckpt", "eval.end_ckpt", "sampling.train_subset", "data.dataset", "data.data_root",
                      "data.custom_data_root", "data.train_subset", "data.cache_dir", "data.skip_corrupt",
                      "training.compile_mode"}),
}


@pytest.mark.parametrize("script", TINY_RUNS, ids=lambda script: script.__name__)
def test_help_marks_the_fields_that_a_script_reads(script, tmp_path, repository, monkeypatch):
    """Attributes are what code reads; whole configs are compared and saved by items, as networks and samplers read."""
    groups, seen, original = {}, set(), ConfigDict.__getattr__

    def record(self, name):
        value = original(self, name)
        if isinstance(value, ConfigDict):
            groups[id(value)] = name
        else:
            seen.add(f"{groups.get(id(self), '')}.{name}".lstrip("."))
        return value

    monkeypatch.chdir(repository)
    write_checkpoint(tmp_path / "checkpoints/checkpoint_1.pth", small_checkpoint())
    runs, unread = TINY_RUNS[script]
    for arguments in runs:
        argv = [word.format(run=tmp_path) for word in ["script.py", f"--config={DIGITS}", *arguments]]
        parsed = parse_command_line(argv, "", getattr(script, "FLAGS", None))
        with monkeypatch.context() as patched:
            patched.setattr(ConfigDict, "__getattr__", record)
            assert not script.main(*parsed)
    lines = help_text("", {}, reads=script.READS).splitlines()
    marked = {line.removeprefix("  * ").split(":")[0] for line in lines if line.startswith("  * ")}
    read = seen & FIELDS.keys()
    assert len(read) > 10 and read <= marked
    by_items = {f"sampling.{name}" for name in sampler_fields()}
    assert {name for name in marked - read - by_items if not name.startswith("model.")} == unread


PROGRAMS = [path for place in ("*.py", "tools/*.py", "experiments/*.py", "benchmarks/*.py")
            for path in sorted(FOLDER.parents[1].glob(place))
            if re.search(r"^    run_(script|program)\(", path.read_text(), re.MULTILINE)]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
@pytest.mark.parametrize("width", [80, 120])
def test_every_program_starts_and_explains_itself_in_lines_that_fit(path, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert not ended.value.code
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if not re.match("    (    )?\\S", line)]  # without commands
    assert "flags:" in lines and max(map(len, lines)) <= width


def test_help_into_a_closed_pipe_ends_without_a_traceback(repository):
    script = "from runtime.terminal import one_sentence\nwith one_sentence('x'):\n    print('a line\\n' * 100_000)"
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "{script}" | head -n 1'], cwd=repository, check=False,
                          capture_output=True, text=True)
    assert (done.stderr, done.stdout) == ("", "a line\n")


def test_a_tilde_is_the_home_folder_after_an_equals_sign_and_in_a_config_file_too(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    config, args, _ = parse("--config.data.data_root=~/images", "--ckpt_dir=~/logs/run")
    assert (config.data.data_root, args.ckpt_dir) == ("/home/someone/images", "/home/someone/logs/run")
    write_json(tmp_path / "own.json", {"data": {"reflow_data_root": "~/pairs"}, "work_dir": "a~b"})
    own = load_config(tmp_path / "own.json")
    assert (own.data.reflow_data_root, own.work_dir) == ("/home/someone/pairs", "a~b")


def test_print_config_prints_the_config_of_the_command_line_which_is_a_config_file(capsys, tmp_path):
    assert parse("--config.model.nf", "64", "--print_config") is None
    (tmp_path / "printed.json").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "printed.json") == parse("--config.model.nf", "64")[0]


def test_the_difference_to_the_defaults_names_each_field_with_both_values():
    assert differences(parse()[0]) == ""
    config = parse("--config.model.nf", "64", "--config.expr", "small")[0]
    assert differences(config) == "expr 'small' (''), model.nf 64 (128)"


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_explained_takes_its_default_and_is_set_from_the_command_line(name):
    field = FIELDS[name]
    assert len(field.meaning) > 3
    field.check(name, field.default)
    others = {bool: not field.default, str: "other", tuple: (1, 2), int: max(3, field.low or 0), float: 0.25}
    other = [others[type(field.default)], *field.choices][-1]
    if isinstance(other, str):
        other = other.replace("<number>", "0.5").replace("<int>", "4")
    for value in (field.default, other) if isinstance(other, bool) else (other,):  # booleans in the space form
        config, _, given = parse(f"--config.{name}", str(value).lower() if isinstance(value, bool) else str(value))
        assert get_field(config, name) == value and type(get_field(config, name)) is type(field.default)
        assert given == {name}


def test_a_config_file_of_ones_own_lies_anywhere_and_imports_another_beside_it(tmp_path):
    (tmp_path / "own_base.py").write_text("from configs.rectified_flow.digits_rf_gaussian import get_config\n")
    (tmp_path / "own.py").write_text("import own_base\n\n\ndef get_config():\n    config = own_base.get_config()\n"
                                     "    config.model.nf = 16\n    return config\n")
    config = parse_command_line(["script.py", f"--config={tmp_path / 'own.py'}"])[0]
    assert (config.model.nf, config.data.dataset) == (16, "digits") and str(tmp_path) not in sys.path


@pytest.mark.parametrize("changes, sentence", [
    ({"model.attn_resolutions": (7,)}, "model.attn_resolutions has 7, but the levels have sizes 32, 16, 8, 4"),
    ({"expr": ""}, "config.expr is '': name the run, a folder inside config.work_dir"),
    ({"expr": "../x"}, "config.expr is '../x': name the run"),
    ({"training.batch_size": 9, "training.accumulation_steps": 2}, "config.training.batch_size 9 cannot be split"),
    ({"flow.flow_t_schedule": "t0"}, "reflow_data_root"),
])
def test_contradiction_stops_training_in_one_sentence(changes, sentence):
    config = config_of(**({"expr": "run"} | changes))
    with pytest.raises(UserError, match=re.escape(sentence)):
        check_training(config)
