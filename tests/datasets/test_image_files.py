"""Folders and zip archives of image files, and one image file to pixels."""

import concurrent.futures
import io
import os
import struct
import subprocess
import time
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from datasets import image_files
from datasets.image_files import COLOUR_TO_GREY, GREY_TO_COLOUR, FileTree, ImageSpec, fit_image, fit_images
from runtime.terminal import UserError
from tests.datasets.image_files import encode, png, random_images, write_folder, write_zip

COLOUR, GREY = random_images(1, 3, 6)[0], random_images(1, 1, 6)[0]
FILES = {"b/2.PNG": b"two", "a/1.jpg": b"one", "notes.txt": b"-", "__MACOSX/a/1.jpg": b"-", "a/._1.jpg": b"-",
         ".ipynb_checkpoints/1.png": b"-", "a/.git/3.png": b"-"}


def decode_image(data, spec):
    return fit_image(Image.open(io.BytesIO(data)), spec)


def make_trees(tmp_path, files):
    write_folder(tmp_path / "folder", files)
    write_zip(tmp_path / "images.zip", files)
    return FileTree(tmp_path / "folder"), FileTree(tmp_path / "images.zip")


def test_folder_and_zip_give_the_same_images_sorted_and_nothing_hidden(tmp_path):
    for tree in make_trees(tmp_path, FILES):
        assert tree.names == ["a/1.jpg", "b/2.PNG"]
        assert tree.read("b/2.PNG") == b"two"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_an_archive_holds_twice_is_one_image_the_last_as_when_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for content in (b"one", b"two"):
            archive.writestr("a.png", content)
    tree = FileTree(tmp_path / "x.zip")
    assert tree.names == ["a.png"] and tree.read("a.png") == b"two"


def test_no_image_is_one_sentence(tmp_path):
    for tree in make_trees(tmp_path, {"readme.txt": b"-"}):
        with pytest.raises(UserError, match=f"{tree.root.name} holds no images"):
            tree.names  # noqa: B018


def test_what_is_no_zip_is_named(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"PK but no more")
    with pytest.raises(UserError, match="x.zip is not a readable zip archive"):
        FileTree(tmp_path / "x.zip").names  # noqa: B018


def test_a_damaged_and_an_encrypted_member_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(range(200)) * 9)
    data = bytearray((tmp_path / "x.zip").read_bytes())
    start = 30 + len("a.png")
    for damage, message in ((lambda: data.__setitem__(slice(start, start + 9), b"\xff" * 9), "decompressing"),
                            (lambda: data.__setitem__(data.index(b"PK\x01\x02") + 8, 1), "encrypted")):
        damage()
        (tmp_path / "x.zip").write_bytes(data)
        with pytest.raises(UserError, match=f"corrupt image a.png in .*x.zip .*{message}"):
            FileTree(tmp_path / "x.zip").decode("a.png", ImageSpec(8, 3))


def test_a_file_that_would_fill_the_memory_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "LARGEST_FILE", 1000)
    for tree in make_trees(tmp_path, {"a.png": bytes(5000)}):
        with pytest.raises(UserError, match="corrupt image a.png .*5000 bytes are too many"):
            tree.decode("a.png", ImageSpec(6, 3))


def test_of_large_images_one_is_decoded_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "LARGE_IMAGE", 30)
    inside, most = [], []

    def fit(image, spec):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return None, []

    monkeypatch.setattr(image_files, "fit_image", fit)
    tree, _ = make_trees(tmp_path, {"a.png": png(COLOUR)})
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: tree.decode("a.png", ImageSpec(6, 3)), range(8)))
    assert max(most) == 1


@pytest.mark.parametrize(("place", "message"), [
    (os.mkfifo, "is not a regular file"), (lambda path: os.symlink("/dev/zero", path), "is not a regular file"),
    (lambda path: os.symlink(path.parent / "gone.png", path), "cannot be read")])
def test_a_pipe_a_device_or_a_dead_link_among_images_is_named_instead_of_read_for_ever(tmp_path, place, message):
    place(tmp_path / "a.png")
    assert FileTree(tmp_path).identity()
    with pytest.raises(UserError, match=f"a.png {message}"):
        FileTree(tmp_path).read("a.png")


def test_links_are_followed_and_a_circle_of_links_ends(tmp_path):
    write_folder(tmp_path, {"store/1.png": b"-", "set/a/2.png": b"-"})
    os.symlink(tmp_path / "store", tmp_path / "set/b")
    os.symlink(tmp_path / "set", tmp_path / "set/a/circle")
    assert FileTree(tmp_path / "set").names == ["a/2.png", "b/1.png"]


