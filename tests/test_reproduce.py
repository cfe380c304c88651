"""docs/reproduce.md: every row of the paper's table has commands, from raw data to its number, that exist and follow
one from another, with the network of the row.
"""

import importlib
import pathlib
import re
import shlex

import pytest
import torch

from configs.command_line import parse_command_line
from models.create import create_from_fields, create_model
from tests.models.released_numbers import LAYOUTS, layout_fields

ROOT = pathlib.Path(__file__).parent.parent
TITLES = {"cifar32": "CIFAR-10", "ffhq64": "FFHQ 64×64", "imagenet64": "ImageNet 64×64"}
NETWORKS = {"CIFAR-10 1-flow" if "1flow" in name else f"{TITLES[name.split('_')[0]]} {name.split('_')[1]}": name
            for name in LAYOUTS}
ROWS = {row: (LAYOUTS[name]["parameters"], round(LAYOUTS[name]["gmacs"], 2)) for row, name in NETWORKS.items()}


def read_sections():
    """Return {title: (variables of each row {NAME: NETWORK}, command lines in their order)} of the data sets."""
    sections = {}
    for part in (ROOT / "docs" / "reproduce.md").read_text().split("\n## ")[1:]:
        blocks = "".join(re.findall(r"```bash\n(.*?)```", part, re.DOTALL)).replace("\\\n", " ")
        choices = re.findall(r'^NAME=(\S+) NETWORK="(.*)"$', blocks, re.MULTILINE)
        lines = [line for line in blocks.splitlines() if line.strip() and not line.startswith("NAME=")]
        if lines:
            sections[part.splitlines()[0]] = (dict(choices), lines)
    return sections


SECTIONS = read_sections()


def commands(row):
    """Return the commands of a row, lists of arguments, with its variables as bash would put them in."""
    section, _, name = row.rpartition(" ")
    choices, lines = SECTIONS[section]
    if name == "1-flow":
        lines = [line for line in lines if "$NAME" not in line and "edm" not in line]
    else:
        lines = [line.replace("$NAME", name).replace("$NETWORK", choices[name]) for line in lines
                 if "1_rectified_flow" not in line]
    return [shlex.split(line) for line in lines]


def parse(command):
    """Return (script, config, other flags) of a command; fails on what does not exist."""
    place, script = next((place, word) for place, word in enumerate(command) if word.endswith(".py"))
    flags = getattr(importlib.import_module(script.removesuffix(".py")), "FLAGS", {})
    command = [str(ROOT / word) if word.startswith("configs/") else word for word in command]
    config, args, _ = parse_command_line(command[place:], script_flags=flags)
    return script, config, {f"--{name}": str(args[name].value) for name in flags if args[name].present}


def test_the_sections_have_exactly_the_rows_of_the_table():
    text = (ROOT / "docs" / "reproduce.md").read_text()
    rows = re.findall(r"^\| \[(.+?)\]\(#.+?\) \| (\S+) \| (\S+) \|", text, re.MULTILINE)
    assert {row: (int(n.replace(",", "")), float(gmacs)) for row, n, gmacs in rows} == ROWS
    chosen = [f"{section} {name}" for section, (choices, _) in SECTIONS.items() for name in choices]
    assert sorted([*chosen, "CIFAR-10 1-flow"]) == sorted(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_every_command_of_a_row_parses_and_uses_what_an_earlier_one_makes(row):
    made = []
    for command in commands(row):
        if command[0] == "curl":
            made.append(command[-1].rpartition("/")[2])
            continue
        if command[1] == "edm/dataset_tool.py":
            made.append(next(word for word in command if word.startswith("--dest=")).removeprefix("--dest="))
            continue
        script, config, other = parse(command)
        if config.data.dataset != "CIFAR10":  # which is downloaded
            assert any(path.startswith(f"data/{config.data.dataset}/") for path in made)
        needed = [other.get("--ckpt_dir", ""), other.get("--ckpt_path", ""), other.get("--target_path", "")]
        if script == "train.py":
            needed += [config.flow.pre_train_model, config.data.reflow_data_root]
        for path in filter(lambda path: path and not path.startswith("https://"), needed):
            assert any(path.startswith(earlier) for earlier in made), f"{path} is made by no earlier command"
        made.append(other["--data_root"] if script == "generate_data.py" else f"logs/{config.expr}")


@pytest.mark.parametrize("row", ROWS)
def test_the_figure_of_a_row_is_that_of_its_network_under_the_stated_protocol(row):
    found = [parse(command) for command in commands(row) if command[0] == "torchrun"]
    trained = {f"logs/{config.expr}": config for script, config, _ in found if script == "train.py"}
    config, other = [(config, other) for script, config, other in found if script == "evaluation_fid.py"][-1]
    sampling = config.sampling
    if row == "CIFAR-10 1-flow":
        assert (sampling.use_ode_sampler, sampling.ode_tol) == ("rk45", 1e-5)
    else:
        assert (sampling.use_ode_sampler, sampling.sample_N) == ("euler", 1)
        assert trained[other["--ckpt_dir"]].flow.use_teacher
    assert config.eval.num_samples == 50000
    with torch.device("meta"):
        used, right = create_model(trained[other["--ckpt_dir"]]), create_from_fields(layout_fields(NETWORKS[row]))
    assert used.config_fields == right.config_fields


def test_hours_and_operations_are_those_of_the_arithmetic_that_the_page_states():
    text = (ROOT / "docs" / "reproduce.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in
            text.partition("| stage | size | operations")[2].splitlines()[2:] if line.startswith("|")]
    gmacs = {name: [macs for row, (_, macs) in ROWS.items() if row.startswith(name) and "1-flow" not in row]
             for name in ("CIFAR-10", "FFHQ", "ImageNet")}
    teachers = [float(number) for number in re.findall(r"\d+\.\d", rows[0][0])]  # of EDM, 40 evaluations a pair
    expected = [[2e9 * 40 * count * macs for count, macs in zip((1e5, 2e5, 4e5), teachers, strict=True)]]
    for name in gmacs:
        expected += [[800001 * 128 * 6e9 * macs for macs in gmacs[name]],
                     [400001 * 128 * (14e9 * macs + 15e9) for macs in gmacs[name]]]
    expected.append([1300001 * 128 * 6e9 * ROWS["CIFAR-10 1-flow"][1]])
    for (stage, _, operations, hours), numbers in zip(rows, expected, strict=True):
        found = [[float(text) for text in cell.split(" / ")] for cell in (operations, hours)]
        assert found[0] == pytest.approx(numbers, rel=0.05), stage
        assert found[1] == pytest.approx([number / 5e13 / 3600 for number in numbers], rel=0.05), stage
