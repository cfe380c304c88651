"""EDM's networks (Karras et al. 2022, arXiv 2206.00364) as velocities, and their snapshots as our checkpoints.

A denoiser D(x; σ), for images plus σ times noise, gives the velocity of the straight path: with x_t = t·z1 + (1-t)·z0
and σ = (1-t)/t the noisy image is x_t/t, and v = (D(x_t/t; σ) - x_t)/(1-t).
"""

import torch
from torch import nn

from models import edm_pickle
from models.dhariwal_unet import head_count
from models.ncsnpp import noise_levels
from runtime.terminal import UserError

TIME_SCALE = 999.0
SIGMA_DATA = 0.5
BETA_D, BETA_MIN = 19.9, 0.1  # of the VP noise schedule (Song et al. 2021)
# The range of noise levels that EDM trains or samples with, for each preconditioning.
SIGMA_RANGE = {"edm": (0.002, 80.0), "vp": (0.001, 152.0), "ve": (0.02, 100.0)}
LICENCE_NOTE = ("EDM's published networks are licensed CC BY-NC-SA 4.0 (non-commercial), which may extend to pairs "
                "made with them and to networks trained on such pairs; see NOTICE")


class Preconditioned(nn.Module):
    """Velocity network `net(x, t999, label)` that evaluates EDM's denoiser; `net` is F in the paper's notation.

    The closed forms below avoid the division by 1-t, which would lose digits near the data: with s = 1-t, σd = 0.5 and
    w = s² + σd²·t²
      edm  v = (σd²·t - s)/w · x_t + σd/√w · F(x_t/√w; ln(σ)/4)
      vp   v = (x_t - F(x_t/√(s² + t²); 999·σ⁻¹(σ)))/t
      ve   v = (x_t + F(x_t/t; ln(σ/2)))/t
    σ is clamped to SIGMA_RANGE only in the noise input of F, so v is finite up to both ends (vp, ve: t > 0).
    """

    def __init__(self, net, kind):
        super().__init__()
        self.net, self.kind = net, kind
        self.idle_parameters = getattr(net, "idle_parameters", list)

    def noise_input(self, t):
        """Return the noise input (N,) of F, which it takes in place of 999·t, for t (N,)."""
        sigma = ((1 - t) / t).clamp(*SIGMA_RANGE[self.kind])
        if self.kind == "edm":
            c_noise = sigma.log() / 4
        elif self.kind == "vp":
            c_noise = TIME_SCALE * (((BETA_MIN**2 + 2 * BETA_D * (1 + sigma**2).log()).sqrt() - BETA_MIN) / BETA_D)
        else:
            c_noise = (sigma / 2).log()
        return c_noise.exp() if getattr(self.net, "fourier", False) else c_noise  # Fourier features take the logarithm

    def forward(self, x, t999, label=None):
        """Return the velocity (N, C, H, W) at x (N, C, H, W) and 999·t (N,); label: one-hot (N, K), or None."""
        t = t999 / TIME_SCALE
        noise_input = self.noise_input(t)
        t = t.to(x.dtype)[:, None, None, None]
        s = 1 - t
        if self.kind == "edm":
            w = s**2 + (SIGMA_DATA * t) ** 2
            return (SIGMA_DATA**2 * t - s) / w * x + SIGMA_DATA / w.sqrt() * self.net(x / w.sqrt(), noise_input, label)
        if self.kind == "vp":
            return (x - self.net(x / (s**2 + t**2).sqrt(), noise_input, label)) / t
        return (x + self.net(x / t, noise_input, label)) / t


# Snapshots: arguments become config fields; names and the order of rows become ours.

CLASSES = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve"}
DEFAULTS = {  # of the networks' arguments, for those that a snapshot does not have
    "SongUNet": {"model_channels": 128, "channel_mult": [1, 2, 2, 2], "channel_mult_emb": 4, "num_blocks": 4,
                 "attn_resolutions": [16], "embedding_type": "positional", "channel_mult_noise": 1,
                 "encoder_type": "standard", "decoder_type": "standard", "resample_filter": [1, 1]},
    "DhariwalUNet": {"model_channels": 192, "channel_mult": [1, 2, 3, 4], "channel_mult_emb": 4, "num_blocks": 3,
                     "attn_resolutions": [32, 16, 8]},
}
# Values that our networks support, EDM's default first; the closed forms assume these numbers.
ALLOWED = {"preconditioning": tuple(CLASSES), "sigma_data": (SIGMA_DATA,), "beta_d": (BETA_D,), "beta_min": (BETA_MIN,),
           "M": (1000,), "epsilon_t": (1e-5,), "model_type": tuple(DEFAULTS), "channel_mult_emb": (4,),
           "embedding_type": ("positional", "fourier"), "encoder_type": ("standard", "residual"),
           "decoder_type": ("standard",)}