def test_a_folder_that_cannot_be_listed_does_not_renumber_the_classes(tmp_path, monkeypatch):
    write_folder(tmp_path, {"a/1.png": b"-", "b/2.png": b"-"})
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)  # permissions do not stop root
    with pytest.raises(UserError, match="/a cannot be listed: Permission denied"):
        FileTree(tmp_path).names  # noqa: B018


def test_a_folder_with_one_zip_stands_for_the_zip_and_two_are_named(tmp_path):
    write_zip(tmp_path / "ffhq-64x64.zip", {"a.png": b"-"})
    assert FileTree(tmp_path).root == tmp_path / "ffhq-64x64.zip"
    write_zip(tmp_path / "other.zip", {"a.png": b"-"})
    with pytest.raises(UserError, match="2 archives .ffhq-64x64.zip, other.zip.: name one"):
        FileTree(tmp_path)
    write_folder(tmp_path, {"b.png": b"-"})
    assert FileTree(tmp_path).root == tmp_path


def test_identity_changes_with_every_image_and_label_and_with_nothing_else(tmp_path):
    write_folder(tmp_path, {"a.png": b"-", "b.png": b"-"})
    seen = [FileTree(tmp_path).identity()]
    write_folder(tmp_path, {"notes.txt": b"-"})
    assert FileTree(tmp_path).identity() == seen[0]
    for change in ({"b.png": b"--"}, {"c.png": b"-"}, {"dataset.json": b"{}"}):
        write_folder(tmp_path, change)
        seen.append(FileTree(tmp_path).identity())
    assert len(set(seen)) == len(seen)


