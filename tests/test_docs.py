"""The Python blocks of docs/ run as the pages print them."""

import json
import re

from tests.processes import ROOT, run_script


def blocks(page):
    """Return the Python blocks of a page, in their order."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_the_four_additions_of_the_page_run_through_the_scripts_from_one_config_file(tmp_path):
    config = tmp_path / "my_config.py"
    config.write_text("\n\n".join(blocks("extending.md")))
    common = ["--config", config, "--config.training.batch_size", 8, "--config.training.progress", "false"]
    status, printed = run_script(tmp_path, "train.py", *common, "--config.work_dir", tmp_path, "--config.expr",
                                 "stripes", "--config.training.n_iters", 6, "--config.training.snapshot_freq", 6)
    assert status == 0 and "small of 449 parameters" in printed and "64 images of 1×8×8" in printed, printed
    checkpoint = tmp_path / "stripes/checkpoints/checkpoint_1.pth"
    status, printed = run_script(tmp_path, "generate_data.py", *common, "--ckpt_path", checkpoint, "--data_root",
                                 tmp_path / "pairs", "--config.sampling.total_number_of_samples", 16)
    assert status == 0, printed
    about = json.loads((tmp_path / "pairs/42/pairs.json").read_text())
    assert about["identity"]["sampling.use_ode_sampler"] == "midpoint" and about["nfe_mean"] == 8
    status, printed = run_script(tmp_path, "image_sampling.py", *common, "--sampling_dir", checkpoint,
                                 "--config.sampling.use_ode_sampler", "midpoint", "--config.eval.batch_size", 4)
    assert status == 0 and list((tmp_path / "stripes").rglob("midpoint_sample_8*.png")), printed


def test_the_config_file_of_the_page_on_own_images_is_one(tmp_path):
    (tmp_path / "my_images.py").write_text(blocks("own-images.md")[0])
    status, printed = run_script(tmp_path, "train.py", "--config", tmp_path / "my_images.py", "--print_config")
    assert status == 0 and json.loads(printed)["data"]["data_root"] == "images/train"


def test_the_hand_made_pairs_of_the_page_are_a_folder_that_check_pairs_accepts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks("pairs.md")[0].replace("50000", "600")
    exec(code, {"my_sampler": lambda z: (z * 0.3).clip(-1, 1)})  # a flow: its images are correlated with the noise
    status, printed = run_script(tmp_path, "tools.check_pairs", "reflow_data/other", cwd=tmp_path)
    assert status == 0, printed
