"""The demo's verdict: every threshold counts, and the student's size."""

import pytest

from tools.demo import LARGEST_STUDENT, THRESHOLDS
from tools.demo_report import markdown, verdict


def rows(**distances):
    """Return report rows with good figures but for those given."""
    good = {"1-flow rk45": 0.2, "2-flow one_step": 0.35, "distilled one_step": 0.3} | distances
    return [{"stage": name.split()[0], "sampler": name.split()[1], "frechet_distance": value, "nfe": 1.0,
             "seconds": 1.0, "parameters": 1000 if name.startswith("1-flow") else 252, "samples": 2000,
             "nearest_training_image": 2.5, "nearest_among_real": 2.0} for name, value in good.items()]


def test_good_figures_meet_every_threshold():
    assert all(holds for _, holds in verdict(rows(), THRESHOLDS, LARGEST_STUDENT))


@pytest.mark.parametrize("name, value", [
    ("1-flow rk45", 0.251), ("2-flow one_step", 0.43), ("distilled one_step", 0.32)])
def test_each_missed_threshold_is_told(name, value):
    checks = verdict(rows(**{name: value}), THRESHOLDS, LARGEST_STUDENT)
    missed = [sentence for sentence, holds in checks if not holds]
    assert len(missed) == 1 and missed[0].startswith(name)
    seconds = {"1-flow": 1, "pairs": 1, "2-flow": 1, "distilled": 1}
    assert f"- MISSED: {name}" in markdown(rows(**{name: value}), seconds, checks, 4)


def test_too_large_student_is_told():
    found = rows()
    found[2]["parameters"] = 270
    assert [holds for _, holds in verdict(found, THRESHOLDS, LARGEST_STUDENT)] == [True, True, True, False]
