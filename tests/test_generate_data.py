"""generate_data.py: a pair belongs to its index, and nothing that stops the program changes or loses one."""

import contextlib
import functools
import io
import random
import re
import resource
import shutil
import time

import numpy as np
import pytest
import torch

import generate_data
import train
from configs.command_line import load_config, parse_command_line
from datasets import load_images, pair_writer
from datasets.pairs import PairFolder, read_metadata
from flows.samplers import COUPLINGS, Coupling
from models.checkpoint import write_checkpoint
from runtime.files import file_digest
from runtime.seeds import index_labels, index_noise
from runtime.terminal import UserError
from tests.datasets.image_files import png, random_images, write_folder
from tests.helpers import DIGITS, SMALL, config_of, overrides, small_checkpoint
from tests.processes import Script, output_of, run_ranks

TOL = 1e-2
# The closed form of 20 images: no checkpoint, and fast.
CLOSED_FORM = {"sampling__direction": "gt_v_from_z0", "sampling__train_subset": "random_20", "sampling__ode_tol": TOL,
               "training__batch_size": 8, "sampling__total_number_of_samples": 40, "seed": 3}
ARRAYS = ("z0.npy", "z1.npy", "label.npy")


@pytest.fixture(autouse=True)
def in_repository(repository, monkeypatch):
    monkeypatch.chdir(repository)


def arguments_for(root, flags=None, **fields):
    """The command line: flags, and config fields (None: leave the field out)."""
    fields = {name: value for name, value in (CLOSED_FORM | fields).items() if value is not None}
    flags = {"config": DIGITS, "data_root": root} | (flags or {})
    return [*(f"--{name}={value}" for name, value in flags.items()), *overrides(**fields)]


