"""The programme for one stay on a GPU runs every part on a CPU in its tiny form."""

import json
import math
import sys
import time
import types

import torch

from benchmarks import gpu, released
from benchmarks.gpu import COMPILED, FIRST, LAST, SAMPLING
from tests.processes import HANGING, output_of

ROWS = [{"part": "train", **values} for values in (*FIRST, *COMPILED, *LAST)]
ROWS += [{"part": "sample", "sampler": sampler, **values} for sampler in ("one_step", "euler-10", "rk45")
         for values in SAMPLING]
ROWS += [{"part": "released", "size": "15.7M"}, {"part": "pretrain", "size": "15.7M"}, {"part": "features"},
         {"part": "script", "name": "pairs", "tol": 1e-3}, {"part": "script", "name": "evaluate", "tol": 1e-3},
         *({"part": "repeats", "deterministic": value} for value in (False, True))]


def test_every_row_of_the_gpu_programme_has_figures(tmp_path, monkeypatch, capsys):
    """Networks stay uncompiled, since the compiler is slow on a CPU and tested elsewhere."""
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)
    monkeypatch.setattr(gpu, "subprocess", types.SimpleNamespace(
        run=lambda command, **options: output_of(tmp_path, *command[1:]), DEVNULL=None))  # without imports
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--seconds", str(HANGING), "--out", str(tmp_path)])
    gpu.main()
    printed = capsys.readouterr().out
    assert "not reached: nothing" in printed and printed.count(" commit ") == 1
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "error" in row]
    for wanted in ROWS:
        assert sum(wanted.keys() <= row.keys() and wanted == {name: row[name] for name in wanted} for row in rows) > 0
    assert len(rows) == len(ROWS) and [row["name"] for row in rows if "name" in row] == ["pairs", "evaluate"]
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    for row in rows:
        if row["part"] == "repeats":
            assert row["same_bits"]
        elif row["part"] == "script":  # the difference of two short runs may be negative
            assert row["images_s"] and row["start_s"] > 0
        else:
            assert row["images_s"] > 0


def never_ready():
    """Let no training become ready."""
    released.create_training = lambda *arguments: time.sleep(HANGING)


def test_when_the_time_is_up_the_row_that_runs_ends_and_the_others_are_named(tmp_path):
    printed = output_of(tmp_path, "benchmarks.gpu", "--tiny", "--seconds", 1, "--out", tmp_path, prepare=never_ready)
    assert [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()] == [
        {"part": "train", **FIRST[0], "error": "TimeoutError: the time is up"}]
    named = printed.partition("not reached: ")[2].splitlines()[0].split("; ")
    assert len(named) == len(ROWS) - 1 and named[0] == f"train {' '.join(FIRST[1].values())}"
