"""Steps of a study: their digests, commands and order."""

import dataclasses

import pytest

from experiments.run import Root, missing_steps
from experiments.steps import DIGITS, PAIRS, TRAIN, config_changes, train
from experiments.studies import (
    ABLATION_SEEDS,
    MAIN_SEEDS,
    RECIPE_SEEDS,
    RECIPES,
    STUDIES,
    all_steps,
    main_line,
)
from runtime.files import write_json


@pytest.fixture
def line():
    return main_line(DIGITS, 0, large=False)


def rows_of(steps):
    return {step.name: {"digest": step.digest} for step in steps}


def test_names_are_unique_and_commands_name_only_what_is_needed():
    steps = all_steps()
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        command = " ".join(step.command("ROOT"))
        assert "{" not in command and f"--config.seed {step.seed}" in command
        for _, need in step.needs:
            assert f"ROOT/{need.place}" in command
            assert need in steps and need.kind in (TRAIN, PAIRS)


def test_a_change_upstream_changes_the_digest_of_all_that_comes_after(line):
    changed = dataclasses.replace(line.flow, words=(*line.flow.words, "--config.optim.lr", "1"))
    remade = dataclasses.replace(line.pairs, needs=(("flow", changed),))
    student = dataclasses.replace(line.annealed, needs=(("pairs", remade),))
    assert len({step.digest for step in (line.annealed, student)}) == 2
    assert line.pairs.place != remade.place and line.annealed.command("r") != student.command("r")


def test_seeds_share_no_step():
    digests = [{step.digest for step in main_line(DIGITS, seed, large=True).steps} for seed in (0, 1)]
    assert digests[0] and not digests[0] & digests[1]


def test_a_finished_row_is_not_run_again(line, tmp_path):
    assert missing_steps(line.steps, rows_of(line.steps), Root(tmp_path)) == []


def test_a_missing_row_brings_back_the_steps_it_needs_and_no_others(line, tmp_path):
    evaluation = next(step for step in line.steps if step.name.endswith("distilled_naive/euler-1"))
    rows = rows_of(step for step in line.steps if step != evaluation)
    distilled = dict(evaluation.needs)["flow"]
    expected = [line.flow, line.pairs, line.annealed, distilled, evaluation]
    found = missing_steps(line.steps, rows, Root(tmp_path))
    assert found == sorted(expected, key=found.index) and set(found) == set(expected)
    write_json(Root(tmp_path).marker(distilled), {"seconds": 1.0})
    assert missing_steps(line.steps, rows, Root(tmp_path)) == [evaluation]


def test_a_row_of_another_digest_is_run_again(line, tmp_path):
    rows = rows_of(line.steps) | {line.annealed.name: {"digest": "0" * 12}}
    root = Root(tmp_path)
    for step in (line.flow, line.pairs):
        write_json(root.marker(step), {"seconds": 1.0})
    assert missing_steps(line.steps, rows, root) == [line.annealed]


def test_a_step_asked_for_again_is_run_though_its_row_is_there(line, tmp_path):
    root = Root(tmp_path)
    write_json(root.marker(line.flow), {"seconds": 1.0})
    assert missing_steps(line.steps, rows_of(line.steps), root, {line.pairs.name}) == [line.pairs]


def test_every_study_is_listed_with_the_steps_it_needs():
    for name in STUDIES:
        steps = all_steps([name])
        assert all(need in steps for step in steps for _, need in step.needs)


def test_a_change_of_the_named_config_changes_the_digest(tmp_path):
    config = tmp_path / "config.py"
    digests = set()
    for rate in ("1e-3", "2e-3", "2e-3  # the same"):
        config.write_text("from configs.rectified_flow.digits_rf_gaussian import get_config as digits\n\n\n"
                          f"def get_config():\n    config = digits()\n    config.optim.lr = {rate}\n"
                          "    return config\n")
        config_changes.cache_clear()
        digests.add(train("flow", DIGITS, 0, 10, width=8, config=str(config)).digest)
    assert len(digests) == 2


def test_both_recipes_have_equal_updates_and_the_released_ones_fewer_dearer_pairs():
    recommended, released = (
        [step.words for step in all_steps(["recipes"]) if f"/recipe_{name}/" in step.name and step.kind == TRAIN]
        for name in RECIPES)
    updates = [[words[words.index("--config.training.n_iters") + 1] for words in side]
               for side in (recommended, released)]
    assert updates[0] == updates[1] and len(updates[0]) == 3 * len(RECIPE_SEEDS)
    fields = [config_changes(f"configs/rectified_flow/digits_{name}.py") for name in RECIPES]
    assert fields[0]["sampling.total_number_of_samples"] > fields[1]["sampling.total_number_of_samples"]
    assert "sampling.ode_tol" not in fields[1] and "model.dropout" not in fields[1]  # the defaults
    assert not set(RECIPE_SEEDS) & {*MAIN_SEEDS, *ABLATION_SEEDS}
