"""The released SlimFlow checkpoints: their architectures, and their names, order and shapes translated to and fro.

NCSN++ was released as a numbered list (`module.all_modules.7.Conv_0.weight`), DhariwalUNet with a name per
resolution (`enc.16x16_block0.conv0.weight`). `released_tensors(net)` states, tensor by tensor and in the released
order, which tensor of ours it is. Everything else follows from that list.
"""

import dataclasses

import torch

from models import layers
from models.create import create_from_fields
from models.dhariwal_unet import head_count
from models.ncsnpp import AttentionBlock, OutputHead, ResidualBlock
from runtime.errors import UserError

PREFIX = "module."  # the released NCSN++ was saved from inside DataParallel
BOX_FILTER = "resample_filter"  # constant buffers of the released DhariwalUNet: the 2×2 mean

def _row(parameters, image_size, nf, num_res_blocks, ch_mult, **others):
    fields = {"data.image_size": image_size, "model.nf": nf, "model.num_res_blocks": num_res_blocks,
              "model.ch_mult": ch_mult}
    return parameters, fields | others


_IMAGENET = {"model.name": "DhariwalUNet", "data.num_classes": 1000, "model.attn_resolutions": (32, 16)}
# Every published network: (number of parameters, config fields); those that are missing have their defaults.
PUBLISHED = {
    "CIFAR32 61.8M": _row(61_804_419, 32, 128, 4, (1, 2, 2, 2)),
    "CIFAR32 27.9M": _row(27_906_179, 32, 128, 2, (1, 2, 2)),
    "CIFAR32 15.7M": _row(15_707_235, 32, 96, 2, (1, 2, 2)),
    "CIFAR32 7.0M": _row(6_989_891, 32, 64, 2, (1, 2, 2)),
    "CIFAR32 3.4M": _row(3_437_123, 32, 64, 1, (1, 1, 2)),
    "FFHQ64 27.9M": _row(27_906_179, 64, 128, 2, (1, 2, 2)),
    "FFHQ64 15.7M": _row(15_707_235, 64, 96, 2, (1, 2, 2)),
    "FFHQ64 7.0M": _row(6_989_891, 64, 64, 2, (1, 2, 2)),
    "FFHQ64 3.4M": _row(3_536_195, 64, 64, 1, (1, 1, 2)),
    "ImageNet64 80.7M": _row(80_685_315, 64, 128, 2, (1, 2, 2, 4), **_IMAGENET),
    "ImageNet64 44.7M": _row(44_685_827, 64, 128, 2, (1, 2, 2, 2), **_IMAGENET),
}


def is_released(state):
    """Return whether a state dict, without prefixes, has the names of the released layout."""
    return any(name.startswith(("all_modules.", "map_layer0.")) for name in state)


def published_fields(state):
    """Return the dotted config fields of the published network whose released tensors a state dict has, or None.

    The image size is among them: no two published networks have the same names and shapes.
    """
    shapes = {name: tensor.shape for name, tensor in state.items()}
    count = sum(shape.numel() for name, shape in shapes.items() if name != "sigmas" and BOX_FILTER not in name)
    for parameters, fields in PUBLISHED.values():
        if parameters != count:  # building a network takes longer
            continue
        with torch.device("meta"):
            net = create_from_fields(fields)
        if {name: tensor.shape for name, tensor in released_state(net).items()} == shapes:
            return net.config_fields
    return None


def released_state(net):
    """Return {released name without prefix: tensor} of a network, in the released order."""
    ours = net.state_dict()
    return {r.name: r.write(ours) for r in released_tensors(net)}


