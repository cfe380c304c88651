"""Exactness: the released checkpoints give the recorded velocities, and the translation loses nothing."""

import pytest
import torch

from models.checkpoint import in_our_layout, load_model, read_checkpoint
from models.create import create_from_fields
from models.edm import deinterleave, interleave
from models.released import from_released, published_fields, released_tensors, to_released
from models.safe_load import read_file
from tests.helpers import same
from tests.models.released_numbers import (
    LAYOUTS,
    NAMES,
    WITH_EMA,
    fields_of,
    inputs_of,
    layout_fields,
    layout_state,
    path_of,
)


@pytest.mark.parametrize(("name", "use_ema"),
                         [*((name, False) for name in NAMES), *((name, True) for name in WITH_EMA)])
@torch.no_grad()
def test_raw_and_averaged_weights_give_the_recorded_velocity(name, use_ema):
    x, t999, label, recorded = inputs_of(name)
    net = load_model(path_of(name), use_ema=use_ema, fields=fields_of(name))
    expected = torch.from_numpy(recorded["v_ema" if use_ema else "v_model"])
    assert (net(x, t999, label) - expected).abs().max() < 1e-4
    if use_ema:  # the recorded velocities are close: it is not the raw weights that were loaded
        assert not same(load_model(path_of(name), use_ema=False, fields=fields_of(name)).state_dict(), net.state_dict())


def plain(state):
    """Return a released state dict as `read_checkpoint` hands it on, without DataParallel's prefix."""
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_architecture_is_told_by_its_tensors_and_no_other(name):
    """Every published checkpoint needs no flags: also the image size follows from names and shapes."""
    with torch.device("meta"):
        expected = create_from_fields(layout_fields(name)).config_fields
    state = plain(layout_state(name))
    assert published_fields(state) == expected
    state.popitem()
    assert published_fields(state) is None


@pytest.mark.parametrize("name", LAYOUTS)
def test_configuration_of_the_paper_has_the_released_layout(name):
    with torch.device("meta"):
        net = create_from_fields(layout_fields(name))
    ours = net.state_dict()
    table = released_tensors(net)
    prefix = "module." if net.config_fields["model.name"] == "ncsnpp" else ""
    written = [[prefix + r.name, list(r.write(ours).shape), str(r.write(ours).dtype)] for r in table]
    assert written == LAYOUTS[name]["state_dict"]
    assert sum(p.numel() for p in net.parameters()) == LAYOUTS[name]["parameters"]
    assert [prefix + r.name for r in table if not r.parameter] == LAYOUTS[name]["buffers"]


@pytest.mark.parametrize("name", NAMES)
def test_translating_there_and_back_changes_no_bit(name):
    """Weights, averages and, where recorded, Adam's moments, steps and settings return in the released order."""
    checkpoint = read_file(path_of(name))[0]
    net = create_from_fields(fields_of(name))
    ours = from_released(checkpoint | {"model": plain(checkpoint["model"])}, net)
    assert list(ours["model"]) != list(checkpoint["model"])
    assert same(to_released(ours, net), checkpoint)


@pytest.mark.parametrize("name", ["ncsnpp_cifar", "ncsnpp_fourier_fir_residual"])
def test_translated_optimizer_state_belongs_to_our_parameters(name):
    """Adam takes the translated state up, and each moment has the shape of its parameter."""
    net = create_from_fields(fields_of(name))
    checkpoint = in_our_layout(read_checkpoint(path_of(name)), net)
    net.load_state_dict(checkpoint["model"])
    optimizer = torch.optim.Adam(net.parameters())
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert len(optimizer.state) == len(list(net.parameters()))
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape
        assert state["step"] == 2
    assert optimizer.param_groups[0]["lr"] == pytest.approx(8e-8)


def test_interleaved_projection_follows_the_released_formula():
    """DhariwalUNet's rows are head, channel, (q, k, v): attention from them by the formula equals ours.

    The recorded networks are too narrow for attention, so this is the check of that order.
    """
    torch.manual_seed(0)
    fields = {"model.name": "DhariwalUNet", "model.nf": 128, "model.ch_mult": (1,), "model.num_res_blocks": 1,
              "data.image_size": 4, "model.attn_resolutions": (4,)}
    attention = create_from_fields(fields).encoder[0].blocks[0].attention.eval()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 128, 4, 4)
    weight, bias = interleave(attention.qkv.weight), interleave(attention.qkv.bias)
    projected = (attention.norm(x).flatten(2).transpose(1, 2) @ weight.t() + bias).transpose(1, 2)
    q, k, v = projected.reshape(2 * 2, 64, 3, 16).unbind(2)
    attend = torch.einsum("ncq,nck->nqk", q, k / 8).softmax(dim=2)
    mixed = torch.einsum("nqk,nck->ncq", attend, v).reshape(2, 128, 16)
    expected = attention.proj(mixed.transpose(1, 2)).transpose(1, 2).reshape(2, 128, 4, 4)
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(deinterleave(weight), attention.qkv.weight)
