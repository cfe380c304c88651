"""The released SlimFlow checkpoints: their architectures, and translating names, order and shapes in both directions.

NCSN++ was released as a numbered list (`module.all_modules.7.Conv_0.weight`), DhariwalUNet with names by resolution
(`enc.16x16_block0.conv0.weight`). `released_tensors(net)` lists the released tensors in their order, each with the
tensor of ours that it corresponds to. Everything else follows from that list.
"""

import dataclasses
import itertools

import torch

from models.create import create_from_fields
from models.edm import deinterleave, edm_name, interleave
from models.layers import Resampling
from models.ncsnpp import AttentionBlock, FourierFeatures, InputSkip, OutputSkip, ResidualBlock
from runtime.terminal import UserError

PREFIX = "module."  # the released NCSN++ was saved from inside DataParallel
BOX_FILTER = "resample_filter"  # constant buffers of the released DhariwalUNet: the 2×2 mean
IN_BLOCK = {"GroupNorm_0": "norm0", "Conv_0": "conv0", "Dense_0": "time", "GroupNorm_1": "norm1", "Conv_1": "conv1"}


def _row(parameters, *sizes, **others):
    names = ("data.image_size", "model.nf", "model.num_res_blocks", "model.ch_mult")
    return parameters, dict(zip(names, sizes, strict=True)) | others


_IMAGENET = {"model.name": "DhariwalUNet", "data.num_classes": 1000, "model.attn_resolutions": (32, 16)}
# Every published network: (number of parameters, config fields); missing fields have their defaults.
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
    """Return the dotted config fields of the published network with the released tensors of a state dict, or None.

    They include the image size: no two published networks have the same names and shapes.
    """
    shapes = {name: tensor.shape for name, tensor in state.items()}
    count = sum(shape.numel() for name, shape in shapes.items() if name != "sigmas" and BOX_FILTER not in name)
    for fields in [fields for parameters, fields in PUBLISHED.values() if parameters == count]:
        with torch.device("meta"):  # only if the count agrees, since creating a network takes time
            net = create_from_fields(fields)
        if {name: tensor.shape for name, tensor in released_state(net).items()} == shapes:
            return net.config_fields
    return None


def released_state(net):
    """Return {released name without prefix: tensor} of a network, in the released order."""
    ours = net.state_dict()
    return {r.name: r.write(ours) for r in released_tensors(net)}


# Changes of a tensor: (ours to released, released to ours).
TRANSPOSED = (torch.t, torch.t)
MATRIX = (lambda weight: weight[:, :, 0, 0], lambda matrix: matrix[:, :, None, None])  # of our 1×1 convolution


@dataclasses.dataclass(frozen=True)
class Released:
    """One tensor of the released layout: part `part` of `parts` equal blocks of rows of our tensor `ours`."""

    name: str  # without PREFIX
    ours: str  # "" for a constant that we do not keep
    part: int = 0
    parts: int = 1
    changes: tuple = ()  # applied to our tensor in this order
    trained: bool = True  # whether it is trained, so that the EMA has it
    parameter: bool = True  # whether the released optimizer lists it

    def write(self, ours):
        """Return the released tensor from {our name: tensor}; a number of steps is the same for every part."""
        if not self.ours:
            return torch.full((1, 1, 2, 2), 0.25)
        tensor = ours[self.ours]
        if tensor.dim() == 0:
            return tensor.clone()
        tensor = tensor.chunk(self.parts)[self.part]
        for change, _ in self.changes:
            tensor = change(tensor)
        return tensor.contiguous()

    def read(self, theirs):
        """Return the part of our tensor from {released name: tensor}."""
        tensor = theirs[self.name]
        for _, undo in reversed(self.changes if tensor.dim() else ()):
            tensor = undo(tensor)
        return tensor


def from_released(checkpoint, net):
    """Return a checkpoint of the released layout in the layout of `net`: weights, EMA and Adam's moments.

    Raises ValueError, LookupError, TypeError, AttributeError or RuntimeError if these do not belong to `net`.
    """
    table = released_tensors(net)

    def join(theirs):
        parts = {}
        for r in table:
            if r.ours and r.name in theirs:
                parts.setdefault(r.ours, []).append(r.read(theirs))
        return {ours: torch.cat(rows) if len(rows) > 1 and rows[0].dim() else rows[0].contiguous()
                for ours, rows in parts.items()}

    return _translate(checkpoint, join, _released_order(table), _our_order(net))


def to_released(checkpoint, net):
    """Return a checkpoint of `net` in the released layout: weights, EMA and Adam's moments."""
    table = released_tensors(net)

    def split(ours):
        return {r.name: r.write(ours) for r in table if not r.ours or r.ours in ours}

    translated = _translate(checkpoint, split, _our_order(net), _released_order(table))
    prefix = PREFIX if net.config_fields["model.name"] == "ncsnpp" else ""
    translated["model"] = {prefix + name: tensor for name, tensor in translated["model"].items()}
    return translated


def _released_order(table):
    """Return (names of the parameters in the order of the optimizer, names of those that the EMA has)."""
    return [r.name for r in table if r.parameter], [r.name for r in table if r.trained]


def _our_order(net):
    parameters = list(net.named_parameters())
    return [name for name, _ in parameters], [name for name, p in parameters if p.requires_grad]


