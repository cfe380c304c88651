"""Augmentation: each transform on a known image and against its inverse."""

import math

import numpy as np
import pytest
import torch

from datasets.augment import (
    LABEL_NAMES,
    TRANSFORMS,
    affine_matrix,
    augment,
    colour_matrix,
    create_augmentation,
    create_pair_augmentation,
    draw_moves,
    move_labels,
    permute_pixels,
    recolour,
    warp,
)
from runtime.errors import UserError
from tests.datasets.image_files import make_config, random_images

IMAGES = torch.from_numpy(random_images(4, 3, 16)).float() / 127.5 - 1
SMOOTH = torch.nn.functional.interpolate(0.8 * IMAGES[:, :, :5, :5], size=64, mode="bicubic").clamp(-0.9, 0.9)
NONE = draw_moves(torch.Generator(), 4, dict.fromkeys(TRANSFORMS, 0.0))


def move(**amounts):
    """Return the moves of four samples that all make the given ones."""
    return NONE | {name: torch.full((4,), float(amount)) for name, amount in amounts.items()}


def draw(seed=0, count=4, **probabilities):
    return draw_moves(torch.Generator().manual_seed(seed), count, dict.fromkeys(TRANSFORMS, 0.0) | probabilities)


def test_without_moves_images_stay_bit_for_bit_and_labels_are_zero():
    assert torch.equal(augment(IMAGES, NONE), IMAGES)
    assert (move_labels(NONE) == 0).all() and move_labels(NONE).shape == (4, len(LABEL_NAMES))


@pytest.mark.parametrize(("name", "amount", "expected"), [
    ("x_flip", 1, IMAGES.flip(-1)), ("y_flip", 1, IMAGES.flip(-2)),
    ("quarter_turn", 1, IMAGES.rot90(1, (-2, -1))), ("quarter_turn", 2, IMAGES.flip((-2, -1))),
    ("quarter_turn", 3, IMAGES.rot90(-1, (-2, -1))),
])
def test_flips_and_turns_permute_the_pixels(name, amount, expected):
    assert torch.equal(augment(IMAGES, move(**{name: amount})), expected)


def test_shift_moves_whole_pixels_and_mirrors_at_the_border():
    found = augment(IMAGES, move(shift_x=2 / 16, shift_y=-1 / 16))
    assert torch.equal(found[:, :, :-1, 2:], IMAGES[:, :, 1:, :-2])
    assert torch.equal(found[:, :, :-1, :2], IMAGES[:, :, 1:, :2].flip(-1))  # left: the first two columns, mirrored
    assert torch.equal(found[:, :, -1, 2:], IMAGES[:, :, -1, :-2])  # below: the last row again


def test_translation_by_whole_pixels_is_the_shift():
    found = augment(IMAGES, move(translate_x=-3 / 16, translate_y=1 / 16))
    expected = augment(IMAGES, move(shift_x=-3 / 16, shift_y=1 / 16))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_translation_by_half_a_pixel_moves_a_ramp_by_half_a_step():
    ramp = torch.linspace(-0.75, 0.75, 16).expand(4, 1, 16, 16)
    found = augment(ramp, move(translate_x=0.5 / 16))
    torch.testing.assert_close(found[..., 3:-3], ramp[..., 3:-3] - 0.05, atol=1e-5, rtol=0)


def test_rotation_by_a_quarter_is_the_quarter_turn():
    found = augment(IMAGES, move(rotate=math.pi / 2))
    torch.testing.assert_close(found, IMAGES.rot90(1, (-2, -1)), atol=1e-4, rtol=0)


def spot_moments(picture):
    """Return the second moments (xx, xy, yy) of a bright spot's pixels, in pixels squared."""
    weights = ((picture + 1) / 2).double()
    y, x = torch.meshgrid(*[torch.arange(64).double() - 31.5] * 2, indexing="ij")
    return [float((weights * a).sum() / weights.sum()) for a in (x * x, x * y, y * y)]


BELL = torch.exp(-((torch.arange(64) - 31.5) ** 2) / 50)
SPOT = (2 * BELL[:, None] * BELL - 1).expand(4, 1, 64, 64)


