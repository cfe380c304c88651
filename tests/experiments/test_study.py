"""A tiny study through the four scripts: rows, a second start, a step again, a failing step, tables and plots."""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import io
import json
import pathlib
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from configs.command_line import parse_flags
from experiments import report, run
from experiments.report import COLUMNS, read_table, write_table
from experiments.run import Study
from experiments.studies import DIGITS, GUIDED, ONE_STEP, STUDIES, T0, annealed, cifar, euler, miniature
from models.checkpoint import load_model, write_checkpoint
from runtime.files import file_lock, write_json
from runtime.terminal import UserError
from tests.helpers import overrides, small_checkpoint
from tests.processes import Script

TINY = dataclasses.replace(DIGITS, measured=40)


def tiny_study():
    setting = miniature(TINY, 0)
    flow = setting.train("1_flow", 3, model__nf=8)
    made = setting.pairs("pairs", flow, 64, **euler(2))
    small = setting.train("2_flow_annealed", 3, made, model__nf=4, **annealed(2))
    distilled = setting.train("distilled_guided_student", 3, made, small, model__nf=4, **T0, **GUIDED)
    return [flow, made, small, distilled, *setting.evaluate([flow, distilled], ONE_STEP), setting.look(small)]


def run_steps(study, steps):
    with file_lock(study.root / "study.lock", "running a study") as lock:
        study.run(study.missing(steps), lock)


def launch_step(study, command, output, environment, lock):
    """Run the command of a step as `Study.launch` does, without paying for the imports."""
    log = pathlib.Path(output) if output else study.root / "output.txt"
    script = Script(log.parent, command[1], command[2:], {"OMP_NUM_THREADS": "1"})
    status = script.wait()
    with open(log, "a") as opened:
        opened.write(script.log)
    return status, 0.5


@pytest.fixture(scope="module", autouse=True)
def steps_without_imports():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Study, "launch", launch_step)
        yield


def run_program(*arguments):
    """Run experiments.run in this process; return what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run.main(parse_flags(list(map(str, arguments)), run.FLAGS)) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder, `Study` and steps of a finished tiny study."""
    folder = tmp_path_factory.mktemp("study")
    study, steps = Study(folder / "runs", folder / "results.csv", jobs=2), tiny_study()
    run_steps(study, steps)
    return folder, study, steps


def test_every_step_leaves_a_row_with_its_figures_and_its_processor(finished):
    folder, _, steps = finished
    rows = read_table(folder / "results.csv")
    real = rows.pop("digits_8/real")
    assert real["feature_distance"] > 0 and real["nearest"] > 0
    assert {row["digest"] for row in rows.values()} == {step.digest for step in steps}
    assert all(row["seconds"] > 0 and row["processor"] for row in rows.values())
    assert rows["digits/seed0/1_flow"]["loss"] > 0 and rows["digits/seed0/pairs"]["nfe"] == 2
    assert rows["digits/seed0/2_flow_annealed/straightness"]["straightness"] > 0
    row = rows["digits/seed0/distilled_guided_student/euler-1"]
    assert row["nfe"] == 1 and row["feature_distance"] > 0 and row["pixel_distance"] > 0 and row["nearest"] > 0
    assert 0 <= row["precision"] <= 1 and 0 <= row["recall"] <= 1 and 0 <= row["recognised"] <= 1
    assert row["parameters"] < rows["digits/seed0/1_flow/euler-1"]["parameters"]


def test_a_second_start_finds_nothing_to_run_and_a_lost_row_is_measured_without_its_script(finished):
    folder, study, steps = finished
    rows = read_table(folder / "results.csv")
    assert study.missing(steps) == []
    write_table(folder / "less.csv", {name: row for name, row in rows.items() if name != steps[4].name})
    assert Study(study.root, folder / "less.csv", jobs=2).missing(steps) == [steps[4]]
    assert study.run_step(steps[4], "", None) == pytest.approx(rows[steps[4].name]["seconds"], abs=0.06)


def test_a_step_run_again_gives_the_same_figures(finished):
    folder, study, steps = finished
    before, name = read_table(folder / "results.csv"), steps[2].name
    checkpoint = study.root / name / "checkpoints/checkpoint_1.pth"
    made = checkpoint.stat().st_mtime_ns
    run_steps(Study(study.root, study.results, jobs=2, again=name), [steps[2]])
    after = read_table(folder / "results.csv")
    assert after[name]["loss"] == before[name]["loss"] and after.keys() == before.keys()
    assert checkpoint.stat().st_mtime_ns > made


