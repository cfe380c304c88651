"""One picture file to pixels: every mode that PNG, JPEG and friends have, cropped and resampled once."""

import io

import numpy as np
from PIL import Image, ImageOps

from datasets.source import COLOUR_TO_GREY, FILTERS, GREY_TO_COLOUR

_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")


class CorruptPicture(Exception):
    """A file that is no usable picture; its text says why."""


def decode_picture(data, form):
    """Return the pixels of an encoded picture, uint8 `(C, size, size)`, and a list of notes on conversions.

    The picture is turned upright (EXIF), laid on white where it is transparent, reduced to 8 bits, cropped to its
    central square and resampled to `form`. Raises `CorruptPicture` for bytes that are no picture, damaged ones and
    decompression bombs (more than twice Pillow's limit of 89 million pixels).
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            picture, notes = _to_channels(upright, form.channels)
    except CorruptPicture:
        raise
    except Image.DecompressionBombError as error:
        raise CorruptPicture(f"a decompression bomb: {error}") from None
    except MemoryError:
        raise CorruptPicture("it does not fit in memory") from None
    except Exception as error:  # Pillow's plugins raise what they like for damaged files
        raise CorruptPicture(_reason(error)) from None
    if picture.size != (form.size, form.size):
        picture = _centre_square(picture)
        if picture.width != form.size:
            notes.append(f"resampled to {form.size}×{form.size} with the {form.resample} filter")
            picture = picture.resize((form.size, form.size), FILTERS[form.resample])
    pixels = np.asarray(picture)
    return (pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)), notes


def _to_channels(picture, channels):
    """Return the picture in mode L (one channel) or RGB (three), 8 bits and opaque, and notes."""
    notes = []
    grey = picture.mode in _GREY_MODES
    if picture.mode.startswith("I"):
        picture = _reduce_to_8_bits(picture)
        notes.append("16-bit grey, divided by 257")
    elif picture.mode == "F":
        raise CorruptPicture("its pixels are floating-point numbers of unknown range")
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        picture, transparent = _lay_on_white(picture)
        if transparent:
            notes.append("transparent, laid on white")
    if channels == 3:
        if grey:
            notes.append(GREY_TO_COLOUR)
        return picture.convert("RGB"), notes
    if not grey:
        notes.append(COLOUR_TO_GREY)
        picture = picture.convert("RGB")  # CMYK has no direct way to grey
    return picture.convert("L"), notes


def _reduce_to_8_bits(picture):
    """Return a 16-bit grey picture in mode L: `round(v / 257)` takes 0..65535 to 0..255 (Pillow would clip)."""
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise CorruptPicture("its pixels have more than 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _lay_on_white(picture):
    """Return the picture in RGB over a white ground, and whether any of it was transparent."""
    rgba = picture.convert("RGBA")
    opacity, _ = rgba.getchannel("A").getextrema()
    ground = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(ground, rgba).convert("RGB"), opacity < 255


def _centre_square(picture):
    """Return the central square of the picture, as large as its shorter side."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def _reason(error):
    """Return what Pillow says, without the memory address of the buffer."""
    text = (str(error).splitlines() or [""])[0]
    return "not a picture" if not text or text.startswith("cannot identify") else text
