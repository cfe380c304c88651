"""Augmentation: EDM's pipeline (Karras et al. 2022, appendix F.2), colours as in StyleGAN2-ADA (2020, appendix B).

Each transform is drawn for a sample with its own probability (`config.augment`) and is the identity otherwise. What
was drawn is a dict of tensors `(N,)`, here called moves, zero meaning untouched; a transform is a function of images
and moves. Three stages, in this order: exact moves of pixels, one affine warp, one colour transform. Coordinates: x
to the right, y down, from the centre of the image; positive angles turn counter-clockwise.
"""

import math

import torch
import torch.nn.functional as F

from runtime import seeds
from runtime.errors import UserError

# The amplitudes of the papers.
SHIFT = 1 / 8  # largest integer translation, in image widths
SCALE = STRETCH = 2**0.2  # factor of one standard deviation
TRANSLATION = 1 / 8  # standard deviation, in image widths
BRIGHTNESS = 0.2  # standard deviation of what is added to pixels in [-1, 1]
CONTRAST = 2**0.5  # factor of one standard deviation
SATURATION = 2.0  # factor of one standard deviation

EXACT = ("x_flip", "y_flip", "quarter_turn")  # these permute the pixels
GEOMETRIC = ("scale", "rotate", "stretch", "translate")
TRANSFORMS = (*EXACT, "shift", *GEOMETRIC, "brightness", "contrast", "luma_flip", "hue", "saturation")
LABEL_NAMES = ("x_flip", "y_flip", "quarter_turn cos-1", "quarter_turn sin", "shift x", "shift y", "scale",
               "rotate cos-1", "rotate sin", "stretch cos", "stretch sin", "translate x", "translate y",
               "brightness", "contrast", "luma_flip", "hue cos-1", "hue sin", "saturation")


class Augmentation:
    """The random moves of every update: a pure function of (seed, update, place)."""

    def __init__(self, probabilities, seed, batch_size):
        """Take the probability of each of `TRANSFORMS` (a dict), the seed and the global batch size."""
        self.probabilities, self.seed, self.batch_size = probabilities, seed, batch_size

    def moves(self, update, low, high, device):
        """Return the moves of places [low, high) of the batch of `update`, tensors `(high - low,)` on `device`."""
        generator = seeds.step_generator(self.seed, update, seeds.AUGMENT, device)
        moves = draw_moves(generator, self.batch_size, self.probabilities)
        return {name: amounts[low:high] for name, amounts in moves.items()}


def create_augmentation(config):
    """Return the `Augmentation` of images that the config asks for, None without `data.use_aug`."""
    if not config.data.use_aug:
        return None
    return Augmentation(config.augment.to_dict(), config.seed, config.training.batch_size)


def create_pair_augmentation(config):
    """Return the `Augmentation` of pairs that the config asks for, None without `data.use_aug`.

    z0 and z1 of a pair must make the same move, and z0 must stay white noise. Flips and quarter turns only permute
    pixels. All others are refused with a `UserError`: a warp averages neighbouring noise values, a shift repeats
    some at the border, and a change of colour has no counterpart in the noise.
    """
    augmentation = create_augmentation(config)
    if augmentation is None:
        return None
    wrong = [name for name in TRANSFORMS if name not in EXACT and augmentation.probabilities[name] > 0]
    if wrong:
        raise UserError("data.use_aug on pairs (data.reflow_data_root): only x_flip, y_flip and quarter_turn keep z0 "
                        f"white noise; set to 0: {', '.join('augment.' + name for name in wrong)}")
    return augmentation


def draw_moves(generator, count, probabilities):
    """Return the moves of `count` samples: a dict of float32 tensors `(count,)` on the generator's device.

    x_flip, y_flip, luma_flip: 0 or 1. quarter_turn: 0, 1, 2 or 3. shift_x, shift_y: in image widths, within SHIFT.
    scale, stretch, contrast, saturation: log2 of the factor. rotate, stretch_angle, hue: radians. translate_x,
    translate_y: in image widths. brightness: what is added. probabilities: of each of `TRANSFORMS`.
    """
    device = generator.device
    gates = torch.rand(len(TRANSFORMS), count, generator=generator, device=device)
    enabled = {name: (gate < probabilities[name]).float() for name, gate in zip(TRANSFORMS, gates, strict=True)}
    coin = torch.rand(9, count, generator=generator, device=device)
    normal = torch.randn(7, count, generator=generator, device=device)
    angle = math.pi * (2 * coin - 1)
    amounts = {
        "x_flip": (coin[0] < 0.5).float(), "y_flip": (coin[1] < 0.5).float(), "quarter_turn": (4 * coin[2]).floor(),
        "shift_x": SHIFT * (2 * coin[3] - 1), "shift_y": SHIFT * (2 * coin[4] - 1),
        "scale": math.log2(SCALE) * normal[0], "rotate": angle[5],
        "stretch": math.log2(STRETCH) * normal[1], "stretch_angle": angle[6],
        "translate_x": TRANSLATION * normal[2], "translate_y": TRANSLATION * normal[3],
        "brightness": BRIGHTNESS * normal[4], "contrast": math.log2(CONTRAST) * normal[5],
        "luma_flip": (coin[7] < 0.5).float(), "hue": angle[8], "saturation": math.log2(SATURATION) * normal[6],
    }
    return {name: amount * enabled[_transform_of(name)] for name, amount in amounts.items()}


def _transform_of(name):
    """Return which of `TRANSFORMS` a move belongs to."""
    return name if name in TRANSFORMS else name.rsplit("_", 1)[0]


