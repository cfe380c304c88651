"""image_sampling.py from checkpoints to images, and its one-sentence errors."""

import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image

import image_sampling
from configs.command_line import parse_command_line
from models.checkpoint import write_checkpoint
from runtime.files import write_json
from runtime.plots import GAP, SMALLEST_CELL
from runtime.terminal import UserError
from tests.helpers import CIFAR10, overrides, small_checkpoint
from tests.processes import run_script

SURVEY = ["rk45", *["euler"] * 7]
CELL = SMALLEST_CELL + GAP


@pytest.fixture(scope="module", autouse=True)
def few_images():
    """Smaller images and measures of straightness, which saves seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_sampling, "STRAIGHTNESS_STEPS", 4)
        patch.setattr(image_sampling, "IMAGES", 4)
        yield


def write_run(folder, numbers=(1,), **fields):
    """Write a run folder with checkpoints of random weights and its config.json."""
    for number in numbers:
        content = small_checkpoint(number, 10 * number, **({"model__nf": 4} | fields))
        write_checkpoint(folder / "checkpoints" / f"checkpoint_{number}.pth", content)
    write_json(folder / "config.json", content["config"])
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("logs") / "tiny", numbers=(1, 2, 4))


def sample(folder, *arguments, config=None, **fields):
    """Call the script as its command line does, in this process; fields without a group are those of sampling."""
    named = {name if "__" in name or name == "seed" else f"sampling__{name}": value for name, value in fields.items()}
    argv = ["image_sampling.py", "--config", str(config or folder / "config.json"), "--sampling_dir", str(folder),
            *overrides(**({"sampling__ode_tol": 0.01, "eval__batch_size": 4} | named)), *map(str, arguments)]
    image_sampling.main(*parse_command_line(argv, script_flags=image_sampling.FLAGS))


def entries(folder, checkpoint="checkpoint_1"):
    return json.loads((folder / "eval_sample" / checkpoint / "samples.json").read_text())


def test_survey_of_a_checkpoint_is_images_and_their_description_and_one_sampler_leaves_its_sheet(tmp_path):
    folder = write_run(tmp_path / "run")
    sample(folder)
    out = folder / "eval_sample" / "checkpoint_1"
    found = entries(folder)
    assert [e["sampler"] for e in found] == SURVEY
    assert [e["nfe"] for e in found[1:]] == [1, 2, 5, 10, 20, 50, 100] and found[0]["nfe"] >= 8
    assert found[2]["file"] == "euler_sample_2.png"
    files = {e["file"] for e in found} | {"contact_sheet.png", "pixel_trajectories.png", "samples.json"}
    assert {p.name for p in out.iterdir()} == files
    assert Image.open(out / "euler_sample_2.png").size == (2 * CELL + GAP, 2 * CELL + GAP)
    width, height = Image.open(out / "contact_sheet.png").size
    assert height == 8 * CELL + GAP and width > 4 * CELL + GAP
    for entry in found:
        assert entry["seed"] == 42 and entry["seconds"] > 0 and entry["straightness"] > 0 and entry["images"] == 4
        assert entry["checkpoint"].endswith("checkpoint_1.pth") and entry["weights"] == "EMA"
    sheet = (out / "contact_sheet.png").read_bytes()
    sample(folder, use_ode_sampler="heun", sample_N=3)
    assert (out / "contact_sheet.png").read_bytes() == sheet and (out / "heun_sample_5.png").exists()


def test_compiled_checkpoints_are_one_graph_and_the_same_images(tmp_path, monkeypatch, cuda_graphs, capsys):
    monkeypatch.setattr(image_sampling, "SURVEY", [("rk45", 1), ("euler", 1), ("euler", 4)])
    runs = [write_run(tmp_path / name, (1, 2), data__num_classes=10) for name in ("eager", "compiled")]
    for folder in runs:
        sample(folder, eval__batch_size=6, batch_size=4, training__precision="fp32",
               training__compile=folder.name == "compiled")
    assert cuda_graphs == ["default"]
    assert capsys.readouterr().out.count("the first time takes a minute or more") == 2
    for checkpoint in ("checkpoint_1", "checkpoint_2"):
        eager, ours = (entries(folder, checkpoint) for folder in runs)
        assert [e["file"] for e in ours[1:]] == [e["file"] for e in eager[1:]]
        assert ours[1]["straightness"] == pytest.approx(eager[1]["straightness"], rel=0.05)
        for entry in eager[1:]:
            a, b = (pixels(folder / "eval_sample" / checkpoint / entry["file"]).astype(int) for folder in runs)
            assert np.abs(a - b).max() <= 2 and a.std() > 10


def test_a_compiler_that_fails_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="none"))
    with pytest.raises(UserError, match="training.compile is true, but torch.compile fails: InvalidBackend"):
        sample(write_run(tmp_path), training__compile=True)


def test_every_checkpoint_is_sampled_unless_a_range_is_given(tmp_path):
    whole = write_run(tmp_path / "whole", numbers=(1, 2, 4))
    sample(whole, use_ode_sampler="one_step")
    assert {p.name for p in (whole / "eval_sample").iterdir()} == {f"checkpoint_{k}" for k in (1, 2, 4)}
    folder = write_run(tmp_path / "run", numbers=(1, 2, 3, 4))
    sample(folder, use_ode_sampler="one_step", eval__begin_ckpt=2, eval__end_ckpt=3)
    assert {p.name for p in (folder / "eval_sample").iterdir()} == {"checkpoint_2", "checkpoint_3"}
    sample(folder, use_ode_sampler="one_step", eval__begin_ckpt=4)
    assert (folder / "eval_sample" / "checkpoint_4").exists() and not (folder / "eval_sample" / "checkpoint_1").exists()


def test_the_sampler_asked_for_is_the_one_used(tmp_path):
    folder = write_run(tmp_path / "run")
    for name, steps, nfe in (("heun", 3, 5), ("euler", 1, 1), ("one_step", 7, 1), ("cm_stochastic", 2, 2)):
        sample(folder, use_ode_sampler=name, sample_N=steps)
        found = entries(folder)[-1]
        assert (found["sampler"], found["nfe"], found["file"]) == (name, nfe, f"{name}_sample_{nfe}.png")
    assert [e["sampler"] for e in entries(folder)] == ["heun", "euler", "one_step", "cm_stochastic"]
    sample(folder, use_ode_sampler="euler", sample_N=1)
    assert sorted(e["sampler"] for e in entries(folder)) == ["cm_stochastic", "euler", "heun", "one_step"]


def pixels(path):
    return np.asarray(Image.open(path))


def test_one_file_can_be_sampled_and_the_same_noise_gives_the_same_image(run_folder):
    path = run_folder / "checkpoints" / "checkpoint_2.pth"
    drawn = run_folder / "eval_sample" / "checkpoint_2" / "euler_sample_2.png"
    found = []
    for batch_size in (128, 3):
        sample(run_folder, "--sampling_dir", path, use_ode_sampler="euler", sample_N=2, batch_size=batch_size)
        found.append(pixels(drawn))
    assert (found[0] == found[1]).all()


def test_raw_weights_are_other_images_in_another_folder(run_folder):
    for arguments in ((), ("--nouse_ema",)):
        sample(run_folder, *arguments, use_ode_sampler="one_step", eval__end_ckpt=1)
    ema, raw = (pixels(run_folder / "eval_sample" / name / "one_step_sample_1.png")
                for name in ("checkpoint_1", "checkpoint_1_raw"))
    assert (ema != raw).any() and entries(run_folder, "checkpoint_1_raw")[-1]["weights"] == "raw"


def test_the_network_is_the_checkpoints_whatever_the_config_file_says(run_folder):
    sample(run_folder, config=CIFAR10, use_ode_sampler="one_step", eval__end_ckpt=1)
    with pytest.raises(UserError, match="model.nf is 4 in the checkpoint and 128 here"):
        sample(run_folder, config=CIFAR10, use_ode_sampler="one_step", eval__end_ckpt=1, model__nf=128)


@pytest.fixture(scope="module")
def conditional_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    for name in ("cat", "dog", "eel"):
        (folder / "animals" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "animals" / name / "1.png")
    return write_run(folder / "classes", model__name="DhariwalUNet", model__nf=8, data__num_classes=3,
                     data__num_channels=3, data__dataset="custom", data__data_root=str(folder / "animals"),
                     data__cache_dir=str(folder / "cache"))


def test_classes_get_a_row_each_drawn_or_chosen(conditional_folder):
    folder = conditional_folder / "eval_sample" / "checkpoint_1"

    def grid_of(name, *arguments, **fields):
        sample(conditional_folder, *arguments, use_ode_sampler="one_step", **fields)
        return pixels(folder / f"one_step_sample_1{name}.png")

    drawn = grid_of("")
    zero, one = (grid_of(f"_class{k}", class_label=k) for k in (0, 1))
    assert drawn.shape[2] == 3 and (zero != one).any() and (drawn != one).any()
    rows = grid_of("_classes2-0", "--classes", "2,0")
    assert rows.shape[0] == 2 * CELL + GAP and rows.shape[1] > 10 * CELL + GAP
    assert grid_of("_classes0-1-2", "--classes", "all").shape[0] == 3 * CELL + GAP
    by_name = grid_of("_classes2-0", "--classes", "eel, cat")
    assert (by_name[:, -10 * CELL:] == rows[:, -10 * CELL:]).all() and by_name.shape[1] < rows.shape[1]  # shorter words
    assert {entry["file"] for entry in entries(conditional_folder)} == {
        f"one_step_sample_1{name}.png" for name in ("", "_class0", "_class1", "_classes2-0", "_classes0-1-2")}
    assert (pixels(folder / "one_step_sample_1.png") == drawn).all()


def test_long_lists_of_classes_that_begin_alike_have_their_own_files(tmp_path):
    folder = write_run(tmp_path / "run", model__name="DhariwalUNet", model__nf=8, data__num_classes=60)
    for last in (48, 49):
        sample(folder, "--classes", ",".join(map(str, range(last))), use_ode_sampler="one_step")
    files = [entry["file"] for entry in entries(folder)]
    assert len(set(files)) == 2 and all(len(file) < 60 for file in files)


def test_what_makes_an_image_another_is_in_its_name(run_folder):
    folder = run_folder / "eval_sample" / "checkpoint_1"

    def grid_of(name, **fields):
        sample(run_folder, **({"eval__end_ckpt": 1, "use_ode_sampler": "heun", "sample_N": 1} | fields))
        return pixels(folder / f"heun_sample_{name}.png")

    first = grid_of("1")
    assert (grid_of("1_seed7", seed=7) != first).any()
    assert (grid_of("1_scale0.5", init_noise_scale=0.5) != first).any()
    assert grid_of("1_9images", eval__batch_size=9).shape[0] == 3 * CELL + GAP
    assert (grid_of("1_seed42", seed=42) == first).all()  # the default, but a config file may have another seed
    grid_of("3_rho2.0", rho=2, sample_N=2)
    assert (pixels(folder / "heun_sample_1.png") == first).all()


def test_a_one_step_model_has_no_straightness_and_no_trajectories(tmp_path, capsys):
    folder = write_run(tmp_path / "run", flow__flow_t_schedule="t0")
    sample(folder, use_ode_sampler="euler", sample_N=2)
    assert "straightness" not in capsys.readouterr().out and entries(folder)[0]["straightness"] is None
    assert not list(folder.rglob("pixel_trajectories*"))


CLASSES, PLAIN = "conditional_folder", "run_folder"  # the fixtures


@pytest.mark.parametrize(("folder", "arguments", "message"), [
    (CLASSES, overrides(sampling__class_label=3), "class_label is 3, but the model has 3 classes"),
    (CLASSES, ["--classes", "1,5"], "'5' is no class; the classes are 0 to 2"),
    (CLASSES, ["--classes", "1,bat"], "'bat' is no class; the classes are 0 to 2, or all, or names: cat, dog, eel"),
    (CLASSES, ["--classes", "1", *overrides(sampling__class_label=0)], "both given"),
    (PLAIN, ["--classes", "1"], "has no classes"),
    (PLAIN, overrides(sampling__class_label=1), "class_label is 1, but the model has 0 classes"),
    (PLAIN, overrides(eval__begin_ckpt=5), "no checkpoint_{k}.pth with k in eval.begin_ckpt 5 to .* found: 1, 2, 4"),
    (PLAIN, ["--sampling_dir", "/nowhere"], "/nowhere' is neither a run folder nor a .pth or .pkl file"),
    (PLAIN, ["--sampling_dir", ""], "--sampling_dir '' is neither a run folder nor a .pth or .pkl file: name one"),
])
def test_what_cannot_be_sampled_is_one_sentence(request, folder, arguments, message):
    folder = request.getfixturevalue(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=message):
        sample(folder, *arguments)
    assert sorted(folder.rglob("*")) == before


def test_a_network_that_diverged_leaves_no_image(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "checkpoints" / "checkpoint_1.pth"
    state = torch.load(path, weights_only=True)
    state["ema"]["shadow_params"][-1].fill_(torch.nan)
    write_checkpoint(path, state)
    for name, message in (("rk45", r"rk45, sample 0 at t = 0\.001: the velocity is not finite"),
                          ("one_step", "one_step: sample 0 is not finite")):
        with pytest.raises(UserError, match=message):
            sample(folder, use_ode_sampler=name)
    assert not (folder / "eval_sample").exists()


def test_command_line_reports_an_empty_folder_in_one_sentence_with_status_two(tmp_path):
    (tmp_path / "empty").mkdir()
    arguments = ["--config", CIFAR10, "--sampling_dir", tmp_path / "empty"]
    status, printed = run_script(tmp_path, "image_sampling.py", *arguments)
    assert status == 2 and printed.count("\n") == 1 and "has no checkpoint_{k}.pth" in printed
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize("content", ["[{", "{}", '[{"file": 3}]', "[1]", '"x"', "[" * 100_000])
def test_a_damaged_description_of_earlier_images_is_said_and_replaced(tmp_path, content):
    (tmp_path / "samples.json").write_text(content)
    image_sampling.write_entries(tmp_path / "samples.json", [{"file": "a.png"}])
    assert json.loads((tmp_path / "samples.json").read_text()) == [{"file": "a.png"}]
