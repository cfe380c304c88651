"""The architecture of a released checkpoint, told from the names and shapes of its tensors.

What leaves no trace there (the activation, the rescaling of skips, dropout, a FIR filter without convolution) is left
out: it is the config's, or the default.
"""

import contextlib
import itertools

import torch

from models.create import create_from_fields
from models.dhariwal_unet import head_count
from models.released import PREFIX, released_tensors
from runtime.errors import UserError

ATTENTION_SIZE = 16  # every published NCSN++ attends at 16×16 and nowhere else
# Pseudo-field: the levels (0: full size) with attention. NCSN++ does not tell the image size, only these.
ATTENTION_LEVELS = "attention levels"
# A DhariwalUNet too narrow for an attention head does not tell where it would attend.
UNTOLD = {"model.attn_resolutions": []}


def is_released(state):
    """Whether a state dict has the names of the released layout, with or without DataParallel's prefix."""
    return any(bare(name).startswith(("all_modules.", "map_layer0.")) for name in state)


def bare(name):
    """Return a released name without DataParallel's prefix."""
    return name.removeprefix(PREFIX)


def with_usual_prefix(state):
    """Return a released state dict with the prefix that the released checkpoint of its network has."""
    prefix = PREFIX if any(bare(name).startswith("all_modules.") for name in state) else ""
    return {prefix + bare(name): tensor for name, tensor in state.items()}


