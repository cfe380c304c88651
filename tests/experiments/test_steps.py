"""Steps of a study: their digests, commands and order."""

import dataclasses

import pytest

from experiments.run import Root, missing_steps
from experiments.steps import DIGITS, PAIRS, TRAIN
from experiments.studies import STUDIES, all_steps, main_line
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
