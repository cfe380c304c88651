"""The architecture told from released tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.checkpoint import complete_fields, load_safely
from models.create import create_from_fields
from models.infer import ATTENTION_LEVELS, released_fields
from models.released import released_tensors
from runtime.errors import UserError
from tests.models.released_numbers import LAYOUTS, NAMES, fields_of, layout_fields, layout_state, path_of

# What a state dict cannot show: it changes no tensor.
INVISIBLE = {"model.nonlinearity", "model.scale_by_sigma"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_configuration_is_told_completely(name):
    """Network, widths, depth, attention, channels, classes and image size of every published checkpoint."""
    told = complete_fields(released_fields(layout_state(name), name), {}, name)
    with torch.device("meta"):
        expected = create_from_fields(layout_fields(name)).config_fields
        assert create_from_fields(told).config_fields == expected


@pytest.mark.parametrize("name", NAMES)
def test_every_visible_option_is_told(name):
    """Options of the recorded networks, the image size given."""
    fields = fields_of(name)
    told = released_fields(load_safely(path_of(name))["model"], name)
    told = complete_fields(told, {"data.image_size": 16}, name)
    narrow = {"model.attn_resolutions"} if name.startswith("dhariwal") else set()
    assert {k: v for k, v in fields.items() if told.get(k) != v}.keys() <= INVISIBLE | narrow


PYRAMIDS = [("none", "none", "sum"), ("output_skip", "input_skip", "cat"), ("residual", "residual", "sum"),
            ("residual", "input_skip", "sum"), ("output_skip", "residual", "sum")]


@settings(max_examples=12, deadline=None)
@given(mult=st.lists(st.integers(1, 3), min_size=1, max_size=4), blocks=st.integers(1, 3),
       pyramid=st.sampled_from(PYRAMIDS), kind=st.sampled_from(["biggan", "ddpm"]), with_conv=st.booleans(),
       fir=st.booleans(), attended=st.sets(st.integers(0, 3)))
def test_random_architecture_is_told(mult, blocks, pyramid, kind, with_conv, fir, attended):
    """What is told rebuilds a network with the same tensors, whatever the options were."""
    progressive, progressive_input, combine = pyramid if len(mult) > 1 else PYRAMIDS[0]
    fields = {"model.nf": 8, "model.ch_mult": mult, "model.num_res_blocks": blocks, "data.image_size": 32,
              "model.attn_resolutions": [32 >> level for level in attended if level < len(mult)],
              "model.resblock_type": kind, "model.resamp_with_conv": with_conv, "model.fir": fir,
              "model.progressive": progressive, "model.progressive_input": progressive_input,
              "model.progressive_combine": combine}
    state = released_state(fields)
    told = complete_fields(released_fields(state, "file"), {"data.image_size": 32}, "file")
    assert [told["model.ch_mult"], told["model.num_res_blocks"]] == [mult, blocks]
    assert {k: v.shape for k, v in released_state(told).items()} == {k: v.shape for k, v in state.items()}


def released_state(fields):
    with torch.device("meta"):
        net = create_from_fields(fields)
    ours = net.state_dict()
    return {r.name: r.write(ours) for r in released_tensors(net)}


@pytest.mark.parametrize("chosen, size", [({}, 32), ({"data.image_size": 64}, 64),
                                          ({"model.attn_resolutions": [8]}, 16)])
def test_image_size_follows_what_is_given_and_else_the_published_attention(chosen, size):
    """NCSN++ tells only at which level it attends: 16×16 is there unless somebody says otherwise."""
    told = released_fields(layout_state("cifar32_3.4M"), "file")
    assert told[ATTENTION_LEVELS] == [1]
    told = complete_fields(told, chosen, "file")
    assert (told["data.image_size"], told["model.attn_resolutions"]) == (size, [size // 2])


def test_image_size_is_asked_for_when_nothing_tells_it():
    """Without attention in a level a released NCSN++ could have any size."""
    state = released_state({"model.nf": 8, "model.ch_mult": (1, 2), "model.attn_resolutions": ()})
    with pytest.raises(UserError, match="file does not tell its image size; give it with data.image_size"):
        complete_fields(released_fields(state, "file"), {}, "file")


@pytest.mark.parametrize("layout", ["cifar32_3.4M", "imagenet64_44.7M"])
@pytest.mark.parametrize("place", [0, 1, 5, 40, -1])
def test_missing_tensor_is_reported_with_the_file(layout, place):
    """A state dict with a hole is no network of ours; it must not end in a traceback."""
    state = layout_state(layout)
    del state[list(state)[place]]
    with pytest.raises(UserError, match="some.pth"):
        released_fields(state, "some.pth")


def test_names_without_the_parallel_prefix_are_understood():
    """A checkpoint saved outside DataParallel tells the same."""
    state = layout_state("cifar32_3.4M")
    bare = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    assert released_fields(bare, "file") == released_fields(state, "file")