def _translate(checkpoint, translate, source, target):
    """Translate every tensor of a checkpoint from the order of `source` to that of `target`.

    translate: maps {source name: tensor} to {target name: tensor}. The optimizer must have one parameter group.
    """
    result = dict(checkpoint, model=translate(checkpoint["model"]))
    if "ema" in checkpoint:
        shadow = checkpoint["ema"]["shadow_params"]
        if len(shadow) != len(source[1]):
            raise ValueError(f"the EMA has {len(shadow)} tensors there and {len(source[1])} here")
        shadow = translate(dict(zip(source[1], shadow, strict=True)))
        result["ema"] = dict(checkpoint["ema"], shadow_params=[shadow[name] for name in target[1]])
    if "optimizer" in checkpoint:
        states = {source[0][i]: state for i, state in checkpoint["optimizer"]["state"].items()}
        kinds = dict.fromkeys(kind for state in states.values() for kind in state)  # step, exp_avg, …
        values = {kind: translate({name: torch.as_tensor(state[kind]) for name, state in states.items()
                                   if kind in state}) for kind in kinds}
        moments = [{kind: values[kind][name] for kind in kinds if name in values[kind]} for name in target[0]]
        group = dict(checkpoint["optimizer"]["param_groups"][0], params=list(range(len(moments))))
        result["optimizer"] = {"state": {i: state for i, state in enumerate(moments) if state},
                               "param_groups": [group]}
    return result


# The released layout of each network.


def released_tensors(net):
    """Return the released layout of a network, a list of `Released` in the released order.

    Raises UserError for a kind of network that was never released.
    """
    fields = net.config_fields
    layouts = {"ncsnpp": _ncsnpp_tensors, "DhariwalUNet": _dhariwal_tensors}
    if (fields["model.name"] not in layouts or fields["model.preconditioning"] != "none"
            or (fields["model.name"] == "ncsnpp" and fields["data.num_classes"])):
        raise UserError("only ncsnpp without classes and DhariwalUNet, neither with model.preconditioning, have a "
                        "released layout")
    return list(layouts[fields["model.name"]](net))


def _dhariwal_tensors(net):
    """Yield the tensors of DhariwalUNet: EDM's names, our order, and the filters of resampling blocks."""
    for ours in net.state_dict():
        name, changes = edm_name(ours, net.config_fields), ()
        if ".qkv." in name:
            changes += ((interleave, deinterleave),)
        if name.endswith((".qkv.weight", ".proj.weight")):
            changes += (MATRIX[::-1],)  # released as a 1×1 convolution
        yield Released(name, ours, changes=changes)
        for last, layer in (("conv0.bias", "conv0"), ("conv1.bias", "skip")):
            if ".resample." in ours and name.endswith(last):
                yield Released(name.replace(last, f"{layer}.{BOX_FILTER}"), "", trained=False, parameter=False)


def _ncsnpp_tensors(net):
    yield Released("sigmas", "sigmas", trained=False, parameter=False)
    names = {module: name for name, module in net.named_modules()}
    nin_shortcut = net.config_fields["model.resblock_type"] == "ddpm"
    for number, module in enumerate(_numbered(net)):
        name, ours = f"all_modules.{number}", names[module]
        if isinstance(module, AttentionBlock):
            yield from _plain(f"{name}.GroupNorm_0", f"{ours}.attention.norm")
            for part in range(3):
                yield from _nin(f"{name}.NIN_{part}", f"{ours}.attention.qkv", (TRANSPOSED,), part, 3)
            yield from _nin(f"{name}.NIN_3", f"{ours}.attention.proj", (TRANSPOSED,))
        elif isinstance(module, ResidualBlock):
            for theirs, layer in IN_BLOCK.items():
                yield from _plain(f"{name}.{theirs}", f"{ours}.{layer}")
            if module.shortcut is not None and nin_shortcut:
                yield from _nin(f"{name}.NIN_0", f"{ours}.shortcut", (MATRIX, TRANSPOSED))
            elif module.shortcut is not None:
                yield from _plain(f"{name}.Conv_2", f"{ours}.shortcut")
        elif isinstance(module, FourierFeatures):
            yield Released(f"{name}.W", f"{ours}.frequencies", trained=False)
        elif isinstance(module, Resampling) and module.conv is not None:
            yield from _plain(f"{name}.{'Conv2d_0' if module.taps else 'Conv_0'}", f"{ours}.conv")
        elif hasattr(module, "weight"):
            yield from _plain(f"{name}.Conv_0" if ours.endswith("pyramid.conv") else name, ours)


def _numbered(net):
    """Return the modules of the released numbered list, in its order; modules without tensors have numbers, too."""
    found = [net.time_features] if net.fourier else []
    found += [*(net.time_embedding.children() if net.time_embedding is not None else ()), net.input_conv]
    for level in net.encoder:
        found += itertools.chain(*zip(level.blocks, level.attentions, strict=True))
        found += [level.down, *_of_pyramid(level.pyramid)]
    found += net.middle.children()
    for level in net.decoder:
        found += [*level.blocks, level.attention, *_of_pyramid(level.pyramid), level.up]
    found += net.output_head.children() if net.output_head is not None else ()
    return [module for module in found if not isinstance(module, torch.nn.Identity | None)]


def _of_pyramid(pyramid):
    if pyramid is None or isinstance(pyramid, InputSkip):
        return [pyramid and pyramid.conv]
    return pyramid.head.children() if isinstance(pyramid, OutputSkip) else pyramid.children()


def _plain(name, ours):
    """Yield weight and bias of a layer that is the same in both layouts."""
    yield Released(f"{name}.weight", f"{ours}.weight")
    yield Released(f"{name}.bias", f"{ours}.bias")


def _nin(name, ours, changes, part=0, parts=1):
    """Yield W and b of a released "NIN", a matrix that is multiplied from the right."""
    yield Released(f"{name}.W", f"{ours}.weight", part, parts, changes)
    yield Released(f"{name}.b", f"{ours}.bias", part, parts)
