"""Who may go on in a run's folder, on which data, and how a signal ends it."""

import contextlib
import signal

import pytest

from configs.command_line import config_to_dict
from runtime.files import write_json
from runtime.terminal import UserError
from tests.helpers import DIGITS, config_of
from training import run, state


def config_in(folder, **fields):
    """Return the digits' config of a run in `folder`."""
    return config_of(DIGITS, work_dir=str(folder), expr="run", **fields)


def test_a_second_start_of_a_run_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for again in (tmp_path / "run", tmp_path / "link"):
        with (run.locked(tmp_path / "run"), pytest.raises(UserError, match="another process is training in"),
              run.locked(again)):
            pass
    with run.locked(tmp_path / "run"), run.locked(tmp_path / "other"):
        assert not (tmp_path / "run").exists()


def test_grids_that_cannot_be_drawn_are_refused_before_the_first_update(tmp_path):
    fields = {"data.dataset": "custom", "data.num_channels": 4, "data.reflow_data_root": "latents"}
    run.check_training(config_in(tmp_path, **fields, training__snapshot_sampling=0))
    with pytest.raises(UserError, match="num_channels is 4, .* set config.training.snapshot_sampling to 0"):
        run.check_training(config_in(tmp_path, **fields))


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path):
    with pytest.raises(UserError, match="batch_size 15 cannot be split into 2 processes × 1 accumulation steps"):
        run.check_training(config_in(tmp_path, training__batch_size=15), world_size=2)


def test_a_slash_at_the_end_of_a_path_is_no_other_run(tmp_path):
    config = config_in(tmp_path, data__reflow_data_root="pairs", flow__pre_train_model="a/b.pth")
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "config.json", config_to_dict(config))
    other = config_in(tmp_path, data__reflow_data_root="pairs/", flow__pre_train_model="./a/b.pth",
                      training__compile=True, training__precision="bf16")
    assert state.check_same_run(other, tmp_path / "run") == ["training.precision ('tf32' there, 'bf16' here)"]
    other.flow.pre_train_model = "a/c.pth"
    with pytest.raises(UserError, match="a/c.pth.*training.resume_from"):
        state.check_same_run(other, tmp_path / "run")


@pytest.mark.parametrize("field, value, free", [("sampling.sample_N", 3, True), ("sampling.train_subset", "3", False),
                                                ("sampling.init_noise_scale", 0.9, False)])
def test_a_field_of_sampling_may_change_unless_it_is_about_the_training(field, value, free, tmp_path):
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "config.json", config_to_dict(config_in(tmp_path)))
    other = config_in(tmp_path, **{field: value})
    with contextlib.nullcontext() if free else pytest.raises(UserError, match=field):
        assert state.check_same_run(other, tmp_path / "run") == []


def test_data_that_changed_between_two_starts_are_named(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"one")
    config = config_in(tmp_path, data__dataset="custom", data__data_root=str(tmp_path / "images"))
    assert run.open_run(config) == [] and run.open_run(config) == []
    (tmp_path / "images" / "a.png").write_bytes(b"another")
    (said,) = run.open_run(config)
    assert str(tmp_path / "images") in said and "changed" in said
    assert run.open_run(config) == []  # said once


def test_schedules_that_are_longer_than_the_run_are_said(tmp_path):
    long = config_in(tmp_path, training__n_iters=20, optim__warmup=21, training__x0_randomness="warmup_cos_21",
                     data__reflow_data_root="pairs")
    assert [text.split(" is longer")[0] for text in run.endless_schedules(long)] == [
        "config.optim.warmup 21", "config.training.x0_randomness warmup_cos_21"]
    fitting = config_in(tmp_path, training__n_iters=20, optim__warmup=20, training__x0_randomness="warmup_20",
                        data__reflow_data_root="pairs")
    assert run.endless_schedules(fitting) == []


def test_the_first_signal_decides_and_only_a_second_ctrl_c_interrupts():
    with run.stop_requests(1) as agreed:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert agreed() == signal.SIGTERM
    with run.stop_requests(1) as agreed, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        assert agreed() == signal.SIGINT
        signal.raise_signal(signal.SIGINT)


def test_processes_agree_on_a_signal_and_outlive_a_second_ctrl_c(monkeypatch):
    """torchrun sends its workers the Ctrl-C that they had from the terminal."""
    monkeypatch.setattr(run.dist, "new_group", lambda backend: "group")
    monkeypatch.setattr(run.dist, "all_reduce", lambda vote, op, group: vote.fill_(max(vote, from_another)))
    with run.stop_requests(2) as agreed:
        from_another = 0
        assert agreed() == 0
        from_another = signal.SIGTERM
        assert agreed() == signal.SIGTERM
        from_another = 0
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert agreed() == signal.SIGINT