OTHERS = {"img_resolution", "img_channels", "label_dim", "model_type", "augment_dim", "dropout", "label_dropout",
          "use_fp16", "sigma_min", "sigma_max", "sigma_data", "beta_d", "beta_min", "M", "epsilon_t"}
# {our name of a layer: EDM's}, outside the levels and inside blocks.
TOP = {"time_features.frequencies": "map_noise.freqs", "time_embedding.linear": "map_layer",
       "class_features.linear": "map_label", "embedding.linear": "map_layer", "embedding.label": "map_label",
       "output_norm": "out_norm", "output_conv": "out_conv"}
IN_BLOCK = {"attention.norm": "norm2", "attention.qkv": "qkv", "attention.proj": "proj", "shortcut": "skip",
            "time": "affine"}


def read_checkpoint(file, path, create):
    """Return the EDM snapshot `file` as a checkpoint in our layout, with `fields` and `licence_note`.

    create: `models.create.create_from_fields`. Raises UserError, naming `path`, for a file that is not such a snapshot
    and for a network that is not supported here.
    """
    snapshot = edm_pickle.read_snapshot(file, path)
    try:
        fields, taps = config_fields(snapshot)
        if fields["model.num_res_blocks"] * len(fields["model.ch_mult"]) > len(snapshot.tensors):
            raise UserError("it has fewer tensors than blocks")
        with torch.device("meta"):
            net = create(fields)
        state = our_state(snapshot.tensors, net, taps)
    except UserError as error:
        raise UserError(f"{path} is not a network that can be used here: {error}") from None
    except Exception as error:  # for sizes and types that no network has
        raise UserError(f"{path} is damaged: its arguments and tensors do not fit together") from error
    shadow = [state[name] for name, _ in net.named_parameters()]
    return {"model": state, "ema": {"num_updates": 0, "shadow_params": shadow}, "step": 0, "fields": net.config_fields,
            "licence_note": LICENCE_NOTE}


def config_fields(snapshot):
    """Return (dotted config fields, taps of the resampling filter) for a snapshot's arguments.

    Raises UserError for arguments that are not supported here; the fields are checked when the network is created.
    """
    usual = "DhariwalUNet" if snapshot.class_name == "EDMPrecond" else "SongUNet"
    values = {"preconditioning": snapshot.class_name, "model_type": usual, "channel_mult_noise": 1}
    values |= snapshot.attributes | snapshot.arguments
    noise = 2 if values.get("embedding_type") == "fourier" else 1
    for name, known in (ALLOWED | {"channel_mult_noise": (noise,)}).items():
        if (value := values.get(name, known[0])) not in known:
            raise UserError(f"its {name} is {value!r}; known: {', '.join(map(str, known))}")
    kind = values["model_type"]
    if unknown := snapshot.arguments.keys() - OTHERS - DEFAULTS[kind].keys():
        raise UserError(f"it has the argument {min(unknown)!r}, which is not known")
    given = {"resample_filter": [1, 1]} | DEFAULTS[kind] | snapshot.arguments
    size, taps = given["img_resolution"], given["resample_filter"]
    sizes = [size >> level for level in range(len(given["channel_mult"]))]
    fields = {"model.preconditioning": CLASSES[snapshot.class_name], "model.nf": given["model_channels"],
              "model.ch_mult": given["channel_mult"], "model.num_res_blocks": given["num_blocks"],
              "model.attn_resolutions": [size for size in given["attn_resolutions"] if size in sizes],
              "data.image_size": size, "data.num_channels": given["img_channels"],
              "data.num_classes": given.get("label_dim", 0)}
    if kind == "DhariwalUNet":
        return fields | {"model.name": "DhariwalUNet"}, taps
    fields |= {"model.name": "ncsnpp", "model.embedding_type": given["embedding_type"], "model.fir": taps != [1, 1],
               "model.progressive_input": {"standard": "none"}.get(given["encoder_type"], given["encoder_type"])}
    return fields | ({"model.fir_kernel": taps} if taps != [1, 1] else {}), taps


