"""Rewriting a checkpoint in the other layout."""

import json

import pytest
import torch

from configs.command_line import parse_flags
from metrics.results import append_result
from models.checkpoint import load_matching, load_model, read_checkpoint, write_checkpoint
from models.create import create_from_fields
from models.safe_load import read_file
from runtime.files import file_digest
from runtime.run_folder import RESULTS, run_folder
from runtime.terminal import UserError
from tests.helpers import same
from tests.metrics.test_results import result
from tests.models.released_numbers import fields_of, inputs_of, path_of
from tests.models.test_checkpoint import fill_cache, tiny_checkpoint
from tools import convert


def main(*arguments):
    """Run the command with these arguments."""
    convert.main(parse_flags([str(word) for word in arguments], convert.FLAGS, positional=("source", "target")))


def config_file(folder, name):
    """Write a config file with the architecture of a recorded network; return its path."""
    lines = [f"    config.{field} = {value!r}" for field, value in fields_of(name).items()]
    path = folder / "my_config.py"
    path.write_text("\n".join(["from configs.default import get_default_config", "def get_config():",
                               "    config = get_default_config()", *lines, "    return config"]))
    return str(path)


@pytest.mark.parametrize("name", ["ncsnpp_cifar", "ncsnpp_fourier_fir_residual"])
def test_there_and_back_is_the_same_checkpoint(tmp_path, name, capsys):
    """Weights, averages, Adam's moments and step: nothing is lost in our layout. The config stays with the file."""
    ours, released = str(tmp_path / "ours.pth"), str(tmp_path / "released.pth")
    main(str(path_of(name)), ours, "--config", config_file(tmp_path, name))
    main(ours, released)
    assert capsys.readouterr().out.splitlines() == [f"{ours}: our layout", f"{released}: released layout"]
    expected, found = read_file(path_of(name))[0], read_file(released)[0]
    assert {key: found.pop(key) for key in ["config"]}["config"]["data"]["image_size"] == 16
    assert same(found, {key: expected[key] for key in found})
    assert set(found) == set(expected)


def test_converted_file_needs_no_flags(tmp_path):
    """In our layout, and in the released one with our config, the image size is inferred."""
    ours, released = tmp_path / "ours.pth", tmp_path / "released.pth"
    main(str(path_of("ncsnpp_cifar")), str(ours), "--config", config_file(tmp_path, "ncsnpp_cifar"))
    main(ours, released)
    x, t999, label, recorded = inputs_of("ncsnpp_cifar")
    for path in (ours, released):
        net = load_model(path)
        assert net.config_fields["data.image_size"] == fields_of("ncsnpp_cifar")["data.image_size"]
        with torch.no_grad():
            assert (net(x, t999, label) - torch.from_numpy(recorded["v_ema"])).abs().max() < 1e-4


def test_nothing_is_written_for_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "text.pth").write_text("text")
    with pytest.raises(UserError, match="text.pth cannot be read as a checkpoint"):
        main(tmp_path / "text.pth", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


@pytest.fixture
def ours(tmp_path):
    """A checkpoint of ours, in a run folder."""
    path = tmp_path / "run" / "checkpoints" / "checkpoint_1.pth"
    write_checkpoint(path, tiny_checkpoint()[1])
    return path


@pytest.mark.parametrize("name, arguments", [
    ("slim.pth", ["--slim"]), ("a.safetensors", []), ("b.safetensors", ["--slim"])])
def test_averaged_weights_alone_are_read_like_any_checkpoint(tmp_path, ours, name, arguments):
    """Without flags, with step and architecture; float32 to the last bit, float16 rounded; raw weights are refused."""
    target = tmp_path / name
    main(*arguments, ours, target)
    source, found = load_model(ours), load_model(target)
    assert found.config_fields == source.config_fields
    for ours_p, theirs in zip(source.parameters(), found.parameters(), strict=True):
        assert torch.equal(theirs, ours_p.half().float() if arguments else ours_p)
    assert target.stat().st_size < (0.35 if arguments else 0.5) * ours.stat().st_size
    read = read_checkpoint(target)
    assert (read["step"], read["source"]) == (7, file_digest(ours))
    net = create_from_fields(source.config_fields)
    assert load_matching(net, target)[1] == []
    with pytest.raises(UserError, match="holds only the averaged weights"):
        load_model(target, use_ema=False)


def test_a_slim_file_is_cut_into_parts_that_belong_together(tmp_path, ours, monkeypatch):
    monkeypatch.setattr(convert, "PART_BYTES", 20000)
    (tmp_path / "slim.pth.part9").write_text("of an earlier file")
    main(ours, tmp_path / "slim.pth", "--slim")
    parts = sorted(tmp_path.glob("slim.pth*"))
    assert len(parts) > 1 and all(part.stat().st_size <= 20000 for part in parts) and "part9" not in str(parts)
    assert torch.equal(next(load_model(parts[0]).parameters()), next(load_model(ours).parameters()).half().float())
    parts[-1].unlink()
    with pytest.raises(UserError, match="slim.pth cannot be read"):
        load_model(parts[0])


def test_weights_that_float16_cannot_hold_are_refused(tmp_path):
    checkpoint = tiny_checkpoint()[1]
    checkpoint["ema"]["shadow_params"][0].fill_(1e5)
    write_checkpoint(tmp_path / "ours.pth", checkpoint)
    with pytest.raises(UserError, match="ours.pth has weights that are not finite, or too large for float16"):
        main(tmp_path / "ours.pth", tmp_path / "slim.pth", "--slim")


def test_a_folder_for_hugging_face_has_the_model_its_config_and_a_card(tmp_path, ours):
    main(ours, tmp_path / "hub", "--hub")
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    model, card = tmp_path / "hub" / "model.safetensors", (tmp_path / "hub" / "README.md").read_text()
    assert file_digest(model) in card and file_digest(ours) in card and "3×8×8" in card and "Nothing yet" in card
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["model"]["nf"] == 8
    assert torch.equal(next(load_model(model).parameters()), next(load_model(ours).parameters()))


def test_the_card_quotes_the_results_of_this_checkpoint(tmp_path, ours):
    for changes in ({"digest": file_digest(ours), "fid": 4.5}, {"digest": "another", "fid": 9.5}):
        append_result(run_folder(ours) / RESULTS, result(**changes))
    main(ours, tmp_path / "hub", "--hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "- FID 4.5: 100 samples" in card and "FID 9.5" not in card and "Nothing yet" not in card


def test_the_folder_shared_on_hugging_face_is_read_back_by_its_address(tmp_path, ours, monkeypatch):
    """The command that the card shows: hf://OWNER/REPO/model.safetensors, here from the local cache."""
    main(ours, tmp_path / "hub", "--hub", "--slim")
    fill_cache(monkeypatch, tmp_path / "cache", model=tmp_path / "hub" / "model.safetensors")
    address, source = "hf://someone/SlimFlow/models/model.safetensors", load_model(ours)
    net = load_model(address)
    assert net.config_fields == source.config_fields and read_checkpoint(address)["step"] == 7
    assert all(torch.equal(a, b.half().float()) for a, b in zip(net.parameters(), source.parameters(), strict=True))


def test_nothing_to_write_is_one_sentence(ours):
    with pytest.raises(UserError, match="name a checkpoint and a file to write"):
        main(ours)
