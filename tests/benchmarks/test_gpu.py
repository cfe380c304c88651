"""The programme for one stay on a GPU runs every part on a CPU in its tiny form."""

import json
import subprocess
import sys


def test_every_row_of_the_gpu_programme_has_figures(repository, tmp_path):
    words = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", tmp_path]
    done = subprocess.run(words, cwd=repository, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0 and "not reached: nothing" in done.stdout, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "error" in row]
    assert {row["part"] for row in rows} == {"train", "released", "sample", "pairs", "features", "repeats"}
    assert all(row["images_s"] > 0 for row in rows if row["part"] in ("train", "released", "sample", "features"))
    assert all(row["same_bits"] for row in rows if row["part"] == "repeats")