def generate(arguments):
    """Run generate_data.py in this process; return (exit status, what it printed)."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            generate_data.main(*parse_command_line(["generate_data.py", *arguments], "", generate_data.FLAGS))
            return 0, printed.getvalue()
        except UserError as error:
            return 2, f"{printed.getvalue()}generate_data.py: {error}"


def make(root, flags=None, **fields):
    """Run generate_data.py to its end; return the folder of the pairs."""
    root.mkdir(exist_ok=True)
    status, log = generate(arguments_for(root, flags, **fields))
    assert status == 0, log
    (root / "log").write_text(log)
    return root / str(fields.get("seed", CLOSED_FORM["seed"]))


def refused(root, flags=None, **fields):
    """Run generate_data.py, which must be refused; return the one sentence it says."""
    status, log = generate(arguments_for(root, flags, **fields))
    assert status == 2, log
    return log.splitlines()[-1]


def contents(folder):
    """All files but the plot and the lock, by name: they must not depend on how the pairs came about."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def digits():
    image_set = load_images(config_of(DIGITS))
    return image_set.images, image_set.labels


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A checkpoint of a tiny class-conditional network with random weights that does something."""
    path = tmp_path_factory.mktemp("network") / "checkpoint_1.pth"
    write_checkpoint(path, small_checkpoint(model__name="DhariwalUNet", data__num_classes=10))
    return str(path)


def make_by_network(root, network, flags=None, **fields):
    return make(root, {"ckpt_path": network} | (flags or {}), **({"sampling__direction": "from_z0"} | fields))


# A pair belongs to its index.


def test_the_noise_and_class_of_a_pair_are_the_recorded_ones():
    assert index_noise(0, [0, 49999], (1, 2, 2)).flatten().tolist() == [
        0.059911035001277924, 0.015559634193778038, -1.1644384860992432, -0.13264712691307068,
        0.6763794422149658, -0.3325153887271881, -0.50943523645401, -0.45819956064224243]
    assert index_labels(0, range(8), 10).tolist() == [9, 8, 5, 8, 5, 0, 1, 8]


def test_z0_and_labels_are_those_of_the_index_for_any_batch_and_the_record_says_what_made_z1(tmp_path, network):
    first = make_by_network(tmp_path / "a", network, training__batch_size=8)
    other = make_by_network(tmp_path / "b", network, training__batch_size=5, sampling__block_size=7)
    for name in ("z0.npy", "label.npy"):
        assert (first / name).read_bytes() == (other / name).read_bytes()
    np.testing.assert_array_equal(np.load(first / "z0.npy"), index_noise(3, range(40), (1, 8, 8)))
    np.testing.assert_array_equal(np.load(first / "label.npy").argmax(1), index_labels(3, range(40), 10))
    a, b = np.load(first / "z1.npy"), np.load(other / "z1.npy")
    np.testing.assert_allclose(a, b, atol=10 * TOL, rtol=10 * TOL)
    assert np.abs(a - np.load(first / "z0.npy")).max() > 0.1, "the network does nothing"
    record = read_metadata(first)
    assert record["count"] == 40 and record["complete"] is True and 8 <= record["nfe_mean"] <= record["nfe_worst"]
    assert record["identity"]["sampling.ode_tol"] == TOL and record["identity"]["sampling.direction"] == "from_z0"
    assert record["checkpoint"] == network and record["checkpoint_digest"] == file_digest(network)
    assert record["config"]["model"]["name"] == "DhariwalUNet" and record["config"]["model"]["nf"] == 8
    assert (first / "pairs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("fields", [{}, {"sampling__pair_storage": "compact"},
                                    {"sampling__use_ode_sampler": "euler", "sampling__sample_N": 3},
                                    {"sampling__step_control": "batch"}])
def test_a_longer_run_has_the_finished_blocks_of_the_shorter_and_goes_on_where_it_stopped(tmp_path, fields):
    fields = fields | {"sampling__block_size": 16}
    short = make(tmp_path / "short", sampling__total_number_of_samples=21, **fields)
    long = make(tmp_path / "long", sampling__total_number_of_samples=50, **fields)
    for name in ("z0.npy", "z1.npy"):
        if (short / name).exists():
            a, b = np.load(short / name), np.load(long / name)
            np.testing.assert_array_equal(a[:16], b[:16])
            np.testing.assert_allclose(a[16:], b[16:21], rtol=0, atol=10 * TOL)  # solved in other company
    make(tmp_path / "short", sampling__total_number_of_samples=50, **fields)
    assert "16 are done, 3 blocks to make" in (tmp_path / "short/log").read_text()
    assert contents(short) == contents(long)


def test_the_same_command_again_changes_nothing(tmp_path):
    folder = make(tmp_path)
    before = contents(folder), (folder / "z1.npy").stat().st_mtime_ns
    make(tmp_path)
    assert (contents(folder), (folder / "z1.npy").stat().st_mtime_ns) == before
    assert "is complete: it holds 40 pairs" in (tmp_path / "log").read_text()


def test_processes_share_the_blocks_and_change_nothing(tmp_path):
    alone = make(tmp_path / "alone", sampling__total_number_of_samples=150)
    root = tmp_path / "together"
    ended = run_ranks(tmp_path, "generate_data.py",
                      *arguments_for(root, sampling__total_number_of_samples=150), count=3)
    assert [status for status, _ in ended] == [0, 0, 0], ended
    assert contents(root / "3") == contents(alone)


# What the directions are.


def test_from_z1_starts_at_the_images_of_the_data_set_unflipped_and_leads_back(tmp_path, network):
    fields = {"sampling__ode_tol": 1e-5, "sampling__total_number_of_samples": 16, "sampling__block_size": 8,
              "sampling__train_subset": "all", "sampling__class_label": 1}
    folder = make_by_network(tmp_path / "back", network, sampling__direction="from_z1", **fields,
                             data__random_flip=True)
    images, labels = digits()
    z1 = np.load(folder / "z1.npy")
    np.testing.assert_allclose(z1, images[labels == 1][:16] / 127.5 - 1, atol=1e-6)
    assert np.load(folder / "label.npy").argmax(1).tolist() == [1] * 16
    assert np.abs(np.load(folder / "z0.npy") - z1).max() > 0.1, "the network does nothing"
    forth = make_by_network(tmp_path / "forth", network, {"z0_path": str(folder / "z0.npy")}, **fields)
    np.testing.assert_array_equal(np.load(forth / "z0.npy"), np.load(folder / "z0.npy"))
    np.testing.assert_allclose(np.load(forth / "z1.npy"), z1, atol=0.01)


def test_from_z1_makes_as_many_pairs_as_there_are_images_and_no_more_are_granted(tmp_path, network):
    np.save(tmp_path / "images.npy", np.zeros((20, 1, 8, 8), np.float32))
    flags = {"z1_path": tmp_path / "images.npy"}
    fields = {"sampling__direction": "from_z1", "sampling__class_label": 0}
    folder = make_by_network(tmp_path / "a", network, flags, sampling__total_number_of_samples=None, **fields)
    assert len(np.load(folder / "z0.npy")) == 20
    assert "20 pairs from_z1, images not flipped" in (tmp_path / "a/log").read_text()
    sentence = refused(tmp_path / "b", flags | {"ckpt_path": network}, **fields)
    assert "total_number_of_samples is 40, but there are only 20 initial points" in sentence


def test_flips_that_are_asked_for_mirror_some_images_and_the_others_the_second_time(tmp_path):
    images, _ = digits()
    folder = make(tmp_path, sampling__direction="random_paired", sampling__random_flip=True,
                  sampling__train_subset="all", sampling__total_number_of_samples=2 * len(images))
    z1, plain = np.load(folder / "z1.npy"), images / 127.5 - 1
    straight = np.isclose(z1, np.concatenate([plain, plain]), atol=1e-6).all((1, 2, 3))
    mirrored = np.isclose(z1, np.concatenate([plain, plain])[..., ::-1], atol=1e-6).all((1, 2, 3))
    assert (straight | mirrored).all() and 700 < straight[:1797].sum() < 1100
    assert (straight[:1797] ^ straight[1797:])[~(straight & mirrored)[:1797]].all()


def test_the_closed_form_from_noise_ends_at_the_images_and_from_images_at_white_noise(tmp_path):
    fields = {"sampling__total_number_of_samples": 200, "sampling__ode_tol": 1e-3, "training__batch_size": 50}
    chosen = load_images(config_of(DIGITS, **CLOSED_FORM)).images / 127.5 - 1
    forward = make(tmp_path / "forward", **fields)
    distances = np.abs(np.load(forward / "z1.npy")[:, None] - chosen[None]).max((2, 3, 4)).min(1)
    assert np.median(distances) < 0.02
    backward = make(tmp_path / "backward", **fields, sampling__direction="gt_v_from_z1")
    z0, z1 = np.load(backward / "z0.npy"), np.load(backward / "z1.npy")
    np.testing.assert_allclose(z1, np.tile(chosen, (10, 1, 1, 1)), atol=1e-6)
    assert abs(z0.mean()) < 0.05 and abs(z0.std() - 1) < 0.05


def test_random_pairs_need_no_network_and_keep_the_classes_of_the_images(tmp_path):
    flags = {"ckpt_path": "absent.pth"}  # as the released script takes it
    folder = make(tmp_path, flags, sampling__direction="random_paired", sampling__train_subset="all",
                  data__num_classes=10)
    images, labels = digits()
    np.testing.assert_array_equal(np.load(folder / "z0.npy"), index_noise(3, range(40), (1, 8, 8)))
    assert "random_paired uses no network: --ckpt_path is ignored" in (tmp_path / "log").read_text()
    np.testing.assert_array_equal(np.load(folder / "label.npy"), np.eye(10, dtype=np.float32)[labels[:40]])
    assert "sampling.use_ode_sampler" not in read_metadata(folder)["identity"]


def test_images_from_a_file_bring_their_classes_from_another(tmp_path, network):
    np.save(tmp_path / "images.npy", np.zeros((10, 1, 8, 8), np.float32))
    np.save(tmp_path / "classes.npy", np.arange(10) % 3)
    flags, fields = {"z1_path": tmp_path / "images.npy"}, {"sampling__total_number_of_samples": 10}
    assert "give --label_path" in refused(tmp_path / "pairs", flags | {"ckpt_path": network},
                                          sampling__direction="from_z1", **fields)
    np.save(tmp_path / "fewer.npy", np.arange(9) % 3)
    assert "fewer.npy has 9 labels, but" in refused(
        tmp_path / "pairs", flags | {"ckpt_path": network, "label_path": tmp_path / "fewer.npy"},
        sampling__direction="from_z1", sampling__total_number_of_samples=5)
    folder = make_by_network(tmp_path / "pairs", network, flags | {"label_path": tmp_path / "classes.npy"},
                             sampling__direction="from_z1", **fields)
    assert np.load(folder / "label.npy").argmax(1).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


# What is written, and what is refused.


def test_what_the_teacher_was_trained_on_is_recorded_for_the_student_unless_given(tmp_path, capsys):
    """Pairs of own images: config.json of a run on them, started by a config of digits, has their images and noise."""
    write_folder(tmp_path / "own", {f"{k}.png": png(image) for k, image in enumerate(random_images(10, 1, 8))})
    make(tmp_path / "pairs", sampling__direction="random_paired", sampling__train_subset="all", data__dataset="custom",
         data__data_root=tmp_path / "own", sampling__init_noise_scale=0.9)
    common = ["--config", DIGITS, *overrides(data__reflow_data_root=tmp_path / "pairs", work_dir=tmp_path,
              training__n_iters=1, training__batch_size=8, training__snapshot_sampling=0, **SMALL)]
    for expr, given, dataset, said in (
            ("taken", [], "custom", "pairs.json: as in training, not as in the config file: sampling.init_noise_scale "
             "0.9 (not 1.0), data.dataset 'custom'"),
            ("given", ["--config.data.dataset", "digits"], "digits",
             "pairs.json: trained with data.dataset 'custom', but 'digits' of the command line is used")):
        assert train.main(*parse_command_line(["train.py", *common, "--config.expr", expr, *given])) == 0
        recorded = load_config(tmp_path / expr / "config.json")
        assert (recorded.data.dataset, recorded.data.data_root) == (dataset, "" if given else str(tmp_path / "own"))
        assert recorded.sampling.init_noise_scale == 0.9  # of the pairs, and so of annealing and guidance
        assert said in capsys.readouterr().err


def test_compact_storage_takes_a_quarter_of_the_disk_and_says_what_it_loses(tmp_path):
    full = make(tmp_path / "full", sampling__total_number_of_samples=320)
    small = make(tmp_path / "compact", sampling__total_number_of_samples=320, sampling__pair_storage="compact")
    sizes = [sum((folder / name).stat().st_size for name in ARRAYS if (folder / name).exists())
             for folder in (full, small)]
    assert sizes[1] < 0.26 * sizes[0]
    rows, folder = np.arange(320), PairFolder(small)
    np.testing.assert_array_equal(folder.z0[rows], np.load(full / "z0.npy"))
    lost = np.abs(folder.z1[rows] - np.load(full / "z1.npy")).max()
    assert folder.metadata["z1_rounding"] == pytest.approx(lost, rel=1e-6) and 0 < lost < 1e-3


def test_another_checkpoint_or_config_on_the_same_folder_is_refused(tmp_path, network):
    folder = make_by_network(tmp_path / "pairs", network)
    before = contents(folder)
    state = torch.load(network, weights_only=True)
    state["step"] = 2
    write_checkpoint(tmp_path / "other.pth", state)
    sentence = refused(tmp_path / "pairs", {"ckpt_path": tmp_path / "other.pth"},
                       sampling__direction="from_z0", sampling__total_number_of_samples=50)
    assert f"holds other pairs, made with {network}: the content of --ckpt_path differs. Give the same" in sentence
    sentence = refused(tmp_path / "pairs", {"ckpt_path": network}, sampling__direction="from_z0",
                       sampling__ode_tol=1e-3)
    assert f"other pairs, made with {network}: sampling.ode_tol is 0.01 there and 0.001 here. Give" in sentence
    assert contents(folder) == before


@pytest.mark.parametrize("fields, flags, sentence", [
    ({"sampling__direction": "from_z0"}, {}, "needs a network: give --ckpt_path"),
    ({}, {"data_root": ""}, "--data_root is empty"),
    ({}, {"z1_path": "x.npy"}, "does not start at images of a file: leave out --z1_path"),
    ({"sampling__direction": "gt_v_from_z1"}, {"z1_path": "x.npy"}, "gt_v_from_z1 does not start at images of a file"),
    ({"sampling__direction": "gt_v_from_z1"}, {"z0_path": "x.npy"}, "does not start at noise: leave out --z0_path"),
    ({}, {"z0_path": "absent.npy"}, "absent.npy does not exist"),
    ({"sampling__direction": "gt_v_from_z1", "sampling__pair_storage": "compact"}, {},
     "compact does not store z0 but draws it again"),
    ({"sampling__class_label": 4}, {}, "class_label is 4, but the model has 0 classes"),
    ({"sampling__direction": "random_paired", "data__num_classes": 3, "sampling__class_label": 1},
     {"z1_path": "x.npy", "label_path": "y.npy"}, "--label_path and config.sampling.class_label both set the classes"),
    ({"sampling__direction": "random_paired"}, {"z1_path": "x.npy", "label_path": "y.npy"}, "set data.num_classes"),
    ({"sampling__direction": "gt_v_from_z1", "sampling__random_flip": True}, {}, "random_flip does not apply to"),
    ({"sampling__direction": "random_paired", "sampling__random_flip": True}, {"z1_path": "x.npy"},
     "random_flip does not apply to --z1_path"),
    ({"sampling__init_noise_scale": 2.0, "sampling__direction": "from_z0"}, {"z0_path": "x.npy", "ckpt_path": "y.pth"},
     "init_noise_scale does not apply to --z0_path"),
    ({"sampling__init_noise_scale": 2.0, "sampling__direction": "gt_v_from_z1"}, {}, "init_noise_scale does not apply"),
    ({"sampling__use_ode_sampler": "edm", "sampling__sigma_min": 90.0}, {}, "sigma_min 90 is above"),
    ({"data__num_classes": 10}, {}, "has no classes: set config.sampling.class_label"),
    ({"data__num_classes": 10, "sampling__direction": "gt_v_from_z1"}, {}, "has no classes: set config.sampling"),
    ({"data__num_classes": 5, "sampling__direction": "random_paired", "sampling__train_subset": "all"}, {},
     "has images of 10 classes"),
])
def test_what_does_not_go_together_is_refused_before_anything_is_created(tmp_path, fields, flags, sentence):
    said = refused(tmp_path / "pairs", flags, **fields)
    assert sentence in said
    assert not (tmp_path / "pairs").exists()


def test_a_coupling_of_ones_own_is_one_row_of_its_table(tmp_path, monkeypatch):
    """Images paired with the noise of their own mirror image: neither a network nor a solver."""
    def mirrored(points, indices, solve, eps):
        return points.z0(indices).flip(-1), points.z1(indices), torch.zeros(len(indices), dtype=torch.int64)

    monkeypatch.setitem(COUPLINGS, "mirrored", Coupling(mirrored, "both"))
    fields = {"sampling__total_number_of_samples": 20, "sampling__train_subset": "random_20"}
    own, plain = (PairFolder(make(tmp_path / name, sampling__direction=name, **fields))
                  for name in ("mirrored", "random_paired"))
    (z0, z1), (noise, images) = (pairs.take(np.arange(20)) for pairs in (own, plain))
    assert torch.equal(z0, noise.flip(-1)) and torch.equal(z1, images)


def test_starting_points_of_another_shape_are_refused(tmp_path):
    for shape, holds in (((9, 3, 8, 8), "9 float32 rows of shape (3, 8, 8)"), ((0, 1, 8, 8), "0 float32 rows")):
        np.save(tmp_path / "noise.npy", np.zeros(shape, np.float32))
        assert f"noise.npy holds {holds}" in refused(tmp_path / "pairs", {"z0_path": tmp_path / "noise.npy"})


def test_a_network_that_gives_no_numbers_is_named_with_the_pairs(tmp_path, network):
    state = torch.load(network, weights_only=True)
    state["ema"]["shadow_params"] = [p * float("nan") for p in state["ema"]["shadow_params"]]
    write_checkpoint(tmp_path / "broken.pth", state)
    flags = {"ckpt_path": tmp_path / "broken.pth"}
    sentence = refused(tmp_path / "pairs", flags, sampling__direction="from_z0")
    assert re.search("pairs 0 to 31: .*not finite", sentence)
    sentence = refused(tmp_path / "other", flags, sampling__direction="from_z0",
                       sampling__use_ode_sampler="euler", sampling__sample_N=1)
    assert "pairs 0 to 31: z1.npy of pair 0 is not finite" in sentence


def test_a_compiler_that_fails_is_one_sentence(tmp_path, network, monkeypatch):
    def backend(graph, inputs):
        raise OSError("no C++ compiler")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    sentence = refused(tmp_path, {"ckpt_path": network}, sampling__direction="from_z0", training__compile=True)
    assert "config.training.compile is true, but torch.compile fails: OSError: no C++ compiler; set it" in sentence


def test_no_more_pairs_are_solved_than_are_asked_for(tmp_path, monkeypatch):
    solved = []
    monkeypatch.setattr(generate_data, "analytic_velocity", lambda images: lambda x, t, label=None: (
        solved.append(len(x)), -x)[1])
    make(tmp_path, sampling__total_number_of_samples=3, sampling__use_ode_sampler="euler", sampling__sample_N=1)
    assert solved == [3]


def test_a_checkpoint_replaced_after_it_was_read_is_not_recorded_as_what_made_the_pairs(tmp_path, network, monkeypatch):
    path, load = tmp_path / "checkpoint_1.pth", generate_data.load_with_config
    shutil.copy(network, path)

    def load_and_replace(*arguments, **named):
        loaded = load(*arguments, **named)
        write_checkpoint(path, torch.load(network, weights_only=True) | {"step": 2})
        return loaded

    monkeypatch.setattr(generate_data, "load_with_config", load_and_replace)
    folder = make_by_network(tmp_path / "pairs", path)
    assert read_metadata(folder)["checkpoint_digest"] == file_digest(network) != file_digest(path)


@pytest.mark.parametrize("fields", [
    {"sampling__direction": "from_z1"}, {"training__precision": "bf16", "sampling__pair_storage": "compact"},
    {"sampling__use_ode_sampler": "heun", "sampling__sample_N": 3, "training__compile_mode": "reduce-overhead"}])
def test_a_compiled_teacher_is_one_graph_and_makes_the_same_pairs(tmp_path, network, cuda_graphs, fields):
    fields = fields | {"sampling__block_size": 16, "sampling__total_number_of_samples": 19}
    eager = make_by_network(tmp_path / "eager", network, **fields)
    assert not cuda_graphs
    compiled = make_by_network(tmp_path / "compiled", network, training__compile=True, **fields)
    assert cuda_graphs == [fields.get("training__compile_mode", "default")]
    assert "the first time takes a minute or more" in (tmp_path / "compiled/log").read_text()
    tolerance = 0.05 if "training__precision" in fields else 1e-3
    for a, b in zip(*(PairFolder(folder).take(np.arange(19)) for folder in (eager, compiled)), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    assert read_metadata(compiled)["config"]["training"]["compile"]
    fields["sampling__total_number_of_samples"] = 20  # the setting may change, as the machine may
    make_by_network(tmp_path / "compiled", network, **fields)
    assert "16 are done, 1 blocks to make" in (tmp_path / "compiled/log").read_text()


# What stops the program.


def write_slowly():
    """Wait before each block is written: no run ends before it is killed, however fast the machine is."""
    write = pair_writer.write_block
    pair_writer.write_block = lambda *arguments: (time.sleep(0.05), write(*arguments))


def test_killed_at_random_moments_and_started_again_the_files_are_those_of_an_undisturbed_run(tmp_path):
    fields = {"sampling__total_number_of_samples": 500, "sampling__ode_tol": 1e-4, "training__progress": "true"}
    undisturbed = make(tmp_path / "undisturbed", **fields)
    root, folder = tmp_path / "killed", tmp_path / "killed/3"
    moments = random.Random(0)
    for already in (1, 5, 9):
        pause = moments.uniform(0, 0.2)
        running = Script(tmp_path, "generate_data.py", arguments_for(root, **fields), prepare=write_slowly)
        running.kill_when(lambda least=already, pause=pause: finished_blocks(folder) >= least and not time.sleep(pause))
        assert len(np.load(folder / "z1.npy")) == 0, "an unfinished folder promises pairs"
    with pytest.raises(UserError, match="is unfinished"):
        PairFolder(folder)
    kept = finished_blocks(folder)
    make(root, **fields)
    log = (root / "log").read_text()
    assert f"{32 * kept} are done, {16 - kept} blocks to make" in log
    assert f"| {32 * kept}/500 [00:00" in log and "| 500/500 [" in log and "NFE=" in log
    assert contents(folder) == contents(undisturbed)


def finished_blocks(folder):
    """The blocks that are noted as finished."""
    return (folder / "blocks.jsonl").read_text().count("}\n") if (folder / "blocks.jsonl").exists() else 0


def print_peak():
    """Print the peak of the memory at the end of generate_data.py."""
    run = pair_writer.finish
    pair_writer.finish = lambda *arguments: (run(*arguments), print("peak", resource.getrusage(
        resource.RUSAGE_SELF).ru_maxrss))


def test_peak_memory_does_not_grow_with_the_number_of_pairs(tmp_path):
    fields = {"sampling__use_ode_sampler": "euler", "sampling__sample_N": 1, "training__batch_size": 500,
              "data__image_size": 32}
    peaks = []
    for count in (2000, 13_000):  # a whole block of 4 × 500, and several
        arguments = arguments_for(tmp_path / str(count), sampling__total_number_of_samples=count, **fields)
        printed = output_of(tmp_path, "generate_data.py", *arguments, prepare=print_peak)
        peaks.append(int(re.search(r"^peak (\d+)$", printed, re.MULTILINE)[1]))
    assert (tmp_path / "13000/3/z1.npy").stat().st_size > 50e6
    assert abs(peaks[1] / peaks[0] - 1) < 0.1, f"{peaks} KiB"