def our_state(tensors, net, taps):
    """Return the state dict for `net` from {EDM's name: tensor}; raise UserError if they do not fit."""
    fields, expected = net.config_fields, net.state_dict()
    names = {ours: f"model.{edm_name(ours.removeprefix('net.'), fields)}" for ours in expected if ours != "net.sigmas"}
    kernel = torch.tensor([[a * b / sum(taps) ** 2 for a in taps] for b in taps])
    for name in [name for name in tensors if name not in names.values()]:
        if name.endswith("resample_filter"):
            if tensors[name].shape[-2:] != kernel.shape or not torch.allclose(tensors[name], kernel, atol=1e-6):
                raise UserError(f"{name} is not the filter of its resample_filter")
        elif name != "model.map_augment.weight":  # for the parameters of augmentation, which sampling does not use
            raise UserError(f"it has the tensor {name.removeprefix('model.')[:80]!r}, which no such network has")
    state = {}
    for ours, like in expected.items():
        if ours == "net.sigmas":
            state[ours] = noise_levels(*(fields[f"model.{name}"] for name in ("sigma_max", "sigma_min", "num_scales")))
            continue
        tensor = tensors.get(names[ours])
        if tensor is not None and ".attention." in ours:
            tensor = tensor[:, :, 0, 0] if tensor.dim() == 4 else tensor
            if ".qkv." in ours:
                tensor = deinterleave(tensor, None if fields["model.name"] == "DhariwalUNet" else 1)
        if tensor is None or tensor.shape != like.shape:
            raise UserError(f"{ours} is missing, or its shape is not that of the arguments")
        state[ours] = tensor
    return state


def edm_name(name, fields):
    """Return EDM's name of our tensor `name`, in a network with the dotted config fields `fields`.

    The released DhariwalUNet has the same names.
    """
    last = len(fields["model.ch_mult"]) - 1

    def at(side, level):
        size = fields["data.image_size"] >> level
        return f"{side}.{size}x{size}"

    match name.split("."):
        case ["input_conv", end]:
            return f"{at('enc', 0)}_conv.{end}"
        case ["output_head", layer, end]:
            return f"{at('dec', 0)}_aux_{layer}.{end}"
        case ["encoder", level, "pyramid", "down", "conv", end]:
            return f"{at('enc', int(level) + 1)}_aux_residual.{end}"
        case ["encoder", level, "blocks" | "attentions", number, *rest]:
            block = f"{at('enc', int(level))}_block{number}"
        case ["encoder", level, "resample" | "down" as kind, *rest]:  # at the level that it enters, or leaves
            block = f"{at('enc', int(level) + (kind == 'down'))}_down"
        case ["middle", "attention" | "0" | "block0", *rest]:
            block = f"{at('dec', last)}_in0"
        case ["middle", "1" | "block1", *rest]:
            block = f"{at('dec', last)}_in1"
        case ["decoder", level, "blocks", number, *rest]:
            block = f"{at('dec', last - int(level))}_block{number}"
        case ["decoder", level, "attention", *rest]:
            block = f"{at('dec', last - int(level))}_block{fields['model.num_res_blocks']}"
        case ["decoder", level, "resample" | "up" as kind, *rest]:
            block = f"{at('dec', last - int(level) - (kind == 'up'))}_up"
        case _:
            ours = next(ours for ours in TOP if name.startswith(ours))
            return TOP[ours] + name.removeprefix(ours)
    layer, end = ".".join(rest[:-1]), rest[-1]
    return f"{block}.{IN_BLOCK.get(layer, layer)}.{end}"


def interleave(rows, heads=None):
    """Reorder the rows of an attention projection from (q, k, v), head, channel (ours) to head, channel, (q, k, v).

    heads None: the number that DhariwalUNet has.
    """
    heads = heads or head_count(rows.shape[0] // 3)
    return rows.reshape(3, heads, -1, *rows.shape[1:]).movedim(0, 2).reshape(rows.shape)


def deinterleave(rows, heads=None):
    """Undo `interleave`."""
    heads = heads or head_count(rows.shape[0] // 3)
    return rows.reshape(heads, -1, 3, *rows.shape[1:]).movedim(2, 0).reshape(rows.shape)