def move_labels(moves):
    """Return what a network may be told of the moves: float32 `(N, len(LABEL_NAMES))`, zero for untouched images."""
    m = moves
    turn = m["quarter_turn"] * (math.pi / 2)
    return torch.stack([
        m["x_flip"], m["y_flip"], turn.cos() - 1, turn.sin(), m["shift_x"], m["shift_y"], m["scale"],
        m["rotate"].cos() - 1, m["rotate"].sin(),
        m["stretch"] * m["stretch_angle"].cos(), m["stretch"] * m["stretch_angle"].sin(),
        m["translate_x"], m["translate_y"], m["brightness"], m["contrast"], m["luma_flip"],
        m["hue"].cos() - 1, m["hue"].sin(), m["saturation"]], dim=1)


def augment(images, moves):
    """Return augmented images `(N, C, H, H)` in [-1, 1], C 1 or 3; untouched ones stay as they are, bit for bit."""
    images = shift(permute_pixels(images, moves), moves)
    warped = warp(images, affine_matrix(moves))
    images = torch.where(_any(moves, "scale", "rotate", "stretch", "translate_x", "translate_y"), warped, images)
    recoloured = recolour(images, moves["brightness"], colour_matrix(moves))
    return torch.where(_any(moves, "brightness", "contrast", "luma_flip", "hue", "saturation"), recoloured,
                       images).clamp(-1, 1)


def _any(moves, *names):
    """Return which samples make one of the named moves, bool `(N, 1, 1, 1)`."""
    return sum(moves[name].abs() for name in names)[:, None, None, None] > 0


def permute_pixels(images, moves):
    """Return images, or noise, `(N, C, H, H)` flipped left-right, flipped up-down, then turned by quarters."""
    def each(amount):
        return amount[:, None, None, None]

    images = torch.where(each(moves["x_flip"]) > 0, images.flip(-1), images)
    images = torch.where(each(moves["y_flip"]) > 0, images.flip(-2), images)
    turns = each(moves["quarter_turn"])
    turned = images
    for quarters in (1, 2, 3):
        turned = torch.where(turns == quarters, images.rot90(quarters, (-2, -1)), turned)
    return turned


def shift(images, moves):
    """Return images moved right and down by whole pixels; what comes in at the border is the mirrored image."""
    size = images.shape[-1]

    def sources(amount):
        """Which pixel each place shows, int64 (N, size): mirrored about the image's edge."""
        places = torch.arange(size, device=images.device) - (amount[:, None] * size).round().long()
        places = places % (2 * size)
        return torch.minimum(places, 2 * size - 1 - places)

    columns, rows = sources(moves["shift_x"])[:, None, None, :], sources(moves["shift_y"])[:, None, :, None]
    return images.gather(3, columns.expand_as(images)).gather(2, rows.expand_as(images))


def affine_matrix(moves):
    """Return the warps as matrices `(N, 3, 3)` on points (x, y, 1), in half image widths.

    Applied in this order: scale by 2^scale; rotate; stretch by 2^stretch along the direction `stretch_angle` and
    by its inverse across; translate.
    """
    zero, one = torch.zeros_like(moves["scale"]), torch.ones_like(moves["scale"])

    def matrix(a, b, c, d, e, f):
        rows = ((a, b, c), (d, e, f), (zero, zero, one))
        return torch.stack([torch.stack(row, -1) for row in rows], -2)

    def rotation(angle):  # counter-clockwise as seen, with y down
        return matrix(angle.cos(), angle.sin(), zero, -angle.sin(), angle.cos(), zero)

    scale, along, direction = moves["scale"].exp2(), moves["stretch"].exp2(), moves["stretch_angle"]
    stretch = rotation(direction) @ matrix(along, zero, zero, zero, 1 / along, zero) @ rotation(-direction)
    translate = matrix(one, zero, 2 * moves["translate_x"], zero, one, 2 * moves["translate_y"])
    return translate @ stretch @ rotation(moves["rotate"]) @ matrix(scale, zero, zero, zero, scale, zero)


def warp(images, matrices):
    """Return images `(N, C, H, H)` with each point moved by its matrix `(N, 3, 3)`.

    Bicubic interpolation; beyond the border lies the mirrored image.
    """
    inverse = torch.linalg.inv_ex(matrices).inverse  # without a check, which would wait for the device
    grid = F.affine_grid(inverse[:, :2], list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)


def colour_matrix(moves):
    """Return the colour transforms as matrices `(N, 3, 3)` on (r, g, b).

    Applied in this order: multiply by 2^contrast; reflect the luma, `I - 2vv'`; turn the hue about v; multiply what is
    across v by 2^saturation. v = (1, 1, 1)/sqrt(3) is the luma axis.
    """
    def each(amount):
        return amount[:, None, None]

    eye = torch.eye(3, device=moves["hue"].device)
    along = torch.full_like(eye, 1 / 3)  # vv', what of a colour lies along v
    across = eye - along
    turned = (eye.roll(1, 0) - eye.roll(-1, 0)) / math.sqrt(3)  # the cross product with v: across, turned by 90 degrees
    contrast = each(moves["contrast"].exp2()) * eye
    luma_flip = eye - 2 * each(moves["luma_flip"]) * along
    hue = along + each(moves["hue"].cos()) * across + each(moves["hue"].sin()) * turned
    saturation = along + each(moves["saturation"].exp2()) * across
    return saturation @ hue @ luma_flip @ contrast


def recolour(images, brightness, matrices):
    """Return images `(N, C, H, W)`, `brightness` `(N,)` added and each colour mapped by its matrix `(N, 3, 3)`.

    Grey images (C = 1) are coloured and turned grey again, which leaves them contrast and luma flip.
    """
    colours = (images + brightness[:, None, None, None]).expand(-1, 3, -1, -1)
    mapped = (matrices @ colours.flatten(2)).unflatten(2, images.shape[2:])
    return mapped if images.shape[1] == 3 else mapped.mean(1, keepdim=True)
