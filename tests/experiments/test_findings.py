"""Verdicts on claims: only where all seeds agree and the difference exceeds its spread."""

import pytest

from experiments.findings import (
    ABLATION_CLAIMS,
    FAILS,
    HOLDS,
    MAIN_CLAIMS,
    MISSING,
    RECIPE_CLAIMS,
    TOO_FEW,
    UNSURE,
    Claim,
    earlier_run_sentence,
    judge,
    of_common_seeds,
    second_set_sentence,
    summary,
)
from experiments.studies import MAIN_SEEDS, RECIPE_SEEDS, all_steps

CLAIM = Claim("A is better", "s{seed}/a", "s{seed}/b")


def rows(better, worse):
    found = {}
    for name, values in (("a", better), ("b", worse)):
        for seed, value in enumerate(values):
            found[f"s{seed}/{name}"] = {"seed": str(seed), "feature_distance": value}
    return found


@pytest.mark.parametrize(("better", "worse", "word"), [
    ([1.0, 1.1, 1.2], [2.0, 2.2, 2.1], HOLDS),
    ([2.0, 2.2, 2.1], [1.0, 1.1, 1.2], FAILS),
    ([1.0, 1.0, 1.0], [1.1, 0.9, 1.2], UNSURE),  # seeds disagree
    ([1.0, 1.0, 1.0], [1.01, 1.5, 1.01], UNSURE),  # all agree, but by less than the spread
    ([1.0, 1.1], [2.0, 2.2], TOO_FEW),
    ([], [1.0], MISSING),
    ([1.0, 1.1, 1.2], [2.0, 2.2], TOO_FEW),  # only seeds that both have count
])
def test_a_claim_is_told_only_beyond_the_spread(better, worse, word):
    assert judge(CLAIM, rows(better, worse)).word == word


def test_a_finding_says_its_figures_and_seeds():
    text = judge(CLAIM, rows([1.0, 1.1, 1.2], [2.0, 2.2, 2.4])).sentence()
    assert text.startswith("A is better: **holds** (1.1 ± 0.1 against 2.2 ± 0.2, difference 1.1 ± 0.1; 3 seeds)")
    assert summary([0.5]) == "0.5"


def test_a_table_is_over_the_seeds_that_all_its_lines_have():
    found = rows([1.0, 2.0, 3.0], [5.0, 6.0])
    found = {name: row | {"digest": "d"} for name, row in found.items()}
    common = of_common_seeds(found, ["s{seed}/a", "s{seed}/b", "s{seed}/not_run"])
    assert set(common) == {"s0/a", "s1/a", "s0/b", "s1/b"}
    assert of_common_seeds(found, ["s{seed}/not_run"]) == {}


def test_a_second_set_of_images_is_held_against_the_digits():
    def entry(run, name, figure, value):
        return {f"{name}/seed0/{run}": {"seed": "0", "straightness": None, "feature_distance": None} | {figure: value}}

    found = {}
    for name, distance in (("digits", 0.5), ("other", 0.9)):
        found |= entry("1_flow/straightness", name, "straightness", 2.0)
        found |= entry("2_flow_annealed/straightness", name, "straightness", 1.0)
        found |= entry("1_flow/euler-1", name, "feature_distance", 0.8)
        found |= entry("2_flow_annealed/euler-1", name, "feature_distance", distance)
    text = second_set_sentence(found, "Other", "other")
    assert "in 1 of the 2 claims" in text and f"not in: {MAIN_CLAIMS[1].sentence}." in text
    assert second_set_sentence(found, "Third", "third") is None


def test_an_earlier_run_is_confirmed_only_where_all_seeds_say_so():
    values = {"2_flow_annealed": (0.4, 0.5, 0.6), "2_flow_from_nothing": (0.3, 0.3, 0.4),
              "distilled_naive": (0.3, 0.3, 0.3), "distilled_guided_student": (0.2, 0.3, 0.4)}
    found = {f"digits/seed{seed}/{run}/euler-1": {"seed": str(seed), "feature_distance": value}
             for run, seeds in values.items() for seed, value in enumerate(seeds)}
    text = earlier_run_sentence(found)
    assert "0.354): confirmed, the same sign in 3 of 3 seeds" in text
    assert "0.267): neither confirmed nor refuted, the same sign in 1 of 3 seeds" in text


@pytest.mark.parametrize("claim", [*MAIN_CLAIMS, *ABLATION_CLAIMS, *RECIPE_CLAIMS],
                         ids=lambda claim: claim.sentence[:40])
def test_every_claim_speaks_of_steps_that_exist(claim):
    names = {step.name for step in all_steps()}
    seed = RECIPE_SEEDS[0] if claim in RECIPE_CLAIMS else MAIN_SEEDS[0]
    assert {claim.better.format(seed=seed), claim.worse.format(seed=seed)} <= names
