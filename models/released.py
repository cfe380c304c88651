"""The layout of the released SlimFlow checkpoints: names, order and shapes, translated to our networks and back.

NCSN++ was released as a numbered list (`module.all_modules.7.Conv_0.weight`), DhariwalUNet with a name per
resolution (`enc.16x16_block0.conv0.weight`). `released_tensors(net)` states, tensor by tensor and in the released
order, which tensor of ours it is. Everything else follows from that list.
"""

import dataclasses

import torch

from models import layers
from models.dhariwal_unet import head_count
from models.ncsnpp import AttentionBlock, OutputHead, ResidualBlock
from runtime.errors import UserError

PREFIX = "module."  # the released NCSN++ was saved from inside DataParallel
BOX_FILTER = "resample_filter"  # constant buffers of the released DhariwalUNet: the 2×2 mean


@dataclasses.dataclass(frozen=True)
class Released:
    """One tensor of the released layout: part `part` of `parts` equal blocks of rows of our tensor `ours`."""

    name: str
    ours: str  # "" for a constant that we do not keep
    part: int = 0
    parts: int = 1
    steps: tuple = ()  # functions that make the released tensor of ours, one after the other
    trained: bool = True  # whether the released optimiser gives it gradients and the EMA follows it
    parameter: bool = True  # whether the released optimiser lists it

    def write(self, ours):
        """Return the released tensor, made of {our name: tensor}."""
        if not self.ours:
            return torch.full((1, 1, 2, 2), 0.25)
        tensor = ours[self.ours].chunk(self.parts)[self.part]
        for step in self.steps:
            tensor = step(tensor)
        return tensor.contiguous()

    def read(self, theirs):
        """Return our part of our tensor, made of {released name: tensor}."""
        tensor = theirs[self.name]
        for step in reversed(self.steps):
            tensor = INVERSE[step](tensor)
        return tensor


def released_tensors(net):
    """Return the released layout of a network, a list of `Released` in the released order."""
    names = {module: name for name, module in net.named_modules()}
    is_ncsnpp = net.config_fields["model.name"] == "ncsnpp"
    if net.config_fields["model.preconditioning"] != "none" or (is_ncsnpp and net.config_fields["data.num_classes"]):
        raise UserError("a network with model.preconditioning, or an ncsnpp with classes, has no released layout")
    if is_ncsnpp:
        return list(_ncsnpp_tensors(net, names))
    return list(_dhariwal_tensors(net, names))


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


def transpose(matrix):
    """Return the transposed matrix."""
    return matrix.t()


def add_pixel(matrix):
    """Return a matrix as the weight of a 1×1 convolution."""
    return matrix[:, :, None, None]


def drop_pixel(weight):
    """Return the weight of a 1×1 convolution as a matrix."""
    return weight[:, :, 0, 0]


INVERSE = {interleave: deinterleave, transpose: transpose, add_pixel: drop_pixel, drop_pixel: add_pixel}


def join(theirs, table):
    """Return {our name: tensor} of {released name: tensor}, for those of ours whose every part is there."""
    parts = {}
    for r in table:
        if r.ours and r.name in theirs:
            parts.setdefault(r.ours, []).append(r.read(theirs))
    return {ours: torch.cat(rows) if len(rows) > 1 else rows[0].contiguous() for ours, rows in parts.items()}


def split(ours, table):
    """Return {released name: tensor} of {our name: tensor}, in the released order."""
    return {r.name: r.write(ours) for r in table if r.ours in ours}


def from_released(checkpoint, net):
    """Return a checkpoint of the released layout in ours, as `net` reads it: weights, EMA and Adam's moments."""
    return _translate(checkpoint, net, join, _released_order(net), _our_order(net))


def to_released(checkpoint, net):
    """Return a checkpoint of `net` in the released layout: weights, EMA and Adam's moments."""
    translated = _translate(checkpoint, net, split, _our_order(net), _released_order(net))
    translated["model"] = {r.name: r.write(checkpoint["model"]) for r in released_tensors(net)}
    return translated


