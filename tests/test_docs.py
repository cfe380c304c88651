"""The Python blocks of docs/ run as the pages print them, and figures of the studies are those of the results table."""

import json
import re
import statistics
import subprocess

import pytest
from PIL import Image

from experiments.images import Reference
from experiments.report import by_seed, read_table
from experiments.studies import DIGITS
from tests.datasets.image_files import random_images
from tests.models.released_numbers import LAYOUTS
from tests.processes import ROOT, run_script
from tests.test_readme import TINY, run_commands

RUNS = {  # of docs/miniature.md: steps of the table
    "1-flow": "1_flow", "small 2-flow, annealed": "2_flow_annealed",
    "small 2-flow, not annealed": "2_flow_from_scratch",
    "2-flow of the 1-flow's width, not annealed": "2_flow_wide_from_scratch",
    "2-flow of the 1-flow's width, annealed": "2_flow_wide_annealed",
    "2-flow of the 1-flow's width, from the 1-flow": "2_flow_wide_from_1_flow", "distilled, naive": "distilled_naive",
    "distilled, guided, student's first step": "distilled_guided_student",
    "distilled, guided, teacher's first step": "distilled_guided_teacher",
}
COLUMNS = ("nfe", "feature_distance", "pixel_distance", "nearest")  # of the page's main lines
SMALL = "2_flow_annealed"
CLAIMS = [  # the steps of each finding of docs/miniature.md, in its order
    (f"{SMALL}/straightness", "1_flow/straightness"), (SMALL, "1_flow"), (SMALL, "2_flow_from_scratch"),
    ("2_flow_wide_annealed", "2_flow_wide_from_scratch"), ("2_flow_wide_from_1_flow", "2_flow_wide_annealed"),
    ("distilled_naive", SMALL), ("distilled_guided_student", "distilled_naive"),
    ("distilled_guided_teacher", "distilled_naive"), ("distilled_guided_student", "distilled_guided_teacher"),
    ("distilled_guided_student", "1_flow/rk45"), ("ablation/annealing_1000", SMALL), ("ablation/shape_cos", SMALL),
    ("ablation/count_500", SMALL), ("ablation/solver_rk45_0.001", SMALL), ("ablation/solver_heun_8", SMALL),
    ("ablation/time_u_shaped", SMALL), ("ablation/loss_huber", SMALL), ("ablation/huber_u_shaped", SMALL),
]
GUIDED = "distilled_guided_student"
ABLATIONS = {  # of the page: the step of each line
    "none": "2_flow_from_scratch", "250, linear": SMALL, "500, linear": "ablation/annealing_500",
    "1,000, linear": "ablation/annealing_1000", "250, cosine": "ablation/shape_cos",
    "250, exponential": "ablation/shape_exp", "500": "ablation/count_500", "1,000": "ablation/count_1000",
    "2,000": "ablation/count_2000", "4,000": SMALL, "8,000": "ablation/count_8000", "uniform, squared error": SMALL,
    "U-shaped": "ablation/time_u_shaped", "pseudo-Huber": "ablation/loss_huber",
    "pseudo-Huber, cosine": "ablation/huber_cos", "pseudo-Huber, U-shaped": "ablation/huber_u_shaped",
    "all three": "ablation/huber_u_shaped_cos", "of the main line's 2-flow, squared error": GUIDED,
    "of the 2-flow with pseudo-Huber and U-shaped times, squared error": "ablation/distilled_l2",
    "the same, pseudo-Huber": "ablation/distilled_huber", "heun, 2": "ablation/solver_heun_2",
    "euler, 4": "ablation/solver_euler_4", "heun, 4": "ablation/solver_heun_4", "euler, 8": "ablation/solver_euler_8",
    "heun, 8": "ablation/solver_heun_8", "euler, 16": "ablation/solver_euler_16", "rk45, 0.01": SMALL,
    "rk45, 0.001": "ablation/solver_rk45_0.001", "rk45, 0.0001": "ablation/solver_rk45_0.0001",
    "8": "ablation/width_8", "12": SMALL, "16": "ablation/width_16", "24": "2_flow_wide_annealed",
}


