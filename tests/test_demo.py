"""`make demo` in its tiny form: the whole method through the four scripts, its report, and a second start."""

import json
import subprocess
import sys

import pytest

from tests.processes import ROOT

KEYS = {"stage", "sampler", "parameters", "nfe", "frechet_distance", "seconds"}


def run_demo(folder):
    """Run the tiny demo in `folder`; return the finished process."""
    words = [sys.executable, "-m", "tools.demo", "--size", "tiny", "--work_dir", folder / "logs",
             "--pairs_dir", folder / "pairs"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a finished tiny demo, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    done = run_demo(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "logs" / "demo", done.stdout


def test_whole_method_runs_through_the_four_scripts_and_reports_every_stage(demo):
    folder, printed = demo
    rows = json.loads((folder / "report.json").read_text())
    assert all(row.keys() >= KEYS for row in rows)
    assert {row["stage"] for row in rows} == {"1-flow", "2-flow", "distilled"}
    assert {(row["stage"], row["sampler"]) for row in rows} >= {
        ("1-flow", "one_step"), ("1-flow", "rk45"), ("2-flow", "one_step"), ("distilled", "one_step")}
    parameters = {row["stage"]: row["parameters"] for row in rows}
    assert parameters == {"1-flow": 748737, "2-flow": 188769, "distilled": 188769}
    assert all(row["nfe"] == 1 for row in rows if row["sampler"] == "one_step")
    report = (folder / "report.md").read_text()
    assert all(f"| {row['stage']} | {row['sampler']} |" in report for row in rows) and report in printed
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "1_flow" / "eval_sample" / "checkpoint_1" / "contact_sheet.png").exists()


def test_second_start_redoes_no_finished_stage(demo):
    folder, _ = demo
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.pth")}
    done = run_demo(folder.parents[1])
    assert done.returncode == 0, done.stderr
    stages = json.loads((folder / "stages.json").read_text())
    assert done.stdout.count("finished before") == len(stages)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.pth")}
