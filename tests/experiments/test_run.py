"""A tiny study through the four scripts: rows, a second start, a step again, a failing step, the report."""

import dataclasses
import fcntl
import subprocess
import sys

import pytest

from experiments import report
from experiments.findings import RECIPE_CLAIMS
from experiments.run import Root, Runner, missing_steps
from experiments.steps import DIGITS, Step, evaluate, look, pairs, train
from experiments.studies import RECIPE_SEEDS
from experiments.table import read_table
from runtime.locks import file_lock
from tests.processes import run_script

TINY = dataclasses.replace(DIGITS, measured=40)


def tiny_study():
    flow = train("digits/seed0/1_flow", TINY, 0, 3, width=8)
    made = pairs("digits/seed0/pairs", flow, 64, use_ode_sampler="euler", sample_N=2)
    small = train("digits/seed0/2_flow_annealed", TINY, 0, 3, width=4, pairs=made, training__x0_randomness="warmup_2")
    distilled = train("digits/seed0/distilled_guided_student", TINY, 0, 3, width=4, pairs=made, start=small,
                      flow__flow_t_schedule="t0", flow__use_teacher="true")
    one = {"use_ode_sampler": "euler", "sample_N": 1}
    return [flow, made, small, distilled, evaluate(flow, **one), evaluate(distilled, **one), look(small)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and table of a finished tiny study."""
    folder = tmp_path_factory.mktemp("study")
    runner = Runner(Root(folder / "runs"), folder / "results.csv", jobs=2)
    steps = tiny_study()
    runner.prepare(steps)
    with file_lock(folder / "study.lock", "running a study") as lock:
        runner.run(missing_steps(steps, {}, runner.root), lock)
    return folder, runner, steps


def test_every_step_leaves_a_row_with_its_figures(finished):
    folder, _, steps = finished
    rows = read_table(folder / "results.csv")
    assert {row["digest"] for row in rows.values()} == {step.digest for step in steps}
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows["digits/seed0/1_flow"]["loss"] > 0 and rows["digits/seed0/pairs"]["nfe"] == 2
    assert rows["digits/seed0/2_flow_annealed/straightness"]["straightness"] > 0
    row = rows["digits/seed0/distilled_guided_student/euler-1"]
    assert row["nfe"] == 1 and row["feature_distance"] > 0 and row["pixel_distance"] > 0 and row["nearest"] > 0
    assert row["parameters"] < rows["digits/seed0/1_flow/euler-1"]["parameters"]


def test_a_second_start_finds_nothing_to_run(finished):
    folder, runner, steps = finished
    assert missing_steps(steps, read_table(folder / "results.csv"), runner.root) == []


def test_a_lost_row_is_measured_again_without_running_the_script(finished):
    folder, runner, steps = finished
    rows = read_table(folder / "results.csv")
    before = rows.pop(steps[4].name)
    assert missing_steps(steps, rows, runner.root) == [steps[4]]
    runner.write_row(steps[4], before["seconds"])
    assert read_table(folder / "results.csv")[steps[4].name] == before


def test_a_step_run_again_gives_the_same_figures(finished, capfd):
    folder, runner, steps = finished
    before = read_table(folder / "results.csv")
    name = steps[2].name
    with file_lock(folder / "study.lock", "running a study") as lock:
        runner.run(missing_steps([steps[2]], before, runner.root, {name}), lock, {name})
    after = read_table(folder / "results.csv")
    assert after[name]["loss"] == before[name]["loss"] and after.keys() == before.keys()
    assert "before, at commit" in capfd.readouterr().err


def test_the_report_has_the_rows_and_the_plot(finished, tmp_path):
    folder, _, _ = finished
    report.write_report(folder / "results.csv", tmp_path / "miniature.md", seeds=(0,))
    text = (tmp_path / "miniature.md").read_text()
    assert "| 1-flow | euler-1 | 1 |" in text and "real against real" in text and "not run yet" in text
    assert (tmp_path / "miniature_quality.png").read_bytes().startswith(b"\x89PNG")


def test_a_failing_step_is_named_with_what_its_script_said(finished, tmp_path):
    _, runner, steps = finished
    wrong = Step("digits/wrong", "train", TINY, 0, (*steps[0].words, "--config.optim.lr", "fast"))
    other = Runner(Root(tmp_path), tmp_path / "results.csv", jobs=1)
    with file_lock(tmp_path / "study.lock", "running a study") as lock:
        result = pytest.raises(ValueError, other.run, [wrong], lock)
    assert "digits/wrong: train.py ended with status 2" in str(result.value) and "optim.lr" in str(result.value)
    assert read_table(tmp_path / "results.csv") == {}
    spent = other.root.seconds_before(wrong)  # counts, when the step goes on
    assert spent > 0
    other.root.forget(wrong)
    assert other.root.seconds_before(wrong) == 0


@pytest.mark.parametrize(("words", "said"), [
    (["--study", "digit"], "there is no such study; choose of digits"),
    (["--again", "digits/seed9"], "no step is called digits/seed9"),
])
def test_a_wrong_name_gets_one_sentence(tmp_path, words, said):
    status, printed = run_script(tmp_path, "experiments.run", *words)
    lines = [line for line in printed.splitlines() if not line.startswith("study: ")]  # data that is not here
    assert status == 2 and len(lines) == 1 and said in lines[0]


def test_a_report_that_cannot_be_written_gets_one_sentence(tmp_path):
    (tmp_path / "file").write_text("no folder")
    status, printed = run_script(tmp_path, "experiments.report", "--report", tmp_path / "file" / "report.md")
    assert status == 2 and "cannot write" in printed and "Traceback" not in printed


def test_scripts_of_a_killed_study_hold_its_lock(tmp_path):
    with file_lock(tmp_path / "study.lock", "running a study") as lock:
        script = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    with open(tmp_path / "study.lock", "a") as opened:
        with pytest.raises(BlockingIOError):
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        script.communicate(b"\n")
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_report_holds_the_recommended_recipe_against_the_released_one():
    rows = {}
    for name, distance in (("recommended", 0.3), ("released", 0.9)):
        for seed in RECIPE_SEEDS:
            for run in ("pairs", *report.RECIPE_RUNS):
                rows[f"digits/seed{seed}/recipe_{name}/{run}"] = {
                    "seed": str(seed), "nfe": 20.0, "feature_distance": distance + seed / 100, "pixel_distance": 1.0}
    text = report.recipe_section(rows)
    assert text.count("**holds**") == len(RECIPE_CLAIMS)
    assert "| recommended | distilled, one step | 4,000 × 20.0 | 0.34 ± 0.01 | 1 ± 0 | 3 |" in text
    assert "--config.training.x0_randomness" in text and "{" not in text


def test_a_table_that_was_cut_is_refused(finished, tmp_path):
    folder, _, _ = finished
    text = (folder / "results.csv").read_text()
    (tmp_path / "results.csv").write_text(text[: text.rindex(",", 0, -8)])
    with pytest.raises(ValueError, match="line 8, has not 15 fields: restore the file with git"):
        read_table(tmp_path / "results.csv")


@pytest.mark.parametrize("program", ["experiments.run", "experiments.report", "tools.demo", "tools.runs"])
def test_a_misspelt_flag_gets_one_sentence(tmp_path, program):
    status, printed = run_script(tmp_path, program, "--wrok_dir", "x")
    assert status == 2 and printed.startswith(f"{program}: ") and "wrok_dir" in printed and printed.count("\n") == 1


def test_an_ablation_stands_beside_the_main_line_on_its_own_seeds():
    def entry(run, seed, distance):
        return {f"digits/seed{seed}/{run}/euler-1": {"seed": str(seed), "feature_distance": distance}}

    rows = {**entry("a", 0, 1.0), **entry("base", 0, 2.0), **entry("base", 1, 4.0), **entry("alone", 2, 5.0)}
    name = "digits/seed{{seed}}/{}/euler-1".format
    text = report.change_table(rows, "Factor", [(run, name(run)) for run in ("a", "base", "alone", "none")],
                               name("base"))
    assert "| a | 1 | 2 | 1 |" in text and "| base | 3 ± 1.4 | 3 ± 1.4 | 2 |" in text
    assert "| alone | 5 |  | 1 |" in text and "none" not in text
