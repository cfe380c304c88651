"""tools.runs lists every run with its last figure, whatever state it is in."""

import json
import types

import pytest

from configs.command_line import config_to_dict
from configs.default import get_default_config
from runtime.files import write_json
from runtime.terminal import UserError
from tools import runs


def write_run(folder, log=(), results=()):
    """Write a run folder with a config, a log and results."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "eval").mkdir()
    write_json(folder / "config.json", config_to_dict(get_default_config()))
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    (folder / "eval" / "results.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in results))
    return folder


def result(number, value):
    """A line of results.jsonl as evaluation_fid.py writes it."""
    return {"checkpoint": f"checkpoint_{number}.pth", "sampler": "euler", "sample_N": 1, "num_samples": 10, "step": 5,
            "nfe": 1.0, "seconds": 1.0, "reference": "x", "protocol": "y", "versions": {}, "seeds": {}, "fid": value}


def test_a_row_has_step_loss_newest_checkpoint_and_the_last_figure(tmp_path, capsys):
    run = write_run(tmp_path / "a" / "distilled", [{"step": 500, "loss": 0.25, "images_per_second": 99.6}],
                    [result(1, 9.0), result(2, 4.5321)])
    (run / "checkpoints" / "checkpoint_2.pth").touch()
    write_run(tmp_path / "started")
    runs.main(types.SimpleNamespace(work_dir=tmp_path))
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "step", "loss", "images/s", "newest", "last", "figure", "last", "written"]
    row = next(row for row in rows if row.startswith("a/distilled"))
    for text in ("500 of 1300001", " 0.25 ", " 2    ", "FID 4.532 (checkpoint_2, euler-1)"):
        assert text in row
    assert len(rows) == 2 and all(len(row) < 120 for row in rows)


def test_a_long_name_loses_its_middle_so_that_a_line_has_fewer_than_120_characters(tmp_path, capsys):
    names = ["2_rectified_flow_500000bigflow_28m_distill_lpips_use_teacher", "short"]
    last = result(26, 4.5321) | {"sampler": "rk45", "sample_N": None, "ode_tol": 0.01, "step_control": "sample"}
    for name in names:
        write_run(tmp_path / name, [{"step": 500000, "loss": 0.25, "images_per_second": 999.6}], [last])
    runs.main(types.SimpleNamespace(work_dir=tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) < 120 for line in lines)
    assert all("FID 4.532 (checkpoint_26, rk45)" in line for line in lines[1:])
    short, long = sorted((line.split()[0] for line in lines[1:]), key=len)
    start, end = long.split("…")
    assert short == "short" and names[0].startswith(start) and names[0].endswith(end) and len(long) > 20


def test_a_line_has_fewer_than_120_characters_with_a_long_checkpoint_name_too(tmp_path, capsys):
    last = result(1, 4.5321) | {"checkpoint": "edm-imagenet-64x64-cond-adm-and-its-longer-name.pkl", "sampler": "edm"}
    write_run(tmp_path / ("a" * 60), [{"step": 1300001, "loss": 123.25, "images_per_second": 99999.6}], [last])
    runs.main(types.SimpleNamespace(work_dir=tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) < 120 for line in lines) and "FID 4.532 (edm" in lines[1] and "…" in lines[1]


def test_a_damaged_config_hides_no_other_run(tmp_path, capsys):
    (write_run(tmp_path / "damaged") / "config.json").write_text("{")
    write_run(tmp_path / "whole")
    runs.main(types.SimpleNamespace(work_dir=tmp_path))
    printed = capsys.readouterr().out
    assert "0 of ?" in printed and "0 of 1300001" in printed


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(UserError, match="no runs in .*; name their folder with --work_dir"):
        runs.main(types.SimpleNamespace(work_dir=tmp_path))