def released_fields(state, path):
    """Return the dotted config fields that a released state dict tells.

    For NCSN++ `ATTENTION_LEVELS` stands in for `data.image_size` and `model.attn_resolutions`. Raises UserError
    that names `path` if no network has these tensors.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in with_usual_prefix(state).items()}
    candidates = ncsnpp_candidates if any(name.startswith(PREFIX) for name in shapes) else dhariwal_candidates
    difference = "too much is missing to tell which"
    with contextlib.suppress(LookupError, ValueError):  # a name or a number that every network has is missing
        for fields in candidates(shapes):
            try:
                expected = layout_shapes(with_image_size(fields))
            except UserError:  # this guess is no network
                continue
            if expected == shapes:
                return fields
            name = next(n for n in [*expected, *shapes] if expected.get(n) != shapes.get(n))
            difference = f"{name} is {shapes.get(name, 'missing')} instead of {expected.get(name, 'absent')}"
    raise UserError(f"{path} has the names of a released checkpoint, but is no complete network: {difference}")


def layout_shapes(fields):
    """Return {released name: shape} of the network of `fields`."""
    with torch.device("meta"):
        net = create_from_fields(fields)
    ours = net.state_dict()
    return {r.name: tuple(r.write(ours).shape) for r in released_tensors(net)}


def with_image_size(fields):
    """Return the fields of a checkpoint with any image size that the levels divide where it tells none."""
    if ATTENTION_LEVELS not in fields:
        return UNTOLD | fields
    return choose_image_size(fields, 2 ** (len(fields["model.ch_mult"]) + 2))


def choose_image_size(fields, size):
    """Return the fields of a released NCSN++ with `size` as the image size."""
    chosen = {name: value for name, value in fields.items() if name != ATTENTION_LEVELS}
    chosen["data.image_size"] = size
    chosen["model.attn_resolutions"] = [size >> level for level in fields[ATTENTION_LEVELS]]
    return chosen


def usual_image_size(fields):
    """Return the image size that puts the attention of a released NCSN++ at 16×16, or None."""
    levels = fields[ATTENTION_LEVELS]
    return ATTENTION_SIZE << levels[0] if len(levels) == 1 else None


# DhariwalUNet names its resolutions.


def dhariwal_candidates(shapes):
    """Yield the fields of a released DhariwalUNet."""
    encoder = [name.split(".")[1].split("_") for name in shapes if name.startswith("enc.")]
    sizes = sorted({int(size.split("x")[0]) for size, *_ in encoder}, reverse=True)
    blocks = len({part for _, part in encoder if part.startswith("block")})
    nf = shapes["map_layer0.weight"][1]
    fields = {
        "model.name": "DhariwalUNet",
        "model.nf": nf,
        "model.ch_mult": [shapes[f"enc.{s}x{s}_block0.conv0.weight"][0] // nf for s in sizes],
        "model.num_res_blocks": blocks,
        "data.image_size": sizes[0],
        "data.num_channels": shapes["out_conv.weight"][0],
        "data.num_classes": shapes["map_label.weight"][1] if "map_label.weight" in shapes else 0,
    }
    attended = [s for s in sizes if f"enc.{s}x{s}_block0.qkv.weight" in shapes]
    wide = any(head_count(nf * m) for m in fields["model.ch_mult"])
    yield fields | ({"model.attn_resolutions": attended} if wide else {})


# NCSN++ numbers its modules. Their kinds, and which widths the blocks have, tell the rest.


def ncsnpp_candidates(shapes):
    """Yield the fields of every NCSN++ that has as many modules of each kind as the state dict."""
    modules = numbered_modules(shapes)
    kinds = [kind(module) for module in modules]
    convolutions = [m for m, k in zip(modules, kinds, strict=True) if k == "conv"]
    nf, channels = convolutions[0]["weight"][:2]
    biggan = any("Conv_2.weight" in m for m in modules)
    fields = {
        "model.name": "ncsnpp",
        "model.nf": nf,
        "model.conditional": "linear" in kinds,
        "model.embedding_type": "fourier" if "fourier" in kinds else "positional",
        "model.resblock_type": "biggan" if biggan else "ddpm",
        "model.num_scales": shapes[PREFIX + "sigmas"][0],
        "data.num_channels": channels,
        "data.num_classes": 0,
    }
    if any("Conv2d_0.weight" in m for m in modules):
        fields["model.fir"] = True
    elif "resample" in kinds:
        fields["model.fir"] = False
    for levels, blocks in level_counts(kinds.count("block"), biggan):
        for options in pyramid_options(kinds, levels, biggan):
            yield fields | options | level_fields(modules, kinds, levels, blocks, biggan, nf)


def numbered_modules(shapes):
    """Return the released numbered modules, each {name inside it: shape}; those without tensors are empty."""
    modules = {}
    for name, shape in shapes.items():
        if name.startswith(PREFIX + "all_modules."):
            number, inner = name.removeprefix(PREFIX + "all_modules.").split(".", 1)
            modules.setdefault(int(number), {})[inner] = shape
    return [modules.get(number, {}) for number in range(max(modules) + 1)]


def kind(module):
    """Return what a numbered module is, told from the names inside it."""
    if "Conv_1.weight" in module:
        return "block"
    if "NIN_3.W" in module:
        return "attention"
    if "W" in module:
        return "fourier"
    if "weight" in module:
        return {1: "norm", 2: "linear", 4: "conv"}[len(module["weight"])]
    if module.get("Conv_0.weight", (0, 0, 3, 3))[2:] == (1, 1):
        return "combine"
    return "resample"


def level_counts(blocks, biggan):
    """Yield (levels L, blocks per level B) that make that many blocks.

    The encoder has L·B of them, the middle 2, the decoder L·(B + 1), and BigGAN resampling 2·(L - 1).
    """
    for levels in range(1, blocks):
        rest = blocks - 2 - levels - (2 * (levels - 1) if biggan else 0)
        if rest > 0 and rest % (2 * levels) == 0:
            yield levels, rest // (2 * levels)


def pyramid_options(kinds, levels, biggan):
    """Yield the progressive and resampling options that go with the counts of the other modules."""
    heads = {"none": 1, "output_skip": levels, "residual": 2}
    for progressive, inputs, with_conv in itertools.product(
        heads, ("none", "input_skip", "residual"), (True,) if biggan else (True, False)
    ):
        resamples = (inputs == "residual") + (progressive == "residual") + (0 if biggan else 2)
        combines = levels - 1 if inputs == "input_skip" else 0
        found = kinds.count("norm"), kinds.count("resample"), kinds.count("combine")
        if found != (heads[progressive], resamples * (levels - 1), combines):
            continue
        options = {"model.progressive": progressive, "model.progressive_input": inputs}
        if not biggan:
            options["model.resamp_with_conv"] = with_conv
        for combine in ("sum", "cat") if inputs == "input_skip" else ("sum",):
            yield options | {"model.progressive_combine": combine}


def level_fields(modules, kinds, levels, blocks, biggan, nf):
    """Return widths, block count and attention levels, read off the encoder's blocks in their order."""
    places = [i for i, k in enumerate(kinds) if k == "block"]
    stride = blocks + 1 if biggan else blocks  # blocks from one level to the next
    first = [places[level * stride] for level in range(levels)]
    return {
        "model.ch_mult": [modules[i]["Conv_0.weight"][0] // nf for i in first],
        "model.num_res_blocks": blocks,
        ATTENTION_LEVELS: [level for level, i in enumerate(first) if kinds[i + 1] == "attention"],
    }