def blocks(page):
    """Return the Python blocks of a page, in their order."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_the_chain_of_the_page_on_own_images_runs(tmp_path):
    (tmp_path / "my_images.py").write_text(blocks("own-images.md")[0])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for part in ("train", "held_out"):
        (tmp_path / "data/images" / part).mkdir(parents=True)
        for number, image in enumerate(random_images(40, 3, 40, seed=len(part))):
            Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "data/images" / part / f"{number}.png")
    run_commands("docs/own-images.md", tmp_path, TINY | {
        "tools.look": "--config.training.batch_size 4",
        "train.py": TINY["train.py"].replace("n_iters 16", "n_iters 10") + " --config.training.loss_type huber",
        "evaluation_fid.py": TINY["evaluation_fid.py"].replace("begin_ckpt 16", "begin_ckpt 1")})
    assert (tmp_path / "logs/my_one_step/eval/results.jsonl").exists()


def test_a_config_file_imports_another_beside_it_as_the_page_shows(tmp_path):
    for name, code in zip(("my_images", "my_large_images"), blocks("own-images.md"), strict=True):
        (tmp_path / f"{name}.py").write_text(code)
    status, printed = run_script(tmp_path, "train.py", "--config", tmp_path / "my_large_images.py", "--print_config")
    data = json.loads(printed)["data"]
    assert status == 0 and data["data_root"] == "data/images/train" and data["image_size"] == 64


def test_hours_of_training_on_own_images_follow_from_their_basis():
    found = sections("own-images.md")["4. How long"][1:]
    assert [cells[0] for cells in found] == ["A100", "H100 SXM", "RTX 4090"]
    gmacs = [LAYOUTS[name]["gmacs"] for name in ("cifar10_1flow_61.8M", "cifar32_15.7M", "cifar32_7.0M")]
    operations = [6 * 128 * macs for macs in gmacs] + [2 * 40 * gmacs[0]]  # 10⁹ of an update, of a pair
    for gpu, peak, share, *hours in found:
        speed = 1000 * float(peak) * float(share.removesuffix(" %")) / 100  # 10⁹ operations per second
        assert hours == [f"{100_000 * count / speed / 3600:.1f}" for count in operations], gpu


def test_the_recommended_chain_of_the_miniature_runs(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    run_commands("docs/miniature.md", tmp_path, TINY | {
        "train.py": TINY["train.py"].replace("n_iters 16", "n_iters 2")})
    assert (tmp_path / "logs/digits_one_step/checkpoints/checkpoint_2.pth").exists()


def test_the_hand_made_pairs_of_the_page_are_a_folder_that_check_pairs_accepts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks("pairs.md")[0].replace("50000", "600")
    exec(code, {"my_sampler": lambda z: (z * 0.3).clip(-1, 1)})  # a flow: its images are correlated with the noise
    status, printed = run_script(tmp_path, "tools.check_pairs", "reflow_data/other", cwd=tmp_path)
    assert status == 0, printed


@pytest.fixture(scope="module")
def rows():
    return read_table(ROOT / "experiments" / "results.csv")


def sections(page):
    """Return {title: rows of its tables, lists of cells} of a page's sections."""
    parts = (ROOT / "docs" / page).read_text().split("\n## ")
    return {part.splitlines()[0]: [[cell.strip() for cell in line.strip("|").split("|")]
                                   for line in part.splitlines() if re.match(r"\|(?!---)", line)] for part in parts}


def same(printed, values):
    """Whether `0.41 ± 0.03`, or one number, is the mean and deviation of the values to the digits printed."""
    values = list(values)
    numbers = [statistics.mean(values), *([statistics.stdev(values)] if len(values) > 1 else [])]
    texts = printed.replace(",", "").split(" ± ")
    return len(texts) == len(numbers) and all(
        abs(float(text) - number) <= 0.5001 * 10.0 ** -len(text.partition(".")[2])
        for text, number in zip(texts, numbers, strict=True))


