"""train.py as a whole: exact resumption, processes, signals, broken files, what a run leaves behind."""

import errno
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from importlib import metadata
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch

import train
from configs.command_line import parse_command_line
from models.checkpoint import write_checkpoint
from runtime.files import read_json_lines
from runtime.terminal import UserError
from tests.helpers import DIGITS, SMALL, overrides, same, small_checkpoint
from tests.processes import output_of, run_ranks, run_script, start_ranks
from training import run, state

KILLS = int(os.environ.get("SLIMFLOW_KILLS", 2))  # of each killed run; more for a long form of the test
TINY = {"model__nf": 8, "model__ch_mult": (1, 2), "training__n_iters": 2, "training__batch_size": 16,
        "training__record_iters": 4, "training__snapshot_freq": 10, "training__snapshot_freq_for_preemption": 5,
        "training__snapshot_sampling": 0, "training__progress": "false", "optim__warmup": 4}
EXACT = {"training__n_iters": 21, "training__accumulation_steps": 2, "model__dropout": 0.2}
STATE = "checkpoints-meta/checkpoint.pth"


def arguments(folder, expr="run", **fields):
    """Return the arguments of a training run in `folder`."""
    return ["--config", DIGITS, *overrides(work_dir=folder, expr=expr, **(TINY | fields))]


def finish(folder, expr="run", **fields):
    """Run a training to its end in this process; return its folder."""
    assert train.main(*parse_command_line(["train.py", *arguments(folder, expr, **fields)])) == 0
    return folder / expr


def finish_ranks(folder, count=2, **fields):
    """Run a training in several processes to its end; return its folder."""
    folder.mkdir(exist_ok=True)
    for status, log in run_ranks(folder, "train.py", *arguments(folder, **fields), count=count):
        assert status == 0, log
    return folder / "run"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder of 64 random pairs in the released layout."""
    folder = tmp_path_factory.mktemp("pairs") / "0"
    folder.mkdir()
    generator = np.random.default_rng(0)
    np.save(folder / "z0.npy", generator.standard_normal((64, 1, 8, 8), dtype=np.float32))
    np.save(folder / "z1.npy", generator.uniform(-1, 1, (64, 1, 8, 8)).astype(np.float32))
    return folder.parent


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint to start from and to be guided by: the last of a run of 10 updates."""
    return finish(tmp_path_factory.mktemp("pretrained"), training__n_iters=10) / "checkpoints" / "checkpoint_1.pth"


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    """Trainings in this process leave out loss.png, which costs as much as many of their updates."""
    monkeypatch.setattr(run.RunLogger, "draw", lambda logger: None)


OBJECTIVES = {
    "1-flow": lambda pairs, pretrained: {"data__random_flip": True},
    "annealing": lambda pairs, pretrained: {
        "data__reflow_data_root": pairs, "training__x0_randomness": "warmup_16", "flow__h_flip": True},
    "guided distillation": lambda pairs, pretrained: {
        "data__reflow_data_root": pairs, "flow__flow_t_schedule": "t0", "flow__use_teacher": True,
        "flow__pre_train_model": pretrained},
}


def load(path):
    """Return a checkpoint file."""
    return torch.load(path, weights_only=True)


def losses(run):
    """Return what of the log must not depend on interruptions."""
    names = ("step", "loss", "grad_norm", "lr", "beta", "skipped")
    return [[entry[name] for name in names] for entry in read_json_lines(run / "log.jsonl")]


@pytest.mark.parametrize("objective, count", [("1-flow", 1), ("annealing", 2), ("guided distillation", 1)])
def test_killed_and_resumed_run_ends_bit_identical(objective, count, tmp_path, pairs, pretrained):
    """Killed KILLS times at random moments, starts and writes included, in one process and in two."""
    fields = EXACT | OBJECTIVES[objective](pairs, pretrained)
    whole = finish_ranks(tmp_path / "whole", count, **fields)
    run = tmp_path / "killed" / "run"
    moments = random.Random(objective)
    for records in sorted(moments.choices(range(1, 5), k=KILLS)):
        scripts = start_ranks(tmp_path, "train.py", *arguments(tmp_path / "killed", **fields), count=count)
        while len(read_json_lines(run / "log.jsonl")) < records:
            assert scripts[0].process.is_alive(), scripts[0].log
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        for script in scripts:
            script.kill()
    finish_ranks(tmp_path / "killed", count, **fields)
    for name in (STATE, *(f"checkpoints/checkpoint_{k}.pth" for k in (1, 2))):
        expected, found = load(whole / name), load(run / name)
        expected["config"]["work_dir"] = found["config"]["work_dir"]
        assert same(expected, found), name
    assert losses(whole) == losses(run)