def interleave(rows):
    """Reorder the rows of an attention projection from ours, (q, k, v) then head then channel, to DhariwalUNet's.

    Released: head, then channel, then (q, k, v).
    """
    heads = head_count(rows.shape[0] // 3)
    return rows.reshape(3, heads, -1, *rows.shape[1:]).movedim(0, 2).reshape(rows.shape)


def deinterleave(rows):
    """Undo `interleave`."""
    heads = head_count(rows.shape[0] // 3)
    return rows.reshape(heads, -1, 3, *rows.shape[1:]).movedim(2, 0).reshape(rows.shape)


def _add_pixel(matrix):
    return matrix[:, :, None, None]


def _drop_pixel(weight):
    return weight[:, :, 0, 0]


# Changes of a tensor: (from ours to the released one, back).
INTERLEAVED = (interleave, deinterleave)
TRANSPOSED = (torch.t, torch.t)
CONVOLUTION = (_add_pixel, _drop_pixel)  # a matrix here, a 1×1 convolution there
MATRIX = (_drop_pixel, _add_pixel)


@dataclasses.dataclass(frozen=True)
class Released:
    """One tensor of the released layout: part `part` of `parts` equal blocks of rows of our tensor `ours`."""

    name: str  # without PREFIX
    ours: str  # "" for a constant that we do not keep
    part: int = 0
    parts: int = 1
    changes: tuple = ()  # what makes the released tensor of ours, one after the other
    trained: bool = True  # whether the released optimiser gives it gradients and the EMA follows it
    parameter: bool = True  # whether the released optimiser lists it

    def write(self, ours):
        """Return the released tensor, made of {our name: tensor}."""
        if not self.ours:
            return torch.full((1, 1, 2, 2), 0.25)
        tensor = ours[self.ours].chunk(self.parts)[self.part]
        for change, _ in self.changes:
            tensor = change(tensor)
        return tensor.contiguous()

    def read(self, theirs):
        """Return our part of our tensor, made of {released name: tensor}."""
        tensor = theirs[self.name]
        for _, undo in reversed(self.changes):
            tensor = undo(tensor)
        return tensor


def _join(theirs, table):
    """Return {our name: tensor} of {released name: tensor}, for those of ours whose every part is there."""
    parts = {}
    for r in table:
        if r.ours and r.name in theirs:
            parts.setdefault(r.ours, []).append(r.read(theirs))
    return {ours: torch.cat(rows) if len(rows) > 1 else rows[0].contiguous() for ours, rows in parts.items()}


def _split(ours, table):
    """Return {released name: tensor} of {our name: tensor}, in the released order."""
    return {r.name: r.write(ours) for r in table if r.ours in ours}


def from_released(checkpoint, net):
    """Return a checkpoint of the released layout in ours, as `net` reads it: weights, EMA and Adam's moments.

    Raises ValueError, LookupError, TypeError, AttributeError or RuntimeError if these do not belong to `net`.
    """
    return _translate(checkpoint, released_tensors(net), _join, _released_order(net), _our_order(net))


def to_released(checkpoint, net):
    """Return a checkpoint of `net` in the released layout: weights, EMA and Adam's moments."""
    table = released_tensors(net)
    translated = _translate(checkpoint, table, _split, _our_order(net), _released_order(net))
    prefix = PREFIX if net.config_fields["model.name"] == "ncsnpp" else ""
    translated["model"] = {prefix + r.name: r.write(checkpoint["model"]) for r in table}
    return translated


def _released_order(net):
    """Return (names of the parameters in the order of the optimiser, names of those that the EMA follows)."""
    table = released_tensors(net)
    return [r.name for r in table if r.parameter], [r.name for r in table if r.trained]


def _our_order(net):
    parameters = list(net.named_parameters())
    return [name for name, _ in parameters], [name for name, p in parameters if p.requires_grad]


def _translate(checkpoint, table, translate, source, target):
    """Translate every tensor of a checkpoint from the order of `source` to that of `target`."""
    result = dict(checkpoint, model=translate(checkpoint["model"], table))
    if "ema" in checkpoint:
        shadow = checkpoint["ema"]["shadow_params"]
        if len(shadow) != len(source[1]):
            raise ValueError(f"the EMA has {len(shadow)} tensors there and {len(source[1])} here")
        shadow = translate(dict(zip(source[1], shadow, strict=True)), table)
        result["ema"] = dict(checkpoint["ema"], shadow_params=[shadow[name] for name in target[1]])
    if "optimizer" in checkpoint:
        result["optimizer"] = _translate_optimizer(checkpoint["optimizer"], table, translate, source[0], target[0])
    return result


def _translate_optimizer(optimizer, table, translate, source, target):
    """Translate the state of an optimiser with one parameter group, Adam's for instance."""
    states = {source[i]: state for i, state in optimizer["state"].items()}
    translated = {name: {} for name in target}
    for kind in dict.fromkeys(kind for state in states.values() for kind in state):
        values = {name: torch.as_tensor(state[kind]) for name, state in states.items() if kind in state}
        if all(value.dim() == 0 for value in values.values()):  # a count of steps: shared by parts and whole
            for r in table:
                there, name = (r.name, r.ours) if r.name in values else (r.ours, r.name)
                if there in values:
                    translated[name][kind] = values[there].clone()
        else:
            for name, value in translate(values, table).items():
                translated[name][kind] = value
    group = dict(optimizer["param_groups"][0], params=list(range(len(target))))
    state = {i: translated[name] for i, name in enumerate(target) if translated[name]}
    return {"state": state, "param_groups": [group]}


# The released layout of each network.


def released_tensors(net):
    """Return the released layout of a network, a list of `Released` in the released order.

    Raises UserError for a network of a kind that was never released.
    """
    fields, names = net.config_fields, {module: name for name, module in net.named_modules()}
    layouts = {"ncsnpp": _ncsnpp_tensors, "DhariwalUNet": _dhariwal_tensors}
    if (fields["model.name"] not in layouts or fields["model.preconditioning"] != "none"
            or (fields["model.name"] == "ncsnpp" and fields["data.num_classes"])):
        raise UserError("only ncsnpp without classes and DhariwalUNet, neither with model.preconditioning, have a "
                        "released layout")
    return list(layouts[fields["model.name"]](net, names))


def _plain(name, ours, changes=()):
    """Yield weight and bias of a layer that both sides have."""
    yield Released(f"{name}.weight", f"{ours}.weight", changes=changes)
    yield Released(f"{name}.bias", f"{ours}.bias")


def _nin(name, ours, changes, part=0, parts=1):
    """Yield W and b of a released "NIN", a matrix that is multiplied from the right."""
    yield Released(f"{name}.W", f"{ours}.weight", part, parts, changes)
    yield Released(f"{name}.b", f"{ours}.bias", part, parts)


def _ncsnpp_tensors(net, names):
    yield Released("sigmas", "sigmas", trained=False, parameter=False)
    nin_shortcut = net.config_fields["model.resblock_type"] == "ddpm"
    for number, module in enumerate(_ncsnpp_modules(net)):
        yield from _ncsnpp_module(f"all_modules.{number}", module, names[module], nin_shortcut)


def _ncsnpp_modules(net):
    """Yield the modules that the released list numbers, in its order; those without tensors count, too."""
    if net.fourier:
        yield net.time_features
    if net.time_embedding is not None:
        yield from (net.time_embedding.linear0, net.time_embedding.linear1)
    yield net.input_conv
    for level in net.encoder:
        for block, attention in zip(level.blocks, level.attentions, strict=True):
            yield block
            if isinstance(attention, AttentionBlock):
                yield attention
        if level.down is not None:
            yield level.down
        if level.pyramid is not None:
            yield level.pyramid.conv if hasattr(level.pyramid, "conv") else level.pyramid.down
    yield from (net.middle.block0, net.middle.attention, net.middle.block1)
    for level in net.decoder:
        yield from level.blocks
        if isinstance(level.attention, AttentionBlock):
            yield level.attention
        if level.pyramid is not None:
            yield from _head_or_up(level.pyramid)
        if level.up is not None:
            yield level.up
    if net.output_head is not None:
        yield from (net.output_head.norm, net.output_head.conv)


def _head_or_up(pyramid):
    head = getattr(pyramid, "head", None)
    return (head.norm, head.conv) if isinstance(head, OutputHead) else (pyramid.up,)


def _ncsnpp_module(name, module, ours, nin_shortcut):
    """Yield the tensors of one numbered module of the released NCSN++; `ours` is its name here."""
    if isinstance(module, ResidualBlock):
        yield from _plain(f"{name}.GroupNorm_0", f"{ours}.norm0")
        yield from _plain(f"{name}.Conv_0", f"{ours}.conv0")
        yield from _plain(f"{name}.Dense_0", f"{ours}.time")
        yield from _plain(f"{name}.GroupNorm_1", f"{ours}.norm1")
        yield from _plain(f"{name}.Conv_1", f"{ours}.conv1")
        if module.shortcut is not None and nin_shortcut:
            yield from _nin(f"{name}.NIN_0", f"{ours}.shortcut", (MATRIX, TRANSPOSED))
        elif module.shortcut is not None:
            yield from _plain(f"{name}.Conv_2", f"{ours}.shortcut")
    elif isinstance(module, AttentionBlock):
        yield from _plain(f"{name}.GroupNorm_0", f"{ours}.attention.norm")
        for part in range(3):
            yield from _nin(f"{name}.NIN_{part}", f"{ours}.attention.qkv", (TRANSPOSED,), part, 3)
        yield from _nin(f"{name}.NIN_3", f"{ours}.attention.proj", (TRANSPOSED,))
    elif isinstance(module, layers.FIRConvUpsample | layers.FIRConvDownsample):
        yield from _plain(f"{name}.Conv2d_0", f"{ours}.conv")
    elif isinstance(module, layers.ConvUpsample | layers.ConvDownsample):
        yield from _plain(f"{name}.Conv_0", f"{ours}.conv")
    elif ours.endswith("pyramid.conv"):  # the 1×1 convolution of the progressive input
        yield from _plain(f"{name}.Conv_0", ours)
    elif ours == "time_features":
        yield Released(f"{name}.W", "time_features.frequencies", trained=False)
    elif isinstance(module, torch.nn.Linear | torch.nn.Conv2d | layers.GroupNorm):
        yield from _plain(name, ours)


def _dhariwal_tensors(net, names):
    size = net.config_fields["data.image_size"]
    yield from _plain("map_layer0", "embedding.linear0")
    yield from _plain("map_layer1", "embedding.linear1")
    if net.embedding.label is not None:
        yield Released("map_label.weight", "embedding.label.weight")
    for i, level in enumerate(net.encoder):
        resolution = f"enc.{size >> i}x{size >> i}"
        if level.resample is None:
            yield from _plain(f"{resolution}_conv", "input_conv")
        else:
            yield from _dhariwal_block(f"{resolution}_down", level.resample, names)
        for k, block in enumerate(level.blocks):
            yield from _dhariwal_block(f"{resolution}_block{k}", block, names)
    for i, level in zip(reversed(range(len(net.encoder))), net.decoder, strict=True):
        resolution = f"dec.{size >> i}x{size >> i}"
        if level.resample is None:
            for k, block in enumerate(net.middle):
                yield from _dhariwal_block(f"{resolution}_in{k}", block, names)
        else:
            yield from _dhariwal_block(f"{resolution}_up", level.resample, names)
        for k, block in enumerate(level.blocks):
            yield from _dhariwal_block(f"{resolution}_block{k}", block, names)
    yield from _plain("out_norm", "output_norm")
    yield from _plain("out_conv", "output_conv")


def _dhariwal_block(name, block, names):
    """Yield the tensors of one block of the released DhariwalUNet."""
    ours = names[block]
    yield from _plain(f"{name}.norm0", f"{ours}.norm0")
    yield from _plain(f"{name}.conv0", f"{ours}.conv0")
    if block.resample is not None:
        yield Released(f"{name}.conv0.{BOX_FILTER}", "", trained=False, parameter=False)
    yield from _plain(f"{name}.affine", f"{ours}.affine")
    yield from _plain(f"{name}.norm1", f"{ours}.norm1")
    yield from _plain(f"{name}.conv1", f"{ours}.conv1")
    if block.shortcut is not None:
        yield from _plain(f"{name}.skip", f"{ours}.shortcut")
    elif block.resample is not None:
        yield Released(f"{name}.skip.{BOX_FILTER}", "", trained=False, parameter=False)
    if block.attention is not None:
        yield from _plain(f"{name}.norm2", f"{ours}.attention.norm")
        yield Released(f"{name}.qkv.weight", f"{ours}.attention.qkv.weight", changes=(INTERLEAVED, CONVOLUTION))
        yield Released(f"{name}.qkv.bias", f"{ours}.attention.qkv.bias", changes=(INTERLEAVED,))
        yield from _plain(f"{name}.proj", f"{ours}.attention.proj", (CONVOLUTION,))