def test_a_step_of_other_arguments_does_not_continue_the_old_one(finished):
    _, study, steps = finished
    other = dataclasses.replace(steps[0], arguments=(*steps[0].arguments, "--config.optim.lr", "1e-3"))
    assert study.state(steps[0])["finished"] and study.state(other)["digest"] is None


def test_a_failing_step_is_named_with_what_its_script_printed(finished, tmp_path):
    _, _, steps = finished
    wrong = dataclasses.replace(steps[0], arguments=(*steps[0].arguments, "--config.optim.lr", "fast"))
    study = Study(tmp_path, tmp_path / "results.csv", jobs=2)
    with pytest.raises(UserError, match=r"1_flow: train\.py ended with status 2.*optim\.lr"):
        run_steps(study, [wrong])
    assert read_table(tmp_path / "results.csv").keys() == {"digits_8/real"}
    assert study.state(wrong)["seconds"] > 0 and not study.state(wrong)["finished"]


def test_studies_in_two_folders_lose_no_row_of_a_table_that_they_share(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.run.git_commit", lambda: "0" * 40)

    def write(name):
        study = Study(tmp_path / name, tmp_path / "results.csv", jobs=1)
        for number in range(10):
            study.write_row(f"{name}/{number}", "train", 0, loss=1.0)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(write, "ab"))
    assert len(read_table(tmp_path / "results.csv")) == 20


def test_scripts_of_a_killed_study_hold_its_lock(tmp_path):
    with file_lock(tmp_path / "study.lock", "running a study") as lock:
        script = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    with open(tmp_path / "study.lock", "a") as opened:
        with pytest.raises(BlockingIOError):
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        script.communicate(b"\n")
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_tables_show_each_step_once_and_comparisons_only_common_seeds(finished, tmp_path):
    folder, _, _ = finished
    rows = read_table(folder / "results.csv")
    text = report.table(rows)
    assert len(re.findall(r"^\| digits/seed\{seed\}/1_flow/euler-1 \| 1 \|", text, re.M)) == 1
    other = {"digits/seed7/pairs": rows["digits/seed0/pairs"] | {"seed": "7"}}
    assert re.search(r"^\| digits_8/real .*\| 1 \|$", report.table(rows | other), re.M)  # once, whatever the seeds
    report.draw_miniature(rows, tmp_path)
    assert (tmp_path / "miniature_quality.png").read_bytes().startswith(b"\x89PNG")

    def entry(name, seed, distance):
        return {f"d/seed{seed}/{name}": {"seed": str(seed), "feature_distance": distance}}

    rows = {}
    for name, distances in {"a": (1.0, 2.0), "b": (2.0, 4.0, 9.0)}.items():
        for seed, distance in enumerate(distances):
            rows |= entry(name, seed, distance)
    line = report.compare(rows, "d/seed{seed}/a", "d/seed{seed}/b")
    assert "b 3 ± 1.4, difference 1.5 ± 0.71, the same sign in 2 of 2 seeds" in line
    with pytest.raises(UserError, match="no seed in common"):
        report.compare(rows, "d/seed{seed}/a", "d/seed{seed}/c")


def test_the_committed_table_is_whole_and_a_table_that_was_cut_is_refused(repository, tmp_path):
    rows = read_table(repository / "experiments" / "results.csv")
    write_table(tmp_path / "results.csv", rows)
    assert read_table(tmp_path / "results.csv") == rows
    text = (tmp_path / "results.csv").read_text()
    (tmp_path / "results.csv").write_text(text[: text.rindex(",", 0, -8)])
    with pytest.raises(UserError, match=f"not a whole table of results of {len(COLUMNS)} columns"):
        read_table(tmp_path / "results.csv")


@pytest.mark.parametrize(("arguments", "said"), [
    (["--study", "digit"], "there is no such study; choose from demo, digits"),
    (["--again", "digits/seed9"], "no step is called digits/seed9"),
    (["--study", "cifar", "--cifar_root", "nowhere"], "--cifar_root nowhere has no cifar10-jpeg-train.zip"),
    (["--wrok_dir", "x"], "wrok_dir"),
])
def test_a_wrong_name_is_said(tmp_path, arguments, said):
    with pytest.raises(UserError, match=said):
        run_program(*arguments, "--root", tmp_path / "root", "--results", tmp_path / "results.csv")


