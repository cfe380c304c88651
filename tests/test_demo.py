"""`make demo` at a sixtieth of its length: the whole method through the four scripts, its report, a second start."""

import pytest

from experiments.report import read_table
from tests.processes import run_script, run_study


def run_demo(folder):
    """Run the short demo in `folder`; return what it printed."""
    status, printed = run_script(folder, "experiments.run", "--study", "demo", "--scale", "0.0166", "--root", folder,
                                 prepare=run_study)
    assert status == 0, printed
    return printed


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a finished short demo, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder)


def test_whole_method_runs_through_the_four_scripts_and_reports_every_stage(demo):
    folder, printed = demo
    rows = read_table(folder / "results.csv")
    figures = ["1_flow/one_step", "1_flow/rk45", "2_flow/one_step", "distilled/one_step"]
    assert [rows[name]["parameters"] for name in figures] == [748737, 748737, 188769, 188769]
    assert all(rows[name]["pixel_distance"] > 0 for name in figures) and rows["distilled/one_step"]["nfe"] == 1
    report = (folder / "report.md").read_text()
    assert all(f"| {name} |" in report for name in rows) and report in printed
    assert "1_flow/rk45: pixel Fréchet distance" in report
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_second_start_redoes_no_finished_stage(demo):
    folder, _ = demo
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.pth")}
    assert "train.py" not in run_demo(folder) and len(before) > 5
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.pth")}
