"""`python -m tools.check_pairs` must find what is wrong with stored pairs, wherever it is."""

import re

import numpy as np
import pytest

from tools.check_pairs import main


@pytest.fixture
def arrays(tmp_path):
    """Memory maps of 2,000 right pairs under `tmp_path`."""
    (tmp_path / "0").mkdir()
    rng = np.random.default_rng(0)
    np.save(tmp_path / "0/z0.npy", rng.standard_normal((2000, 1, 4, 4), dtype=np.float32))
    np.save(tmp_path / "0/z1.npy", rng.uniform(-1, 1, (2000, 1, 4, 4)).astype(np.float32))
    return [np.load(tmp_path / "0" / name, mmap_mode="r+") for name in ("z0.npy", "z1.npy")]


def test_right_pairs_are_described(tmp_path, arrays, capsys):
    assert main([str(tmp_path)]) == 0 and main([str(tmp_path), "--check"]) == 0
    quick, full = capsys.readouterr().out.split("released layout")[1:]
    assert "looked at 256: " in quick and "looked at 2000: " in full
    assert "warning" not in full
    said = re.search(r"z0 mean (\S+), deviation (\S+); z1 from (\S+) to (\S+)", full).groups()
    wanted = arrays[0].mean(), arrays[0].std(), arrays[1].min(), arrays[1].max()
    np.testing.assert_allclose([float(value) for value in said], wanted, atol=6e-4)


def test_a_single_value_that_is_not_finite_is_found_by_the_full_check_only(tmp_path, arrays, capsys):
    arrays[1][1234, 0, 2, 2] = np.nan  # none of the rows that the quick look takes
    assert main([str(tmp_path)]) == 0
    capsys.readouterr()
    assert main([str(tmp_path), "--check"]) == 2
    assert "z1 of pair 1234 is not finite" in capsys.readouterr().err


def test_swapped_files_are_suspected(tmp_path, arrays, capsys):
    (tmp_path / "0/z0.npy").rename(tmp_path / "0/z.npy")
    (tmp_path / "0/z1.npy").rename(tmp_path / "0/z0.npy")
    (tmp_path / "0/z.npy").rename(tmp_path / "0/z1.npy")
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("swapped?") == 2


def test_a_folder_without_pairs_is_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "holds no pairs" in capsys.readouterr().err