def test_two_processes_train_to_the_losses_of_one_which_can_go_on(tmp_path):
    finish_ranks(tmp_path / "two", training__n_iters=12, training__accumulation_steps=2)
    one, two = (read_json_lines(finish(tmp_path / name, training__n_iters=16, training__accumulation_steps=2) /
                                "log.jsonl") for name in ("one", "two"))
    assert [e["loss"] for e in two] == pytest.approx([e["loss"] for e in one], rel=1e-5) and len(two) == 4
    assert [e["grad_norm"] for e in two] == pytest.approx([e["grad_norm"] for e in one], rel=1e-4)


def test_two_processes_train_a_network_that_does_not_see_the_time(tmp_path):
    """Its time projections get no gradient, and keep their places in the EMA and the optimizer."""
    fields = {"training__n_iters": 6, "training__accumulation_steps": 2, "model__conditional": False}
    runs = finish(tmp_path / "one", **fields), finish_ranks(tmp_path / "two", **fields)
    one, two = (load(run / STATE) for run in runs)
    assert len(two["ema"]["shadow_params"]) == len(two["optimizer"]["param_groups"][0]["params"]) == len(
        two["model"]) - 1  # the sigmas are no parameter
    assert one["optimizer"]["state"].keys() == two["optimizer"]["state"].keys()
    assert 0 < len(two["optimizer"]["state"]) < len(two["ema"]["shadow_params"])
    for a, b in zip(one["ema"]["shadow_params"], two["ema"]["shadow_params"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number, status, count", [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 1)])
def test_signal_finishes_the_update_writes_the_state_and_exits_with_its_status(number, status, count, tmp_path):
    """Two processes have a Ctrl-C twice: from the terminal and from torchrun."""
    scripts = start_ranks(tmp_path, "train.py", *arguments(tmp_path, training__n_iters=100000), count=count)
    log = tmp_path / "run" / "log.jsonl"
    while not read_json_lines(log):
        assert scripts[0].process.is_alive(), scripts[0].log
    for _ in range(count):
        for script in scripts:
            script.send(number)
    assert [script.wait() for script in scripts] == [status] * count, scripts[0].log
    done = load(tmp_path / "run" / STATE)["step"]
    assert done >= read_json_lines(log)[-1]["step"]
    assert f"after update {done}" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("script", ["train.py", "generate_data.py", "evaluation_fid.py", "image_sampling.py"])
def test_ctrl_c_while_torch_is_imported_is_no_traceback(script, repository):
    program = f"""if True:
        import os, runpy, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for jobs in the background
        class Interrupt:
            def find_spec(self, name, path=None, target=None):
                if name == "torch":
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Interrupt())
        runpy.run_path({script!r})"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=False,
                           env=os.environ | {"PYTHONPATH": str(repository)})
    assert ended.returncode == -signal.SIGINT and not ended.stderr


def test_corrupt_state_falls_back_to_the_one_before_and_says_so(tmp_path):
    run = finish(tmp_path, training__n_iters=12)
    (run / STATE).write_bytes((run / STATE).read_bytes()[:1000])
    finish(tmp_path, training__n_iters=14)
    log = (run / "log.txt").read_text()
    assert "skipped a damaged checkpoint" in log and "checkpoint_2.pth, 12 updates done" in log


def test_numbered_checkpoint_that_found_no_space_is_written_after_the_next_start(tmp_path, monkeypatch):
    def full(path, content):
        if path.name == "checkpoint_1.pth":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_checkpoint(path, content)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(state, "write_checkpoint", full)
        finish(tmp_path, training__n_iters=11)
    run = finish(tmp_path, training__n_iters=11)
    assert "6 updates done" in (run / "log.txt").read_text()
    assert load(run / "checkpoints" / "checkpoint_1.pth")["step"] == 11


def test_run_folder_says_how_the_run_was_made(tmp_path):
    run = tmp_path / "run"
    output_of(tmp_path, "train.py", *arguments(tmp_path, training__n_iters=14, training__snapshot_sampling=6,
                                           training__keep_checkpoints=1, training__snapshot_freq=4))
    assert json.loads((run / "config.json").read_text())["model"]["nf"] == 8
    assert "--config.model.nf=8" in (run / "command.txt").read_text()
    made_with = json.loads((run / "versions.json").read_text())
    assert made_with["torch"] == metadata.version("torch") and "commit" in made_with
    assert (run / "uncommitted.patch").exists()
    assert {p.name for p in (run / "samples").iterdir()} == {"step_6.png", "step_12.png", "step_14.png"}
    assert (run / "loss.png").stat().st_size > 1000
    assert list((run / "tensorboard").iterdir())
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"checkpoint_4.pth"}  # the last state alone is kept
    assert [e["step"] for e in read_json_lines(run / "log.jsonl")] == [4, 8, 12, 14]
    record = read_json_lines(run / "log.jsonl")[-1]
    assert {"loss", "lr", "grad_norm", "images_per_second", "memory_mb", "beta", "skipped"} <= record.keys()
    text = (run / "log.txt").read_text()
    assert "parameters on cpu (1 process), 1,797 images of 1×8×8, batch 16, 14 updates" in text
    assert f"{run / 'checkpoints' / 'checkpoint_4.pth'} and {run / 'samples' / 'step_14.png'}" in text


@pytest.mark.parametrize("fields, status, sentence", [
    ({"model__nf": 12}, 2, "model.nf (8 there, 12 here)"),
    ({"optim__beta1": 0.5}, 2, "--config.training.resume_from"),
    ({"expr": "run/"}, 0, "the run is finished; raise config.training.n_iters"),
])
def test_second_start_of_a_run_is_refused_where_it_contradicts_and_said_where_it_is_finished(
        fields, status, sentence, tmp_path, pretrained):
    run = pretrained.parents[1]
    before = (run / STATE).read_bytes()
    found, log = run_script(tmp_path, "train.py", *arguments(run.parent, **({"training__n_iters": 10} | fields)))
    assert found == status and sentence in log and log.count("\n") == 1
    assert (run / STATE).read_bytes() == before


def test_what_does_not_change_the_result_may_change_and_a_new_learning_rate_is_said(tmp_path):
    finish(tmp_path, training__n_iters=5)
    run = finish(tmp_path, training__n_iters=6, training__accumulation_steps=4, optim__lr=0.5)
    assert "from update 5 on: optim.lr (0.001 there, 0.5 here)" in (run / "log.txt").read_text()
    assert read_json_lines(run / "log.jsonl")[-1]["lr"] == 0.5


@pytest.mark.parametrize("fields, sentence", [
    ({"training__batch_size": 5000}, "1797"),
    ({"data__reflow_data_root": "absent"}, "absent"),
    ({"flow__pre_train_model": "absent.pth"}, "absent.pth"),
    ({"training__resume_from": "absent"}, "config.training.resume_from absent has no checkpoint"),
])
def test_invalid_options_fail_with_one_sentence_and_leave_no_run_behind(fields, sentence, tmp_path):
    status, log = run_script(tmp_path, "train.py", *arguments(tmp_path, **fields))
    assert status == 2 and sentence in log and log.count("\n") == 1, log
    assert not (tmp_path / "run").exists()


def test_resume_from_continues_another_run_in_a_new_folder(tmp_path, pretrained):
    whole = finish(tmp_path, "whole", training__n_iters=13)
    resumed = finish(tmp_path, "resumed", training__n_iters=13, training__resume_from=pretrained.parents[1])
    assert "10 updates done" in (resumed / "log.txt").read_text()
    whole, resumed = load(whole / STATE), load(resumed / STATE)
    assert resumed["step"] == 13 and same(whole["model"], resumed["model"]) and same(whole["ema"], resumed["ema"])


def test_unwritable_place_is_one_sentence_from_every_process(tmp_path):
    (tmp_path / "file").write_text("")
    for status, log in run_ranks(tmp_path, "train.py", *arguments(tmp_path / "file")):
        assert status == 2 and f"cannot write {tmp_path / 'file'}" in log and "Traceback" not in log, log


def test_diverging_run_stops_with_its_skipped_updates_named_and_its_checkpoints_intact(tmp_path):
    with pytest.raises(UserError, match="was not finite for .*config.training.max_skipped"):
        finish(tmp_path, optim__warmup=0, optim__lr=1e25, training__max_skipped=6, training__n_iters=100)
    assert read_json_lines(tmp_path / "run" / "log.jsonl")[0]["skipped"] == 3
    assert all(torch.isfinite(value).all() for value in load(tmp_path / "run" / STATE)["model"].values())


def test_processes_agree_on_what_is_skipped(tmp_path):
    run = finish_ranks(tmp_path, optim__warmup=0, optim__lr=1e25, training__n_iters=8)
    assert read_json_lines(run / "log.jsonl")[-1]["skipped"] == 7
    assert " s, 7 skipped since they were not finite; " in (run / "log.txt").read_text()


@pytest.mark.parametrize("objective, steps", [("1-flow", 1), ("guided distillation", 2)])
def test_compiled_run_is_one_graph_a_network_and_trains_as_an_eager_one(objective, steps, tmp_path, pairs, cuda_graphs):
    """Neither grids nor a teacher that is called twice an update compile another."""
    write_checkpoint(tmp_path / "start.pth", small_checkpoint())
    fields = OBJECTIVES[objective](pairs, tmp_path / "start.pth") | SMALL | {
        "training__n_iters": 4, "training__accumulation_steps": steps, "training__record_iters": 1,
        "training__snapshot_sampling": 2, "flow__guidance_first_step": "teacher"}
    runs = [finish(tmp_path, name, training__compile=name == "compiled", **fields) for name in ("eager", "compiled")]
    assert cuda_graphs == ["default"] * steps
    for eager, compiled in zip(*map(losses, runs), strict=True):
        assert compiled == pytest.approx(eager, rel=1e-4)
    eager, compiled = (load(run / STATE)["model"] for run in runs)
    assert list(compiled) == list(eager)
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


def test_compiler_that_fails_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="none"))
    with pytest.raises(UserError, match="config.training.compile is true, but torch.compile fails: InvalidBackend"):
        finish(tmp_path, training__compile=True)


def test_bf16_radam_and_accumulation_train(tmp_path):
    run = finish(tmp_path, training__n_iters=4, training__precision="bf16", training__accumulation_steps=4,
                 optim__optimizer="RAdam")
    (record,) = read_json_lines(run / "log.jsonl")
    assert record["skipped"] == 0 and 0 < record["loss"] < 5


def test_start_while_another_process_trains_is_refused_before_it_reads_a_state(monkeypatch, tmp_path):
    monkeypatch.setattr(state, "find_state", lambda *arguments: pytest.fail("a state is read"))
    with run.locked(tmp_path / "run"), pytest.raises(UserError, match="another process is training"):
        finish(tmp_path)


def test_start_continues_from_the_state_that_is_there_once_it_has_the_lock(monkeypatch, tmp_path):
    locked = run.locked

    def locked_after_another(path):
        monkeypatch.setattr(run, "locked", locked)
        finish(tmp_path, training__n_iters=3)
        return locked(path)

    monkeypatch.setattr(run, "locked", locked_after_another)
    path = finish(tmp_path, training__n_iters=5, training__record_iters=1)
    assert "3 updates done" in (path / "log.txt").read_text()
    assert [entry["step"] for entry in read_json_lines(path / "log.jsonl")] == [3, 4, 5]


def test_wandb_starts_before_tensorboard_and_a_missing_package_or_key_is_one_sentence(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="config.training.wandb needs the package wandb"):
        finish(tmp_path, training__wandb="flows")
    asked, fake = [], types.ModuleType("wandb")
    fake.__spec__, fake.Error = ModuleSpec("wandb", None), ZeroDivisionError
    monkeypatch.setitem(sys.modules, "wandb", fake)
    fake.init = lambda **options: 1 / 0
    with pytest.raises(UserError, match="config.training.wandb: division by zero Or set WANDB_MODE=offline"):
        finish(tmp_path, training__wandb="flows")
    fake.init = lambda **options: asked.append((options, (tmp_path / "run" / "tensorboard").exists()))
    finish(tmp_path, training__wandb="flows")
    options = {"project": "flows", "name": "run", "dir": str(tmp_path / "run"), "sync_tensorboard": True}
    assert asked == [(options, False)]


def test_memory_that_runs_out_is_one_sentence_that_names_the_fields_to_change(tmp_path, monkeypatch):
    def full(x, t, label=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(train, "velocity_from_network", lambda network: full)
    with pytest.raises(UserError, match="^out of memory: raise config.training.accumulation_steps .* or lower "
                                        "config.training.batch_size"):
        finish(tmp_path)


@pytest.mark.parametrize("value", [True, False])
def test_deterministic_training_sets_every_switch(value, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)  # put back at the end
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        finish(tmp_path, training__deterministic=value)
        assert torch.are_deterministic_algorithms_enabled() is value and torch.backends.cudnn.benchmark is not value
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if value else None)
    finally:
        torch.use_deterministic_algorithms(before)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
