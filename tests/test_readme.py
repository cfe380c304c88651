"""Every command of the README runs, in its order, with overrides that only make it tiny."""

import inspect
import pathlib
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import example
from experiments.report import read_table
from models.create import create_model
from runtime.plots import GAP, SMALLEST_CELL
from tests.datasets.image_files import random_images, write_cifar
from tests.processes import ROOT, run_script, without_curves
from tests.test_image_sampling import write_run
from tests.test_reproduce import ROWS, parse

SETUP = ("make demo", "make test")
NETWORK = ("--config.model.nf 8 --config.model.num_res_blocks 1 --config.model.ch_mult '(1, 2)' "
           "--config.model.attn_resolutions 4 --config.data.image_size 8")
TINY = {
    "train.py": f"{NETWORK} --config.training.n_iters 16 --config.training.snapshot_freq 1 "
                "--config.training.snapshot_sampling 0 --config.training.batch_size 4",
    "evaluation_fid.py": "--config.eval.num_samples 40 --config.eval.batch_size 40 --config.eval.begin_ckpt 16 "
                         "--config.sampling.ode_tol 0.3 --config.eval.feature_extractor pixels",
    "image_sampling.py": "--config.eval.batch_size 2 --config.eval.begin_ckpt 16 --config.sampling.ode_tol 0.3",
    "generate_data.py": "--config.sampling.total_number_of_samples 8 --config.training.batch_size 4 "
                        "--config.sampling.ode_tol 0.3",
    "experiments.run": "--dry_run",
    "experiments.report": "--table experiments/results.csv --plots plots",
}
LPIPS = "--config.training.n_iters 1 --config.training.batch_size 1"  # VGG16 at 64×64 takes a second an image


def commands(page="README.md"):
    """Return the commands of a page's bash blocks (and of the README's studies) as lists of arguments.

    Continuation lines are joined, comments removed, and variables replaced by what an earlier line sets them to.
    """
    text, variables, found = (ROOT / page).read_text(), {}, []
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks += [f"{command}\n" for command in re.findall(r"`(python -m experiments[^`]*)`", text) if page == "README.md"]
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        if assigned := re.fullmatch(r'(\w+)=("?)(.*)\2', line):
            variables[assigned[1]] = assigned[3]
            continue
        command = shlex.split(line, comments=True)
        if command and " ".join(command[:2]) not in SETUP:
            found.append(command)
    return found


def script_of(command):
    """Return the script ("train.py") or module ("tools.look") of a command."""
    return command[2] if command[1] == "-m" else command[1].removeprefix("./")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder like a fresh clone, with a CIFAR-10 of a few images, in which the commands run one after the other."""
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.name not in ("logs", "data", "reflow_data") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    write_cifar(folder / "data" / "CIFAR10" / "cifar-10-batches-py", random_images(50, 3, 32), np.arange(50) % 10)
    return folder


def test_readme_names_the_seeds_commands():
    scripts = [script_of(command) for command in commands() if command[0] == "python"]
    assert set(TINY) <= set(scripts) and scripts.count("train.py") == 4


def run_commands(page, workplace, tiny, environment=None):
    """Run the commands of a page in its order, each with the arguments of `tiny` for its script or module."""
    for command in commands(page):
        assert command[0] == "python", f"{page} has a command that this test does not know: {command}"
        script = script_of(command)
        if script == "tools.export":  # see tests/tools/test_export.py
            continue
        more = shlex.split(tiny.get(script, ""))
        if "lpips" in command:
            more += shlex.split(LPIPS)
        status, printed = run_script(workplace, script, *command[3 if command[1] == "-m" else 2:], *more, cwd=workplace,
                                     environment=environment, prepare=without_curves)
        assert status == 0, f"{' '.join(command)}\n{printed}"


def test_every_command_of_the_readme_runs(workplace, torch_home):
    run_commands("README.md", workplace, TINY, {"TORCH_HOME": str(torch_home)})
    run = workplace / "logs" / "2_rectified_flow_500000bigflow_28m_distill_lpips_use_teacher"
    assert (run / "checkpoints-meta" / "checkpoint.pth").exists()
    assert (workplace / "reflow_data" / "1_rectified_flow_50000" / "0" / "z1.npy").exists()


def test_every_path_that_the_readme_links_exists():
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", (ROOT / "README.md").read_text())
    missing = [link for link in links if not (ROOT / link).exists()]
    assert links and not missing
    assert not [p for p in pathlib.Path(ROOT / "docs").glob("*.md") if not p.read_text().startswith("# ")]


def test_the_networks_of_the_table_have_the_sizes_that_it_says():
    rows = [line.strip("|").split("|") for line in (ROOT / "README.md").read_text().splitlines()
            if line.startswith("| CIFAR32 ")]
    assert len(rows) == 4
    for name, options, parameters, gmacs, _ in rows:
        command = ["train.py", "--config", "configs/rectified_flow/cifar10_rf_gaussian.py"]
        for option in re.findall("`([^`]+)`", options):
            command += shlex.split(f"--config.model.{option}")
        with torch.device("meta"):
            found = sum(p.numel() for p in create_model(parse(command)[1]).parameters())
        assert f"{found:,}" == parameters.strip() and (found, float(gmacs)) in ROWS.values(), name


def python_blocks():
    """Return the README's Python blocks: the body of example.py, and a cell of a notebook."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_shows_what_example_py_does():
    assert python_blocks()[0] == inspect.getsource(example.main)


def test_the_notebook_cell_of_the_readme_ends_with_a_grid(tmp_path, monkeypatch):
    write_run(tmp_path)
    cell = python_blocks()[1].replace("logs/demo/distilled", str(tmp_path))
    assert cell.count("\n") == 6
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(cell, names)
    assert names["nfe"] == 1 and names["images"].numpy().shape == (16, 1, 8, 8)
    assert Image.open(tmp_path / "samples.png").size == (4 * (SMALLEST_CELL + GAP) + GAP,) * 2


def test_figures_of_the_results_are_recorded():
    text, rows = (ROOT / "README.md").read_text(), read_table(ROOT / "experiments" / "results.csv")
    teacher, student = ([rows[f"cifar_small/seed0/{run}/{sampler}"] for sampler in ("euler-1", "rk45-0.001")]
                        for run in ("1_flow", "2_flow"))
    assert all(f"{row['feature_distance']:.2f}" in text for row in teacher + student)
    assert f"{100 * student[0]['parameters'] / teacher[0]['parameters']:.0f} %" in text
    step, loading = ((ROOT / "benchmarks" / f"{name}.txt").read_text() for name in ("train_step", "loading"))
    assert " to ".join(sorted(re.findall(r"ours is (\S+) times as fast in wall", step))) in text
    ours, peer = (float(re.search(f"images: {name} +(\\S+)", loading)[1]) for name in ("ours", "torchvision"))
    assert f"{peer / ours:.0f} times" in text
    released, own = (int(number.replace(",", "")) for number in re.findall(r"(\S+) operations", step)[:2])
    assert round(4 * own / released) == 1 and "a quarter of the operations" in text
    ranges = re.findall(r"\| ([\d.]+) to ([\d.]+) \|$", (ROOT / "benchmarks" / "README.md").read_text(), re.MULTILINE)
    work = [float(end) for ends in ranges for end in ends]
    assert f"{min(work):g} to {max(work):.1f}" in text
    distilled, flow = re.search(r"naive distillation improves on the 2-flow \| (\S+) ± \S+, (\S+) ±",
                                (ROOT / "docs/miniature.md").read_text()).groups()
    assert f"from {flow} to {distilled}" in text
