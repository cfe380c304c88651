"""One picture file to pixels."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from datasets.picture import CorruptPicture, decode_picture
from datasets.source import COLOUR_TO_GREY, GREY_TO_COLOUR, Form
from tests.datasets.image_files import encode, png, random_images

COLOUR, GREY = random_images(1, 3, 6)[0], random_images(1, 1, 6)[0]


def to_picture(image):
    return Image.fromarray(image.transpose(1, 2, 0))


def test_a_png_of_the_right_size_comes_through_unchanged():
    pixels, notes = decode_picture(png(COLOUR), Form(6, 3))
    np.testing.assert_array_equal(pixels, COLOUR)
    assert pixels.dtype == np.uint8 and notes == []


def test_grey_becomes_colour_and_says_so():
    pixels, notes = decode_picture(png(GREY), Form(6, 3))
    np.testing.assert_array_equal(pixels, GREY.repeat(3, 0))
    assert notes == [GREY_TO_COLOUR]


def test_colour_becomes_luma_and_says_so():
    pixels, notes = decode_picture(png(COLOUR), Form(6, 1))
    luma = np.tensordot([0.299, 0.587, 0.114], COLOUR.astype(float), 1)
    assert np.abs(pixels[0] - luma).max() <= 1 and pixels.shape == (1, 6, 6)
    assert notes == [COLOUR_TO_GREY]


def test_16_bit_grey_keeps_its_whole_range():
    values = np.array([[0, 257, 128 * 257], [65535, 300, 40000], [1, 65534, 129]], np.uint16)
    pixels, _ = decode_picture(encode(Image.fromarray(values), "PNG"), Form(3, 1))
    np.testing.assert_array_equal(pixels[0], np.round(values / 257))


def test_16_bit_colour_is_reduced_to_its_upper_8_bits():
    pixels, _ = decode_picture(png_16_bit_colour(COLOUR.astype(np.uint16) * 257), Form(6, 3))
    np.testing.assert_array_equal(pixels, COLOUR)


def png_16_bit_colour(values):
    """Return uint16 (3, H, W) as a 16-bit RGB PNG, which Pillow cannot write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values.transpose(1, 2, 0))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", values.shape[2], values.shape[1], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_palette_png_shows_its_colours():
    colours = Image.fromarray(np.kron(random_images(1, 3, 2)[0], np.ones((1, 3, 3), np.uint8)).transpose(1, 2, 0))
    expected = np.asarray(colours).transpose(2, 0, 1)
    indexed = colours.quantize(4)
    assert indexed.mode == "P"
    pixels, _ = decode_picture(encode(indexed, "PNG"), Form(6, 3))
    assert np.abs(pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_places_are_white_and_half_transparent_ones_mixed(mode):
    picture = Image.new("RGBA", (3, 3), (10, 10, 10, 255))
    picture.putpixel((1, 0), (10, 10, 10, 0))
    picture.putpixel((2, 0), (10, 10, 10, 128))
    pixels, notes = decode_picture(encode(picture.convert(mode), "PNG"), Form(3, 3))
    assert pixels[:, 0, :2].tolist() == [[10, 255]] * 3
    assert np.abs(pixels[:, 0, 2].astype(int) - round(10 * 128 / 255 + 255 * 127 / 255)).max() <= 1
    assert "transparent, laid on white" in notes


def test_transparent_palette_colour_is_white():
    picture = Image.new("P", (2, 2))
    picture.putpalette([200, 0, 0, 0, 100, 0])
    picture.putpixel((1, 1), 1)
    pixels, notes = decode_picture(encode(picture, "PNG", transparency=1), Form(2, 3))
    assert pixels[:, 1, 1].tolist() == [255, 255, 255] and pixels[:, 0, 0].tolist() == [200, 0, 0]
    assert notes == ["transparent, laid on white"]


def test_an_alpha_channel_without_holes_changes_nothing():
    pixels, notes = decode_picture(encode(to_picture(COLOUR).convert("RGBA"), "PNG"), Form(6, 3))
    np.testing.assert_array_equal(pixels, COLOUR)
    assert notes == []


def test_cmyk_jpeg_is_not_inverted():
    picture = Image.new("RGB", (8, 8), (200, 60, 30))
    pixels, _ = decode_picture(encode(picture.convert("CMYK"), "JPEG", quality=95), Form(8, 3))
    assert np.abs(pixels[:, 4, 4].astype(int) - [200, 60, 30]).max() <= 4


def test_cmyk_jpeg_becomes_grey():
    picture = Image.new("RGB", (8, 8), (100, 100, 100))
    pixels, notes = decode_picture(encode(picture.convert("CMYK"), "JPEG", quality=95), Form(8, 1))
    assert abs(int(pixels[0, 4, 4]) - 100) <= 4 and notes == [COLOUR_TO_GREY]


def test_a_photo_is_turned_upright():
    picture = to_picture(COLOUR)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    pixels, _ = decode_picture(encode(picture, "PNG", exif=exif), Form(6, 3))
    np.testing.assert_array_equal(pixels, np.rot90(COLOUR, -1, (1, 2)))


def test_the_central_square_is_kept_of_a_wide_and_of_a_tall_picture():
    wide = random_images(1, 3, 10)[0][:, :4]
    pixels, notes = decode_picture(png(wide), Form(4, 3))
    np.testing.assert_array_equal(pixels, wide[:, :, 3:7])
    tall, _ = decode_picture(png(wide.swapaxes(1, 2)), Form(4, 3))
    np.testing.assert_array_equal(tall, wide.swapaxes(1, 2)[:, 3:7])
    assert notes == []


def test_area_filter_averages_whole_blocks_and_is_named():
    image = random_images(1, 1, 8)[0]
    pixels, notes = decode_picture(png(image), Form(2, 1, "area"))
    means = image[0].reshape(2, 4, 2, 4).mean((1, 3))
    assert np.abs(pixels[0] - means).max() <= 1
    assert notes == ["resampled to 2×2 with the area filter"]


def test_lanczos_filter_keeps_a_flat_picture_flat_when_enlarging_and_reducing():
    for size in (3, 16):
        pixels, notes = decode_picture(png(np.full((3, 6, 6), 77, np.uint8)), Form(size, 3))
        assert (pixels == 77).all() and pixels.shape == (3, size, size)
        assert notes == [f"resampled to {size}×{size} with the lanczos filter"]


def test_damaged_and_foreign_files_are_corrupt():
    data = encode(to_picture(random_images(1, 3, 64)[0]), "JPEG")
    for broken in (b"", b"hello", data[: len(data) // 2], png(COLOUR)[:-30]):
        with pytest.raises(CorruptPicture):
            decode_picture(broken, Form(6, 3))


def test_a_decompression_bomb_is_refused_before_it_unpacks(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(CorruptPicture, match="decompression bomb"):
        decode_picture(png(random_images(1, 1, 16)[0]), Form(6, 3))


def test_pixels_of_unknown_range_are_refused():
    picture = Image.fromarray(np.ones((6, 6), np.float32))
    with pytest.raises(CorruptPicture, match="floating-point"):
        decode_picture(encode(picture, "TIFF"), Form(6, 3))
    picture = Image.fromarray(np.full((6, 6), 70000, np.int32))
    with pytest.raises(CorruptPicture, match="16 bits"):
        decode_picture(encode(picture, "TIFF"), Form(6, 3))