def test_scale_by_log2_of_the_factor_widens_a_spot_by_the_factor():
    before, after = spot_moments(SPOT[0, 0]), spot_moments(augment(SPOT, move(scale=0.5))[0, 0])
    assert after[0] / before[0] == pytest.approx(2, rel=1e-2) and after[2] / before[2] == pytest.approx(2, rel=1e-2)


def test_stretch_widens_a_spot_along_its_direction_and_narrows_it_across():
    # 2 %: torch's bicubic kernel changes second moments by about 0.1 square pixels
    before, after = spot_moments(SPOT[0, 0]), spot_moments(augment(SPOT, move(stretch=0.5))[0, 0])
    assert after[0] / before[0] == pytest.approx(2, rel=2e-2) and after[2] / before[2] == pytest.approx(0.5, rel=2e-2)
    turned = spot_moments(augment(SPOT, move(stretch=0.5, stretch_angle=math.pi / 4))[0, 0])
    # along the rising diagonal: x and y there have opposite signs, y pointing down
    assert turned[1] / before[0] == pytest.approx(-0.75, rel=2e-2)


@pytest.mark.parametrize("name", ["scale", "rotate", "stretch", "translate"])
def test_each_warp_is_undone_by_its_inverse(name):
    matrices = affine_matrix(draw(**{name: 1.0}))
    assert not torch.allclose(matrices, torch.eye(3).expand(4, 3, 3), atol=1e-2)
    back = warp(warp(SMOOTH, matrices), torch.linalg.inv(matrices))
    middle = (..., slice(24, 40), slice(24, 40))  # what stayed in the image on the way
    torch.testing.assert_close(back[middle], SMOOTH[middle], atol=2e-2, rtol=0)


def test_warps_follow_each_other_in_the_stated_order():
    found = affine_matrix(move(scale=1, rotate=math.pi / 2, translate_x=0.25))[0]
    point = found @ torch.tensor([1.0, 0, 1])  # doubled to (2, 0), turned counter-clockwise to (0, -2), moved right
    torch.testing.assert_close(point, torch.tensor([0.5, -2, 1]), atol=1e-6, rtol=0)
    # (0, 1) turned to (1, 0), stretched to (2, 0), moved right
    point = affine_matrix(move(rotate=math.pi / 2, stretch=1, translate_x=0.25))[0] @ torch.tensor([0, 1.0, 1])
    torch.testing.assert_close(point, torch.tensor([2.5, 0, 1]), atol=1e-6, rtol=0)


GREEN = torch.tensor([-0.5, 0.5, -0.5])[:, None, None].expand(4, 3, 2, 2)


@pytest.mark.parametrize(("amounts", "expected"), [
    ({"brightness": 0.25}, [-0.25, 0.75, -0.25]), ({"contrast": 1}, [-1.0, 1.0, -1.0]),
    ({"luma_flip": 1}, [-1 / 6, 5 / 6, -1 / 6]),  # the luma -1/6 becomes 1/6, what is across stays
    ({"hue": 2 * math.pi / 3}, [-0.5, -0.5, 0.5]),  # a third of a turn: green to blue
    ({"saturation": -1}, [-1 / 3, 1 / 6, -1 / 3]),  # half way to the luma
])
def test_each_colour_transform_on_a_known_colour(amounts, expected):
    found = augment(GREEN, move(**amounts))
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["brightness", "contrast", "luma_flip", "hue", "saturation"])
def test_each_colour_transform_is_undone_by_its_inverse(name):
    moves = draw(seed=1, **{name: 1.0})
    matrices = colour_matrix(moves)
    changed = recolour(IMAGES, moves["brightness"], matrices)
    assert (changed - IMAGES).abs().max() > 1e-2
    back = recolour(changed, torch.zeros(4), torch.linalg.inv(matrices)) - moves["brightness"][:, None, None, None]
    torch.testing.assert_close(back, IMAGES, atol=1e-5, rtol=0)


def test_grey_images_stay_grey_and_know_no_hue():
    grey = IMAGES[:, :1] / 2
    torch.testing.assert_close(augment(grey, move(hue=1, saturation=1)), grey, atol=1e-6, rtol=0)
    torch.testing.assert_close(augment(grey, move(luma_flip=1)), -grey, atol=1e-6, rtol=0)
    torch.testing.assert_close(augment(grey, move(contrast=-1)), grey / 2, atol=1e-6, rtol=0)


