"""`python -m tools.check_pairs` must find what is wrong with stored pairs, wherever it is, and nothing else."""

import re
import types

import numpy as np
import pytest

from tools.check_pairs import main


def save(folder, count=2000, change=lambda z0, z1: (z0, z1), **more):
    """Pairs as a flow gives them: z1 is a smooth function of z0; `change` damages them."""
    folder.mkdir()
    z0 = np.random.default_rng(0).standard_normal((count, 1, 4, 4), dtype=np.float32)
    z1 = np.tanh(z0 + np.roll(z0, 1, -1) + np.roll(z0, 1, -2))
    for name, rows in zip(("z0", "z1"), change(z0, z1), strict=True):
        np.save(folder / f"{name}.npy", rows)
    for name, rows in more.items():
        np.save(folder / f"{name}.npy", rows)


def check(root, every=False):
    return main(types.SimpleNamespace(root=root, check=every))


def findings(root, capsys, every=False):
    """(exit status, the findings) of the program."""
    status = check(root, every)
    return status, [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrong: ")]


def test_right_pairs_are_described_and_pass(tmp_path, capsys):
    save(tmp_path / "0", label=np.arange(2000) % 7)
    assert check(tmp_path) == check(tmp_path, every=True) == 0
    quick, full = capsys.readouterr().out.splitlines()
    z0, z1 = (np.load(tmp_path / f"0/{name}.npy") for name in ("z0", "z1"))
    between = (z0 * z1).mean() / np.sqrt((z0**2).mean() * (z1**2).mean())
    assert "checked: pairs 256, " in quick and "with labels, no pairs.json; checked: pairs 2000, " in full
    assert f"z1 minimum {z1.min():.4g}, z1 maximum {z1.max():.4g}, z0 RMS {np.sqrt((z0**2).mean()):.4g}" in full
    assert full.endswith(f"correlation {between:.4g}")


@pytest.mark.parametrize("change, said", [
    (lambda z0, z1: (z1, z0), "swapped?"),
    (lambda z0, z1: (0.8 * z0, z1), "standard deviation 0.799 instead of 1"),
    (lambda z0, z1: (z0, z1 / 2 + 0.5), "all values of z1 lie in 0.00 to 1.00"),
    (lambda z0, z1: (z0, np.roll(z1, 1, 0)), "z0 and z1 have correlation -?0.0"),
    (lambda z0, z1: (z0, -z1), "z0 and z1 have correlation -0."),
    (lambda z0, z1: (z0, z1[:-1]), "z0.npy has rows .2000, 1, 4, 4., those of z1.npy .1999, "),
])
def test_wrong_pairs_give_one_finding_and_status_1(tmp_path, capsys, change, said):
    save(tmp_path / "0", change=change)
    status, [finding] = findings(tmp_path, capsys, every=True)
    assert status == 1 and re.search(said, finding), finding


def test_a_single_value_that_is_not_finite_is_found_by_the_full_check_only(tmp_path, capsys):
    def damage(z0, z1):
        z1[1234, 0, 2, 2] = np.nan  # none of the rows that the quick look takes
        return z0, z1

    save(tmp_path / "0", change=damage)
    assert findings(tmp_path, capsys) == (0, [])
    status, [finding] = findings(tmp_path, capsys, every=True)
    assert status == 1 and "z1 of pair 1234 is not finite" in finding


def test_a_few_pairs_are_not_said_to_lack_what_they_cannot_show(tmp_path, capsys):
    save(tmp_path / "0", count=5)
    assert findings(tmp_path, capsys) == (0, [])


def test_a_folder_without_pairs_is_named(tmp_path, capsys):
    status, [finding] = findings(tmp_path, capsys)
    assert status == 1 and "holds no pairs" in finding
