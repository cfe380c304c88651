"""Checkpoint files: what is read, what is refused and how the user hears of it, and what they say of their run."""

import json
import os
import pickle
import socket
import sys
import threading

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from configs.command_line import config_to_dict
from configs.default import get_default_config, get_field
from models.checkpoint import (
    apply_architecture,
    load_matching,
    load_model,
    load_weights,
    load_with_config,
    read_checkpoint,
    take_run_fields,
    write_checkpoint,
)
from models.create import create_from_fields, create_model
from models.released import published_fields
from models.safe_load import read_file
from runtime.files import file_digest
from runtime.terminal import UserError
from tests.helpers import config_of, same
from tests.models.released_numbers import fields_of, inputs_of, layout_state, path_of
from training.update import ExponentialMovingAverage

TINY = {"model.nf": 8, "model.ch_mult": (1, 2), "model.num_res_blocks": 1, "data.image_size": 8,
        "model.attn_resolutions": (4,), "model.init_scale": 1.0}


def tiny_checkpoint(**changes):
    """Return (net, checkpoint in our layout) of a small network, its averages differing from its weights."""
    torch.manual_seed(0)
    fields = TINY | changes
    net = create_from_fields(fields)
    ema = ExponentialMovingAverage(net.parameters(), 0.999)
    torch._foreach_add_(ema.shadow_params, 0.01)
    return net, {"model": net.state_dict(), "ema": ema.state_dict(), "optimizer": {"state": {}, "param_groups": []},
                 "step": 7, "config": config_to_dict(config_of(**fields))}


def same_weights(one, two):
    return same(list(map(torch.Tensor.detach, one)), list(map(torch.Tensor.detach, two)))


@pytest.fixture
def ours(tmp_path):
    """The path of a checkpoint in our layout."""
    write_checkpoint(tmp_path / "ours.pth", tiny_checkpoint()[1])
    return tmp_path / "ours.pth"


def test_own_checkpoint_comes_back_with_weights_averages_and_step(ours):
    net, written = tiny_checkpoint()
    read = read_checkpoint(ours)
    assert all(same(read[part], written[part]) for part in ("model", "ema", "step"))
    assert read["config"] == written["config"] and read["fields"] == net.config_fields


def test_loaded_model_needs_no_flags_and_evaluates(ours):
    """Averaged weights by default, raw ones when asked, in the memory layout that is fastest on a CPU."""
    net, written = tiny_checkpoint()
    averaged, raw = load_model(ours), load_model(str(ours), use_ema=False)
    assert not averaged.training and averaged.config_fields == net.config_fields
    assert same_weights(averaged.parameters(), written["ema"]["shadow_params"])
    assert same_weights(raw.parameters(), net.parameters())
    velocity = averaged(torch.randn(2, 3, 8, 8), torch.ones(2))
    assert velocity.is_contiguous(memory_format=torch.channels_last)


def test_loaded_weights_can_change_without_changing_the_file(ours):
    """Tensors mapped from the file are copied, so training on goes to memory."""
    before = ours.read_bytes()
    net = load_model(ours)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    checkpoint = read_checkpoint(ours)
    checkpoint["ema"]["shadow_params"][0].add_(1.0)
    assert ours.read_bytes() == before


def test_interrupted_writing_leaves_the_old_checkpoint(ours):
    before = ours.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        write_checkpoint(ours, {"model": {}, "step": threading.Lock()})
    assert ours.read_bytes() == before
    assert [p.name for p in ours.parent.iterdir()] == ["ours.pth"]


# Files that are refused. Each message names the file.