def test_a_file_written_anew_with_its_old_size_and_time_is_another(tmp_path):
    write_folder(tmp_path, {"a.png": b"one"})
    before, status = FileTree(tmp_path).identity(), os.stat(tmp_path / "a.png")
    time.sleep(0.02)  # more than a tick of the file system's clock
    write_folder(tmp_path, {"a.png": b"two"})
    os.utime(tmp_path / "a.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert FileTree(tmp_path).identity() != before


@pytest.mark.parametrize(("array", "channels"), [(COLOUR, 1), (GREY, 3), (COLOUR, 3)])
def test_an_array_and_a_file_of_the_same_image_are_read_alike(array, channels):
    expected, notes = decode_image(png(array), ImageSpec(4, channels))
    found, counts = fit_images(array[None], ImageSpec(4, channels))
    np.testing.assert_array_equal(found, expected[None])
    assert dict(counts) == dict.fromkeys(notes, 1)


def to_image(image):
    return Image.fromarray(image.transpose(1, 2, 0))


def png_16_bit_colour(values):
    """Return uint16 (3, H, W) as a 16-bit RGB PNG, which Pillow cannot write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values.transpose(1, 2, 0))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", values.shape[2], values.shape[1], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


TRANSPARENT = "transparent, composited on white"
VALUES = np.array([[0, 257, 128 * 257], [65535, 300, 40000], [1, 65534, 129]], np.uint16)
WIDE, EIGHT, FLAT = random_images(1, 3, 10)[0][:, :4], random_images(1, 1, 8)[0], np.full((3, 6, 6), 77, np.uint8)
FOUR_COLOURS = np.kron(random_images(1, 3, 2)[0], np.ones((1, 3, 3), np.uint8))
TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be turned clockwise by 90 degrees
HOLE = Image.new("P", (2, 2))
HOLE.putpalette([200, 0, 0, 0, 100, 0])
HOLE.putpixel((1, 1), 1)


def flat_cmyk(colour):
    return encode(Image.new("RGB", (8, 8), colour).convert("CMYK"), "JPEG", quality=95)


@pytest.mark.parametrize(("data", "spec", "expected", "tolerance", "notes"), [
    pytest.param(*row, id=name) for name, *row in (
        ("of the right size", encode(to_image(COLOUR), "PNG"), ImageSpec(6, 3), COLOUR, 0, []),
        ("alpha without holes", encode(to_image(COLOUR).convert("RGBA"), "PNG"), ImageSpec(6, 3), COLOUR, 0, []),
        ("grey as colour", png(GREY), ImageSpec(6, 3), GREY.repeat(3, 0), 0, [GREY_TO_COLOUR]),
        ("colour as luma", png(COLOUR), ImageSpec(6, 1), np.tensordot([[0.299, 0.587, 0.114]], COLOUR.astype(float), 1),
         1, [COLOUR_TO_GREY]),
        ("16-bit grey over its whole range", encode(Image.fromarray(VALUES), "PNG"), ImageSpec(3, 1),
         np.round(VALUES / 257)[None], 0, ["16-bit grey, divided by 257"]),
        ("16-bit colour", png_16_bit_colour(COLOUR.astype(np.uint16) * 257), ImageSpec(6, 3), COLOUR, 0, []),
        ("palette", encode(to_image(FOUR_COLOURS).quantize(4), "PNG"), ImageSpec(6, 3), FOUR_COLOURS, 1, []),
        ("transparent palette colour", encode(HOLE, "PNG", transparency=1), ImageSpec(2, 3),
         np.array([[[200, 200], [200, 255]], [[0, 0], [0, 255]], [[0, 0], [0, 255]]]), 0, [TRANSPARENT]),
        ("CMYK is not inverted", flat_cmyk((200, 60, 30)), ImageSpec(8, 3),
         np.array([200, 60, 30])[:, None, None].repeat(8, 1).repeat(8, 2), 4, []),
        ("CMYK as grey", flat_cmyk((100,) * 3), ImageSpec(8, 1), np.full((1, 8, 8), 100), 4, [COLOUR_TO_GREY]),
        ("photo upright", encode(to_image(COLOUR), "PNG", exif=TURNED), ImageSpec(6, 3),
         np.rot90(COLOUR, -1, (1, 2)), 0, []),
        ("centre of a wide one", png(WIDE), ImageSpec(4, 3), WIDE[:, :, 3:7], 0, ["cropped to the central square"]),
        ("centre of a tall one", png(WIDE.swapaxes(1, 2)), ImageSpec(4, 3), WIDE.swapaxes(1, 2)[:, 3:7], 0,
         ["cropped to the central square"]),
        ("means of blocks", png(EIGHT), ImageSpec(2, 1, "area"), EIGHT.reshape(1, 2, 4, 2, 4).mean((2, 4)), 1,
         ["resampled to 2×2 with the area filter"]),
        *((f"flat at {size} pixels", png(FLAT), ImageSpec(size, 3), np.full((3, size, size), 77), 0,
           [f"resampled to {size}×{size} with the lanczos filter"]) for size in (3, 16)),
    )])
def test_an_image_is_read_as_it_looks_and_its_conversions_are_told(data, spec, expected, tolerance, notes):
    pixels, found = decode_image(data, spec)
    assert pixels.dtype == np.uint8 and pixels.shape == expected.shape and found == notes
    assert np.abs(pixels.astype(float) - expected).max() <= tolerance


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_places_are_white_and_half_transparent_ones_mixed(mode):
    image = Image.new("RGBA", (3, 3), (10, 10, 10, 255))
    image.putpixel((1, 0), (10, 10, 10, 0))
    image.putpixel((2, 0), (10, 10, 10, 128))
    pixels, notes = decode_image(encode(image.convert(mode), "PNG"), ImageSpec(3, 3))
    assert pixels[:, 0, :2].tolist() == [[10, 255]] * 3
    assert np.abs(pixels[:, 0, 2].astype(int) - round(10 * 128 / 255 + 255 * 127 / 255)).max() <= 1
    assert TRANSPARENT in notes


JPEG = encode(to_image(random_images(1, 3, 64)[0]), "JPEG")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(("data", "message"), [
    *((data, "corrupt image x.png") for data in (b"", b"hello", JPEG[: len(JPEG) // 2], png(COLOUR)[:-30])),
    (EPS, "corrupt image x.png in .* .not an image."), (png(random_images(1, 1, 101)[0]), "decompression bomb"),
    (encode(Image.fromarray(np.ones((6, 6), np.float32)), "TIFF"), "floating-point"),
    (encode(Image.fromarray(np.full((6, 6), 70000, np.int32)), "TIFF"), "16 bits"),
])
def test_what_is_no_image_is_refused_and_neither_unpacked_nor_started(tmp_path, monkeypatch, data, message):
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: pytest.fail(f"started {arguments}"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    write_folder(tmp_path, {"x.png": data})
    with pytest.raises(UserError, match=message):
        FileTree(tmp_path).decode("x.png", ImageSpec(6, 3))