@dataclasses.dataclass(frozen=True)
class _Order:
    """The names of a layout's parameters in the order of its optimiser, and of those that its EMA follows."""

    parameters: list
    trained: list


def _released_order(net):
    table = released_tensors(net)
    return _Order([r.name for r in table if r.parameter], [r.name for r in table if r.trained])


def _our_order(net):
    parameters = [name for name, _ in net.named_parameters()]
    return _Order(parameters, [name for name, p in net.named_parameters() if p.requires_grad])


def _translate(checkpoint, net, translate, source, target):
    """Translate every tensor of a checkpoint from the order of `source` to that of `target`."""
    table = released_tensors(net)
    result = dict(checkpoint)
    result["model"] = translate(checkpoint["model"], table)
    if "ema" in checkpoint:
        shadow = dict(zip(source.trained, checkpoint["ema"]["shadow_params"], strict=True))
        shadow = translate(shadow, table)
        result["ema"] = dict(checkpoint["ema"], shadow_params=[shadow[name] for name in target.trained])
    if "optimizer" in checkpoint:
        result["optimizer"] = _translate_optimizer(checkpoint["optimizer"], table, translate, source, target)
    return result


def _translate_optimizer(optimizer, table, translate, source, target):
    """Translate the state of an optimiser with one parameter group, Adam's for instance."""
    states = {source.parameters[i]: state for i, state in optimizer["state"].items()}
    kinds = dict.fromkeys(kind for state in states.values() for kind in state)
    translated = {name: {} for name in target.parameters}
    for kind in kinds:
        values = {name: torch.as_tensor(state[kind]) for name, state in states.items() if kind in state}
        if all(value.dim() == 0 for value in values.values()):  # a count of steps: shared by parts and whole
            for r in table:
                source_name, name = (r.name, r.ours) if r.name in values else (r.ours, r.name)
                if source_name in values:
                    translated[name][kind] = values[source_name].clone()
        else:
            for name, value in translate(values, table).items():
                translated[name][kind] = value
    group = dict(optimizer["param_groups"][0], params=list(range(len(target.parameters))))
    state = {i: translated[name] for i, name in enumerate(target.parameters) if translated[name]}
    return {"state": state, "param_groups": [group]}


# The released layout of each network.


def _plain(name, ours, steps=()):
    """Yield weight and bias of a layer that both sides have."""
    yield Released(f"{name}.weight", f"{ours}.weight", steps=steps)
    yield Released(f"{name}.bias", f"{ours}.bias")


def _nin(name, ours, steps, part=0, parts=1):
    """Yield W and b of a released "NIN", a matrix that is multiplied from the right."""
    yield Released(f"{name}.W", f"{ours}.weight", part, parts, steps)
    yield Released(f"{name}.b", f"{ours}.bias", part, parts)


def _ncsnpp_tensors(net, names):
    yield Released(f"{PREFIX}sigmas", "sigmas", trained=False, parameter=False)
    nin_shortcut = net.config_fields["model.resblock_type"] == "ddpm"
    for number, module in enumerate(_ncsnpp_modules(net)):
        yield from _ncsnpp_module(f"{PREFIX}all_modules.{number}", module, names[module], nin_shortcut)


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
            yield from _nin(f"{name}.NIN_0", f"{ours}.shortcut", (drop_pixel, transpose))
        elif module.shortcut is not None:
            yield from _plain(f"{name}.Conv_2", f"{ours}.shortcut")
    elif isinstance(module, AttentionBlock):
        yield from _plain(f"{name}.GroupNorm_0", f"{ours}.attention.norm")
        for part in range(3):
            yield from _nin(f"{name}.NIN_{part}", f"{ours}.attention.qkv", (transpose,), part, 3)
        yield from _nin(f"{name}.NIN_3", f"{ours}.attention.proj", (transpose,))
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
        yield Released(f"{name}.qkv.weight", f"{ours}.attention.qkv.weight", steps=(interleave, add_pixel))
        yield Released(f"{name}.qkv.bias", f"{ours}.attention.qkv.bias", steps=(interleave,))
        yield from _plain(f"{name}.proj", f"{ours}.attention.proj", (add_pixel,))