def digits(rows, step, figure="feature_distance"):
    """Return {seed: figure} of a step of digits, in one step unless its name says otherwise."""
    name = step if step.endswith(("straightness", "rk45")) or "pairs" in step else f"{step}/euler-1"
    return by_seed(rows, f"digits/seed{{seed}}/{name}", figure)


@pytest.mark.parametrize(("images", "count"), [("digits", 25), ("Fashion-MNIST", 19)])
def test_the_main_lines_of_the_miniature_are_those_of_the_table(rows, images, count):
    found = [cells for cells in sections("miniature.md")[f"Main line, {images}"] if cells[0] in RUNS]
    assert len(found) == count
    for cells in found:
        step = f"{images.partition('-')[0].lower()}/seed{{seed}}/{RUNS[cells[0]]}"
        if len(cells) == 2:
            assert same(cells[1], by_seed(rows, f"{step}/straightness", "straightness").values()), cells
            continue
        nfe, *values = (by_seed(rows, f"{step}/{cells[1]}", column) for column in COLUMNS)
        assert same(cells[2], [statistics.mean(nfe.values())]) and len(nfe) == int(cells[6]), cells
        assert all(same(cell, value.values()) for cell, value in zip(cells[3:6], values, strict=True)), cells


def test_the_findings_of_the_miniature_follow_from_the_table_by_the_rule_that_the_page_states(rows):
    found = next(table for title, table in sections("miniature.md").items() if title.startswith("Findings"))[1:]
    again = read_table(ROOT / "experiments" / "results_avx2.csv")
    spread = max(abs(row["feature_distance"] - rows[name]["feature_distance"]) for name, row in again.items()
                 if name.endswith("/euler-1"))
    assert f"it exceeds {spread:.3f}," in (ROOT / "docs" / "miniature.md").read_text()
    for (claim, figures, difference, verdict), pair in zip(found, CLAIMS, strict=True):
        a, b = (digits(rows, step, "straightness" if "straightness" in step else "feature_distance") for step in pair)
        assert a.keys() == b.keys() and all(map(same, figures.split(", "), (a.values(), b.values()))), claim
        differences = [(b[seed] - a[seed]) * (-1 if re.search("worse|behind", claim) else 1) for seed in a]
        mean = statistics.mean(differences)
        clear = abs(mean) > max(spread, statistics.stdev(differences)) and len({d > 0 for d in differences}) == 1
        right = "no effect seen" if not clear else "holds" if mean > 0 else "does not hold"
        assert same(difference, differences) and verdict.startswith(right), claim


def test_the_ablations_of_the_miniature_are_those_of_the_table(rows):
    found = [cells for cells in sections("miniature.md")["Ablations, digits"] if cells[0] in ABLATIONS]
    assert [cells[0] for cells in found] == list(ABLATIONS)
    for label, *_, figure, main, seeds in found:
        values = digits(rows, ABLATIONS[label])
        base = digits(rows, GUIDED if "distilled" in ABLATIONS[label] else SMALL)
        assert same(figure, values.values()) and same(main, [base[seed] for seed in values]), label
        assert len(values) == int(seeds)


def test_the_recipes_of_the_miniature_are_those_of_the_table(rows):
    found = [cells for cells in sections("miniature.md")["A recommended recipe"][1:] if len(cells) == 6]
    steps = {"1-flow, rk45 at 1e-3": "1_flow/rk45-0.001", "small 2-flow, one step": "2_flow/euler-1",
             "distilled, one step": "distilled/euler-1"}
    assert len(found) == 6
    for recipe, run, pairs, feature, pixel, seeds in found:
        folder = f"digits/seed{{seed}}/recipe_{recipe}"
        values = [by_seed(rows, f"{folder}/{steps[run]}", column) for column in COLUMNS[1:3]]
        assert same(feature, values[0].values()) and same(pixel, values[1].values()) and len(values[0]) == int(seeds)
        assert same(pairs.split(" × ")[1], [statistics.mean(by_seed(rows, f"{folder}/pairs", "nfe").values())])