class Hostile:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol, phrase", [(2, "is refused: .*mkdir.*nothing was executed"), (4, "cannot be read")])
@pytest.mark.parametrize("zipped", [True, False, None])
def test_pickled_code_is_not_executed(tmp_path, zipped, protocol, phrase):
    """A checkpoint that runs a command when unpickled, in both file formats of torch.save and as a plain pickle."""
    state = {"model": {}, "ema": {}, "step": Hostile(str(tmp_path / "owned"))}
    if zipped is None:
        (tmp_path / "bad.pth").write_bytes(pickle.dumps(state["step"], protocol))
    else:
        torch.save(state, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    with pytest.raises(UserError, match=r"bad\.pth" if zipped is None else rf"bad\.pth {phrase}"):
        load_model(tmp_path / "bad.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_numpy_scalar_is_a_number_and_nothing_else(tmp_path, module):
    """Also as numpy 1 named it in the published checkpoints. Its own constructors are not called."""
    numbers = {"a": np.float64(0.1), "b": np.int32(-3), "c": np.bool_(True), "d": np.float32(0.5), "e": np.uint8(200)}
    torch.save(numbers, tmp_path / "numbers.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "numbers.pth").read_bytes()
    assert b"numpy._core.multiarray" in content
    (tmp_path / "numbers.pth").write_bytes(content.replace(b"numpy._core.multiarray", module))
    read = read_file(tmp_path / "numbers.pth")[0]
    assert read == {"a": 0.1, "b": -3, "c": True, "d": 0.5, "e": 200}
    assert {type(v) for v in read.values()} == {float, int, bool}
    torch.save({"a": np.array([{}], dtype=object)}, tmp_path / "array.pth")
    with pytest.raises(UserError, match=r"array\.pth is refused: it names numpy"):
        read_file(tmp_path / "array.pth")


@pytest.mark.parametrize("content", [b"hello, I am text\n", b"\x80\x02}q\x00.", bytes(100), b"PK\x03\x04 no zip"])
def test_other_files_are_reported(tmp_path, content):
    (tmp_path / "other.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"other\.pth"):
        load_model(tmp_path / "other.pth")


OURS = {"model": {"a": torch.zeros(1)}, "ema": {"shadow_params": []}}


@pytest.mark.parametrize("content, phrase", [
    ([1, 2], "holds a list"),
    ({"step": 1}, "no state dict under 'model'"),
    ({"model": {"a": 1}, "ema": {}}, "no state dict under 'model'"),
    ({"model": {"a": torch.zeros(1)}, "ema": {"shadow_params": 3}}, "no averaged weights under 'ema'"),
    (OURS | {"config": 3}, "an invalid config"),
    ({"model": {}, "config": {}}, "no state dict under 'model'"),
    *((OURS | {"config": {group: {field: value}}}, "an invalid config") for group, field, value in (
        ("model", "nf", "wide"), ("model", "nf", None), ("model", "ch_mult", 3), ("model", "ch_mult", [1, "x"]),
        ("model", "attn_resolutions", [[4]]), ("data", "image_size", [8]), ("model", "name", ["ncsnpp"]),
        ("data", "num_channels", -1))),
])
def test_other_contents_are_reported(tmp_path, content, phrase):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=rf"other\.pth.*{phrase}"):
        read_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("name, said, fields", [("ours", "", None),
                                                ("released", "is damaged.*", fields_of("ncsnpp_cifar"))])
def test_averages_of_another_network_are_reported(ours, tmp_path, name, said, fields):
    checkpoint = read_file(ours if name == "ours" else path_of("ncsnpp_cifar"))[0]
    checkpoint["ema"]["shadow_params"] = checkpoint["ema"]["shadow_params"][1:]
    write_checkpoint(tmp_path / f"{name}.pth", checkpoint)
    with pytest.raises(UserError, match=rf"{name}\.pth {said}.*the EMA has \d+ tensors there and \d+ here"):
        load_model(tmp_path / f"{name}.pth", fields=fields)


@pytest.mark.parametrize("form", ["model alone", "bare state dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.module."])
def test_weights_alone_are_read_whatever_wrapped_the_network(tmp_path, form, prefix):
    """For sampling with raw weights and for starting a training, but not as averages that they are not."""
    net, checkpoint = tiny_checkpoint()
    state = {prefix + name: tensor for name, tensor in checkpoint["model"].items()}
    torch.save({"model": state} if form == "model alone" else state, tmp_path / "weights.pth")
    found = load_model(tmp_path / "weights.pth", use_ema=False, fields=TINY)
    assert same_weights(found.parameters(), net.parameters())
    assert load_matching(create_from_fields(TINY), tmp_path / "weights.pth")[1] == []
    with pytest.raises(UserError, match=r"weights.pth holds weights without their moving average.*--use_ema false"):
        load_model(tmp_path / "weights.pth", fields=TINY)


def test_prefixes_of_a_released_file_do_not_matter(tmp_path):
    content = read_file(path_of("ncsnpp_cifar"))[0]
    content["model"] = {f"_orig_mod.{name}": tensor for name, tensor in content["model"].items()}
    torch.save(content, tmp_path / "wrapped.pth")
    ours, theirs = (load_model(path, fields=fields_of("ncsnpp_cifar"))
                    for path in (tmp_path / "wrapped.pth", path_of("ncsnpp_cifar")))
    assert same_weights(ours.parameters(), theirs.parameters())


# The architecture comes from the checkpoint.


def published_checkpoint(name):
    """Return what `read_checkpoint` returns of a published file, its tensors without content."""
    state = {key.removeprefix("module."): tensor for key, tensor in layout_state(name).items()}
    return {"model": state, "fields": published_fields(state), "path": f"{name}.pth"}


@pytest.mark.parametrize("field, value", [
    ("model.nf", 16), ("model.num_res_blocks", 3), ("model.ch_mult", (1, 1)), ("data.num_channels", 1),
    ("model.name", "DhariwalUNet"),
])
@pytest.mark.parametrize("layout", ["ours", "published"])
def test_contradicting_field_is_refused_with_the_difference(ours, layout, field, value):
    checkpoint = read_checkpoint(ours) if layout == "ours" else published_checkpoint("cifar32_3.4M")
    config = get_default_config()
    group, name = field.split(".")
    config[group][name] = value
    if field == "model.ch_mult":
        config.model.attn_resolutions = (16,)
    with pytest.raises(UserError, match=rf"\.pth: {field} is .* in the checkpoint and .* here"):
        apply_architecture(config, checkpoint, {field})


def test_given_image_size_holds_where_it_fits_the_tensors():
    """The released layout tells only on which level there is attention: 64 with attention at 32 has these, too."""
    checkpoint, config = published_checkpoint("cifar32_3.4M"), get_default_config()
    config.model.nf, config.model.num_res_blocks, config.model.ch_mult = 64, 1, (1, 1, 2)
    config.data.image_size, config.model.attn_resolutions = 64, (32,)
    given = {"data.image_size", "model.attn_resolutions"}
    assert apply_architecture(config, checkpoint, given).data.image_size == 64
    config.model.attn_resolutions = (16,)
    with pytest.raises(UserError, match="data.image_size is 32 in the checkpoint and 64 here"):
        apply_architecture(config, checkpoint, given)
    assert apply_architecture(config, checkpoint, set()).data.image_size == 32


def test_unpublished_architecture_is_asked_for_with_the_first_difference():
    with pytest.raises(UserError, match=r"ncsnpp_cifar\.pth holds no config and .* set config\.model and config\.data\."
                                        r"image_size .*\(with the present values .* there and .* here\)"):
        load_model(path_of("ncsnpp_cifar"))


def test_config_takes_the_checkpoints_architecture_and_keeps_the_rest(ours):
    config = get_default_config()
    config.training.batch_size = 5
    result = apply_architecture(config, read_checkpoint(ours), {"training.batch_size", "model.dropout"})
    assert (result.model.nf, result.model.ch_mult, result.data.image_size) == (8, (1, 2), 8)
    assert (result.training.batch_size, result.model.dropout, config.model.nf) == (5, 0.15, 128)
    assert create_model(result).config_fields == read_checkpoint(ours)["fields"]


def test_released_file_takes_from_the_config_what_it_does_not_tell():
    """Size and attention of a config that fits the checkpoint, and options that leave no trace in its tensors."""
    name = "ncsnpp_elu_fourier_scaled"
    config = config_of(**fields_of(name))
    config, net, digest = load_with_config(path_of(name), config, frozenset(), use_ema=False)
    assert digest == file_digest(path_of(name))
    x, t999, label, recorded = inputs_of(name)
    with torch.no_grad():
        assert (net(x, t999, label) - torch.from_numpy(recorded["v_model"])).abs().max() < 1e-4
    assert (config.model.nf, config.model.embedding_type, config.data.image_size) == (8, "fourier", 16)


def test_loading_into_another_network_names_the_fields(ours):
    net = create_from_fields(TINY | {"model.nf": 16})
    with pytest.raises(UserError, match="ours.pth belongs to another network: model.nf is 8 in .* and 16 here"):
        load_weights(net, read_checkpoint(ours), True)


def test_matching_load_of_another_width_reports_every_tensor_by_name(ours):
    """flow.pre_train_model may differ in width: what fits is copied, what does not is left and named."""
    source = load_model(ours, use_ema=False).state_dict()
    net = create_from_fields(TINY | {"model.ch_mult": (1, 3)})
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    matched, unmatched = load_matching(net, ours)
    assert sorted(matched + unmatched) == sorted(before) and matched and unmatched
    after = net.state_dict()
    assert all(torch.equal(after[name], source[name]) for name in matched)
    assert all(torch.equal(after[name], before[name]) for name in unmatched)
    assert "input_conv.weight" in matched and "middle.block0.conv0.weight" in unmatched


def test_matching_load_takes_raw_weights_of_a_released_file():
    net = create_from_fields(fields_of("ncsnpp_cifar"))
    matched, unmatched = load_matching(net, path_of("ncsnpp_cifar"))
    assert not unmatched and len(matched) == len(net.state_dict())
    raw = load_model(path_of("ncsnpp_cifar"), use_ema=False, fields=fields_of("ncsnpp_cifar"))
    assert same_weights(net.parameters(), raw.parameters())


# hf://


def fill_cache(monkeypatch, folder, **files):
    """Make a Hugging Face cache of the files {stem: path} of hf://someone/SlimFlow, and no network."""
    repository, revision = folder / "models--someone--SlimFlow", "0123456789abcdef0123456789abcdef01234567"
    (repository / "snapshots" / revision / "models").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(revision)
    for stem, path in files.items():
        (repository / "snapshots" / revision / f"models/{stem}{path.suffix}").write_bytes(path.read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, ours, data_folder):
    fill_cache(monkeypatch, tmp_path / "hub", ours=ours, edm=data_folder / "edm/edm_ddpmpp_cond.pkl")


def test_a_snapshot_of_edm_is_read_from_the_hub_too(hub_cache):
    net = load_model("hf://someone/SlimFlow/models/edm.pkl")
    assert net.config_fields["model.preconditioning"] == "edm" and net.config_fields["data.num_classes"] == 10


@pytest.mark.parametrize("path", ["hf://someone", "hf://someone/repo", "hf://someone/repo/"])
def test_incomplete_hub_path_is_reported(path):
    with pytest.raises(UserError, match="must be hf://owner/repo/file"):
        load_model(path)


@pytest.mark.parametrize("offline", [True, False])
def test_hub_without_network_is_one_sentence_at_once_and_its_cache_is_used(hub_cache, monkeypatch, ours, offline):
    """hf://owner/repo/file stands for a checkpoint's path. The library alone would retry for half a minute."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    net = load_model("hf://someone/SlimFlow/models/ours.pth")
    assert same_weights(net.parameters(), load_model(ours).parameters())
    with pytest.raises(UserError, match="hf://someone/SlimFlow/absent.pth could not be fetched"):
        load_model("hf://someone/SlimFlow/absent.pth")


def test_a_server_that_never_completes_an_answer_is_given_up_for_the_cache(hub_cache, monkeypatch):
    """Each byte restarts a socket's timeout, and the library would ask again, several times."""
    given_up = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        def answer():
            with server.accept()[0] as connection:
                while not given_up.wait(0.05):
                    connection.send(b"H")

        answering = threading.Thread(target=answer, daemon=True)
        answering.start()
        monkeypatch.setattr("models.checkpoint.PATIENCE", 0.5)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(UserError, match="absent.pth could not.*http://127.*does not answer, and the cache"):
            load_model("hf://someone/SlimFlow/absent.pth")
        given_up.set()
        answering.join()
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody else has asked
            server.accept()


def test_a_hub_file_as_long_as_a_part_is_whole_or_found_to_be_cut(hub_cache, tmp_path, monkeypatch, ours):
    monkeypatch.setattr("models.checkpoint.PART_BYTES", ours.stat().st_size)
    assert load_model("hf://someone/SlimFlow/models/ours.pth").config_fields == load_model(ours).config_fields
    (tmp_path / "cut.pth").write_bytes(ours.read_bytes()[:1000])
    fill_cache(monkeypatch, tmp_path / "other", cut=tmp_path / "cut.pth")
    monkeypatch.setattr("models.checkpoint.PART_BYTES", 1000)
    with pytest.raises(UserError, match="cut.pth cannot be read as a checkpoint; it is cut short"):
        load_model("hf://someone/SlimFlow/models/cut.pth")


def test_missing_hub_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        load_model("hf://someone/SlimFlow/ours.pth")


def taken(own, run, *given):
    """Return (remarks, which of the fields of `RUN` are the run's now, config) for a config and that of a run."""
    config, run = config_of(**own), config_of(**run)
    remarks = take_run_fields(config, json.loads(json.dumps(config_to_dict(run))), frozenset(given), "c.pth")
    return remarks, {name for name in RUN if get_field(config, name) == get_field(run, name)}, config


RUN = {"data.dataset": "custom", "data.data_root": "/own", "flow.eps": 0.1, "sampling.init_noise_scale": 2.0}


def test_data_set_eps_and_noise_scale_are_the_runs_and_the_config_files_are_named():
    remarks, own, config = taken({"data.cache_dir": "/here"}, RUN | {"sampling.train_subset": "random_9"})
    assert own == RUN.keys() and config.sampling.train_subset == "random_9"
    assert len(remarks) == 1
    assert "data.dataset 'custom' (not 'CIFAR10')" in remarks[0] and "flow.eps 0.1 (not 0.001)" in remarks[0]
    assert taken(RUN, RUN)[:2] == ([], own)


@pytest.mark.parametrize("field, value, others, remark", [
    ("flow.eps", 0.01, {"data.data_root"}, "trained with flow.eps 0.1, but 0.01 of the command line is used"),
    ("data.data_root", "/moved", {"flow.eps"}, "'/moved' of the command"),
    # another data set is not looked for in the run's folder
    ("data.dataset", "digits", {"flow.eps"}, "trained with data.dataset 'custom', but 'digits' of the command line"),
])
def test_the_command_line_wins_and_is_said_to_contradict(field, value, others, remark):
    remarks, own, config = taken({field: value}, RUN, field)
    kept = set() if field == "data.dataset" else {"data.dataset"}
    assert own == others | kept | {"sampling.init_noise_scale"} and any(remark in said for said in remarks)
    assert field != "data.dataset" or config.data.data_root == ""


def test_where_this_machine_keeps_a_usual_data_set_is_the_configs_matter():
    own = {"data.data_root": "/disk/cifar", "data.cache_dir": "/disk/cache", "data.on_device": "false"}
    remarks, _, config = taken(own, {"data.cache_dir": "/theirs"})
    assert remarks == [] and (config.data.data_root, config.data.cache_dir) == ("/disk/cifar", "/disk/cache")


def test_a_config_without_the_groups_changes_nothing_and_a_damaged_one_is_named():
    config = get_default_config()
    assert take_run_fields(config, {}, frozenset(), "released.pth") == [] and config == get_default_config()
    with pytest.raises(UserError, match=r"c\.pth: config\.flow\.eps must be a number, not 'x'"):
        take_run_fields(config, {"flow": {"eps": "x"}}, frozenset(), "c.pth")