def test_every_step_of_every_study_has_a_name_of_its_own_and_comes_after_its_needs():
    for study in STUDIES.values():
        seen = {}
        for step in study():
            assert all(need.name in seen for _, need in step.needs), step.name
            assert seen.setdefault(step.name, step) == step
        assert seen


def test_part_of_the_demo_that_is_there_runs_nothing_and_ends_without_the_report_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(Study, "launch", lambda *arguments: pytest.fail("a finished step runs again"))
    (digest,) = (step.digest for step in STUDIES["demo"]() if step.name == "pairs")
    write_table(tmp_path / "results.csv", {"pairs": dict.fromkeys(COLUMNS, "") | {"step": "pairs", "digest": digest}})
    printed = run_program("--study", "demo", "--steps", "pairs", "--root", tmp_path)
    assert "all 1 steps are in" in printed and not (tmp_path / "report.md").exists()


def test_samples_of_runs_of_one_name_are_all_in_the_grid(tmp_path, monkeypatch):
    for seed in ("seed0", "seed1"):
        content = small_checkpoint()
        write_checkpoint(tmp_path / seed / "flow/checkpoints/checkpoint_1.pth", content)
        write_json(tmp_path / seed / "flow/config.json", content["config"])
    drawn = []
    monkeypatch.setattr(report, "save_grid", lambda path, images, columns, labels: drawn.append((len(images), labels)))
    report.draw_samples(tmp_path / "x.png", [tmp_path / seed / "flow" for seed in ("seed0", "seed1")], columns=2)
    assert drawn == [(8, ("data", "flow, rk45", "flow, one step", "flow, one step"))]


def test_sizes_of_a_study_in_one_folder_do_not_share_their_images():
    archives = {word for size in ("tiny", "small", "large") for word in cifar(size)[0].command("root")
                if word.endswith("train.zip")}
    assert archives == {f"root/images/cifar_{size}/train.zip" for size in (8, 16, 32)}


def test_cifar_runs_end_to_end_from_zips_of_class_folders(tmp_path):
    random = np.random.default_rng(0)
    for part, count in (("train", 80), ("test", 40)):
        with zipfile.ZipFile(tmp_path / f"cifar10-jpeg-{part}.zip", "w") as archive:
            for number in range(count):
                with archive.open(f"{part}/{number % 10}/{number:03}.jpg", "w") as opened:
                    pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(opened, "JPEG")
    run_program("--study", "cifar", "--size", "tiny", "--jobs", 2, "--cifar_root", tmp_path, "--root",
                tmp_path / "runs", "--results", tmp_path / "results.csv")
    rows = read_table(tmp_path / "results.csv")
    assert rows.keys() == {"cifar_8/real", *(step.name for step in cifar("tiny"))}
    distilled = rows["cifar_tiny/seed0/distilled/euler-1"]
    assert distilled["feature_distance"] > 0 and distilled["nfe"] == 1
    about = json.loads((tmp_path / "runs/cifar_tiny/seed0/2_flow_pairs/0/pairs.json").read_text())
    assert about["nfe_mean"] > 1
    for name in ("1_flow", "2_flow", "distilled"):  # slim files hold the averaged weights in float16
        run = f"cifar_tiny/seed0/{name}"
        whole = load_model(tmp_path / "runs" / run / "checkpoints/checkpoint_1.pth").parameters()
        slim = load_model(tmp_path / "runs/slim" / f"{run}.pth").parameters()
        assert all(torch.equal(a.half().float(), b) for a, b in zip(whole, slim, strict=True))


def test_make_demo_at_a_250th_of_its_length_runs_the_whole_method_and_reports_every_stage(tmp_path, monkeypatch):
    coarse = overrides(sampling__ode_tol=0.1, eval__num_samples=16, eval__batch_size=16)
    monkeypatch.setattr(Study, "launch", lambda study, command, *more: launch_step(study, [*command, *coarse], *more))
    printed = run_program("--study", "demo", "--scale", "0.004", "--root", tmp_path)
    rows = read_table(tmp_path / "results.csv")
    figures = ["1_flow/one_step", "1_flow/rk45", "2_flow/one_step", "distilled/one_step"]
    assert [rows[name]["parameters"] for name in figures] == [748737, 748737, 188769, 188769]
    assert all(rows[name]["pixel_distance"] > 0 for name in figures) and rows["distilled/one_step"]["nfe"] == 1
    report = (tmp_path / "report.md").read_text()
    assert all(f"| {name} |" in report for name in rows) and report in printed
    assert "1_flow/rk45: pixel Fréchet distance" in report and f"drawing samples: {tmp_path}/demo.png" in printed
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
