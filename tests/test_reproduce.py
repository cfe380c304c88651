"""The commands of docs/reproduce.md name scripts, configs, fields and values that exist, and runs that came before."""

import re
import shlex

import pytest

from configs.command_line import load_config, parse_value, set_field
from configs.default import find_field
from configs.validation import check_fields, check_network


def commands(repository):
    """Return the documented commands as lists of words, in their order."""
    text = (repository / "docs" / "reproduce.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return [shlex.split(line) for line in lines]


def parse(repository, words):
    """Return (script, config, other flags) of a command; fails on what does not exist."""
    script = next(word for word in words if word.endswith(".py"))
    assert (repository / script).is_file()
    pairs = list(zip(words, words[1:], strict=False))
    config = load_config(repository / next(value for word, value in pairs if word == "--config"))
    for word, value in pairs:
        if word.startswith("--config."):
            name, _, text = word.removeprefix("--config.").partition("=")
            assert find_field(name) is not None, name
            set_field(config, name, parse_value(name, text or value))
    check_fields(config)
    check_network(config)
    return script, config, dict(pair for pair in pairs if pair[0].startswith("--") and "config" not in pair[0])


def test_every_command_parses_and_uses_what_an_earlier_one_makes(repository):
    made = set()
    found = commands(repository)
    assert len(found) >= 15
    for words in found:
        script, config, other = parse(repository, words)
        if script == "train.py":
            needed = [config.flow.pre_train_model, config.data.reflow_data_root]
        else:
            needed = [other.get("--ckpt_dir", ""), other.get("--ckpt_path", "")]
        for path in filter(None, needed):
            assert any(path.startswith(folder) for folder in made), f"{path} is made by no earlier command"
        made.add(other["--data_root"] if script == "generate_data.py" else f"logs/{config.expr}")


@pytest.mark.parametrize(("section", "parameters"), [
    ("CIFAR-10 27.9M", 27_906_179), ("FFHQ 64×64 27.9M", 27_906_179), ("ImageNet 64×64 80.7M", 80_685_315)])
def test_the_small_network_of_each_section_has_the_parameters_of_its_row(repository, section, parameters):
    import torch

    from models import create_model

    data_set = section.split()[0].replace("-", "").lower()
    found = [config for _, config, _ in (parse(repository, words) for words in commands(repository))]
    distilled = [c for c in found if "distilled" in c.expr and c.data.dataset.lower().startswith(data_set)]
    assert len(distilled) == 1
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(distilled[0]).parameters()) == parameters
    text = (repository / "docs" / "reproduce.md").read_text()
    assert re.search(rf"\[{re.escape(section)}\].*\| {parameters:,} \|", text)