def test_the_minutes_of_the_miniature_are_sums_of_the_table(rows):
    text = " ".join((ROOT / "docs" / "miniature.md").read_text().split())
    parts = [("digits/|fashion/", "train"), ("digits/|fashion/", "evaluate"), ("digits/|fashion/", "pairs"),
             ("digits/|fashion/", "look"), ("digits/seed./(?!ablation|recipe)", ""), ("digits/seed./ablation", ""),
             ("digits/seed./recipe", "")]
    minutes = [sum(row["seconds"] or 0 for name, row in rows.items()
                   if re.match(names, name) and row["kind"].startswith(kind)) / 60 for names, kind in parts]
    printed = re.search(r"training (\d+) minutes, evaluation (\d+), pairs (\d+), straightness (\d+)\. .* main line took"
                        r" (\d+), its ablations (\d+) and its recipes (\d+)\.", text)
    assert [int(number) for number in printed.groups()] == [round(number) for number in minutes]


def test_real_digits_are_as_far_apart_as_the_miniature_says(tmp_path):
    real = Reference(DIGITS, tmp_path, "").real()
    cells = next(cells for cells in sections("miniature.md")["Main line, digits"] if cells[0] == "real against real")
    assert all(same(cell, [real[column]]) for cell, column in zip(cells[3:6], COLUMNS[1:], strict=True))


def test_the_planned_minutes_of_the_cifar_page_follow_from_its_first_column():
    head, *stages, total = sections("cifar.md")["Running it"][-9:]
    assert "planned, not run" in head[1] and all("estimate" in cell for cell in head[2:])
    columns = {1: [float(cells[1]) for cells in stages]}
    for place, gpus in enumerate((2, 4, 8), start=2):
        faster = [1 if "classifier" in name else gpus if re.match("pairs|evaluation", name) else 0.9 * gpus
                  for name, *_ in stages]
        columns[gpus] = [planned / f for planned, f in zip(columns[1], faster, strict=True)]
        assert all(same(cells[place], [minutes]) for cells, minutes in zip(stages, columns[gpus], strict=True))
    assert all(same(cell, [sum(minutes)]) for cell, minutes in zip(total[1:], columns.values(), strict=True))


@pytest.mark.skipif(not (ROOT / ".git").exists() or (ROOT / ".git/shallow").exists(), reason="needs the history")
def test_the_page_on_benchmarks_names_the_commit_of_each_record():
    page = " ".join((ROOT / "benchmarks" / "README.md").read_text().split())
    commits = dict(re.findall(r"`(\w+\.txt)`, commit (\w{7})", page))
    records = {path.name: path.read_text() for path in (ROOT / "benchmarks").glob("*.txt")}
    del records["requirements.txt"]
    assert commits.keys() == records.keys()
    for name, commit in commits.items():
        shown = subprocess.run(["git", "show", f"{commit}:benchmarks/{name}"], cwd=ROOT, capture_output=True, text=True)
        if shown.returncode == 0:  # otherwise this clone has another history
            assert shown.stdout == records[name], name


def test_the_figures_of_the_cifar_page_are_those_of_the_table(rows):
    table = next(table for title, table in sections("cifar.md").items() if title.startswith("The small size"))[1:]
    steps = ["cifar_16/real", *(f"cifar_small/seed0/{step}" for step in (
        "1_flow/rk45-0.001", "1_flow/euler-1", "2_flow/rk45-0.001", "2_flow/euler-1", "distilled/euler-1"))]
    for cells, step in zip(table, steps, strict=True):
        row = rows[step]
        values = [row[name] for name in ("nfe", "feature_distance", "precision", "recall", "recognised", "nearest")]
        for cell, value in zip(cells[1:], values, strict=True):
            assert cell == "" and value is None or same(re.sub(r"[^\d.]", "", cell), [value]), (step, cell, value)