def test_all_moves_together_stay_in_range():
    found = augment(IMAGES, draw(**dict.fromkeys(TRANSFORMS, 1.0)))
    assert found.shape == IMAGES.shape and found.abs().max() <= 1 and found.isfinite().all()


def test_each_transform_comes_with_its_own_probability():
    for name in TRANSFORMS:
        moves = draw(count=4000, **{name: 0.25})
        moved = {key for key, amount in moves.items() if (amount != 0).any()}
        assert moved and all(key.startswith(name) for key in moved)
        share = float((sum(moves[key].abs() for key in moved) > 0).float().mean())
        coin = 0.5 if name.endswith("flip") else 0.75 if name == "quarter_turn" else 1.0
        assert share == pytest.approx(0.25 * coin, abs=0.03)


def test_amplitudes_are_those_of_the_papers():
    moves = draw(count=4000, **dict.fromkeys(TRANSFORMS, 1.0))
    deviations = {"scale": 0.2, "stretch": 0.2, "translate_x": 0.125, "translate_y": 0.125, "brightness": 0.2,
                  "contrast": 0.5, "saturation": 1.0, "rotate": math.pi / 3**0.5, "hue": math.pi / 3**0.5,
                  "stretch_angle": math.pi / 3**0.5, "shift_x": 0.125 / 3**0.5, "shift_y": 0.125 / 3**0.5}
    for name, deviation in deviations.items():
        assert float(moves[name].std()) == pytest.approx(deviation, rel=0.06), name
        assert abs(float(moves[name].mean())) < 0.06 * deviation, name


def test_labels_tell_every_transform_apart():
    for name in TRANSFORMS:
        labels = move_labels(draw(seed=3, **{name: 1.0}))
        told = {LABEL_NAMES[column] for column in range(len(LABEL_NAMES)) if (labels[:, column] != 0).any()}
        assert told and all(label.startswith(name) for label in told)


def test_flips_and_turns_keep_noise_white_and_move_it_with_the_image(tmp_path):
    moves = draw(x_flip=1.0, y_flip=1.0, quarter_turn=1.0)
    places = torch.arange(4 * 3 * 256.0).view(4, 3, 16, 16)
    noise = torch.randn(places.shape, generator=torch.Generator().manual_seed(0))
    moved = permute_pixels(noise, moves)
    assert torch.equal(moved.flatten(1).sort().values, noise.flatten(1).sort().values)
    assert torch.equal(moved.flatten(), noise.flatten()[permute_pixels(places, moves).long().flatten()])


def test_pairs_refuse_what_would_not_keep_noise_white(tmp_path):
    config = make_config(tmp_path, "CIFAR10", "", 32, use_aug=True)
    with pytest.raises(UserError, match="set to 0: augment.scale, augment.rotate, augment.stretch, augment.translate$"):
        create_pair_augmentation(config)
    for name in TRANSFORMS:
        config.augment[name] = 1.0 if name in ("x_flip", "y_flip", "quarter_turn") else 0.0
    assert create_pair_augmentation(config).probabilities["quarter_turn"] == 1
    config.augment.hue = 0.1
    with pytest.raises(UserError, match="augment.hue$"):
        create_pair_augmentation(config)


def test_it_is_off_unless_asked_for(tmp_path):
    config = make_config(tmp_path, "CIFAR10", "", 32)
    assert create_augmentation(config) is None and create_pair_augmentation(config) is None
    assert set(config.augment) == set(TRANSFORMS)


def test_moves_of_an_update_do_not_depend_on_the_share_that_is_asked_for(tmp_path):
    augmentation = create_augmentation(make_config(tmp_path, "CIFAR10", "", 32, use_aug=True))
    whole, part = (augmentation.moves(9, low, high, "cpu") for low, high in ((0, 128), (30, 50)))
    other = augmentation.moves(10, 0, 128, "cpu")
    for name, amounts in whole.items():
        np.testing.assert_array_equal(amounts[30:50], part[name])
    assert not torch.equal(whole["x_flip"], other["x_flip"])
