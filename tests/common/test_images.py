"""The claims of common/images.py: the right pixels, or a sentence that says what a file is."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from common import images
from common.images import ImageError, read_image


def saved(image, form="TIFF", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        file, form, **options)
    return file.getvalue()


def png(depth, color, row, key):
    """A PNG of two pixels of which those of the colour `key` (uint16 each) are transparent."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, color, 0, 0, 0)),
              (b"tRNS", struct.pack(f">{len(key)}H", *key)), (b"IDAT", zlib.compress(b"\0" + row)),
              (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content
        + struct.pack(">I", zlib.crc32(name + content)) for name, content in chunks)


@pytest.mark.parametrize(("content", "pixels"), [
    (png(1, 0, b"\x80", [0]), [255, 255]), (png(1, 0, b"\x40", [1]), [0, 255]),
    (png(2, 0, b"\x60", [1]), [255, 170]), (png(2, 0, b"\x10", [3]), [0, 85]),
    (png(4, 0, b"\x36", [3]), [255, 102]), (png(8, 0, b"\3\4", [3]), [255, 4]),
    (png(16, 0, b"\1\1\3\3", [257]), [255, 3]), (png(16, 0, b"\1\1\3\3", [258]), [1, 3]),
    (png(8, 2, bytes([1, 2, 3, 3, 2, 1]), [1, 2, 3]), [255, (3, 2, 1)]),
    (png(16, 2, bytes([9, 1, 8, 0, 7, 0, 7, 0, 8, 0, 9, 0]), [0x901, 0x800, 0x700]),
     [255, (7, 8, 9)])])
def test_the_transparent_colour_of_a_png_is_white_and_no_other(content, pixels):
    found = np.asarray(read_image(content))[0]
    assert (found == [np.broadcast_to(pixel, 3) for pixel in pixels]).all(), found


@pytest.mark.parametrize(("kind", "values", "grey"), [
    ("f4", [0, 0.2, 1], [0, 51, 255]), ("f4", [0, 7.4, 255], [0, 7, 255]),
    ("f4", [-1, 0, 1], [0, 128, 255]), ("f4", [280, 300, 320], [0, 128, 255]),
    ("f4", [np.nan, 0.6, np.inf], [0, 153, 0]), ("f4", [np.nan] * 3, [0] * 3),
    ("f4", [-3e38, 0, 3e38], [0, 128, 255]), ("f4", [-7, -7, -7], [0] * 3),
    ("i4", [0, 1, 200], [0, 1, 200]), ("i4", [1000, 1500, 3000], [0, 64, 255]),
    ("i4", [-(2**31), 0, 2**31 - 1], [0, 128, 255]), ("u2", [0, 200, 255], [0, 200, 255]),
    ("u2", [0, 25700, 65535], [0, 100, 255]), (">u2", [0, 25700, 65535], [0, 100, 255])])
def test_pixels_of_16_and_32_bits_and_floats_are_scaled(kind, values, grey):
    content = saved(np.array([values], kind))
    assert np.asarray(read_image(content))[0].tolist() == [[value] * 3 for value in grey]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_a_deep_image_is_upright(form):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    content = saved(np.array([[0, 25700, 65535]], np.uint16), form, exif=exif)
    assert np.asarray(read_image(content))[:, 0, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("mode", ["CMYK", "LA", "PA", "YCbCr", "P", "RGBA"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new("RGB", (8, 8), (204, 204, 204))
    form = {"YCbCr": "JPEG", "P": "PNG"}.get(mode, "TIFF")
    assert np.abs(np.asarray(read_image(saved(image.convert(mode), form))) - 204.0).max() < 5


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abab\nsize 12345\n"
HTML = "<!DOCTYPE html><html>403</html>"


@pytest.mark.parametrize(("content", "what"), [
    (LFS, "a Git LFS pointer instead of an image: run git lfs pull"),
    *[(page, "an HTML page") for page in (
        HTML.encode(), HTML.encode("utf-8-sig"), HTML.encode("utf-16"), b"\n <HTML><BODY>",
        b"<!-- x -->\n<html lang='en'>", b"<head><title>Login</title>")],
    (b'{"error": "not found"}', "a JSON or XML document"), (b'["x"]', "a JSON or XML"),
    (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "a JSON or XML"),
    (b'<svg xmlns="x">', "an SVG"), (b'<?xml version="1.0"?>\n<!-- x -->\n<svg>', "an SVG"),
    (b"%PDF-1.7\n", "a PDF"), (b"\0\0\0\x20ftypisom\0\0", "a video"),
    (b"\x1a\x45\xdf\xa3\0", "a video"), (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "pillow-heif"),
    (b"<!>" * 500, "a JSON or XML"), (b"\0\0\0\x18ftypavif", "an unreadable image")])
def test_what_is_no_image_is_named(content, what, tmp_path, monkeypatch):
    monkeypatch.setitem(images.OTHERS, rb".{0,4}ftyp(hei|hev|mif1|msf1)",
                        "a HEIC image, which needs pillow-heif: pip install pillow-heif")
    (tmp_path / "a.jpg").write_bytes(content)
    for source in (content, tmp_path / "a.jpg"):
        with pytest.raises(ImageError) as caught:
            read_image(source, "a.jpg")
        assert what in caught.value.reason and str(caught.value).startswith("a.jpg is ")


def test_heic_is_read_where_pillow_heif_is():
    heif = pytest.importorskip("pillow_heif")
    assert "HEIF" in images.FORMATS and heif
    red = np.asarray(read_image(saved(Image.new("RGB", (64, 64), "red"), "HEIF")))
    assert np.abs(red - [255.0, 0, 0]).max() < 5


def test_a_device_is_not_read():
    with pytest.raises(ImageError, match="not a regular file"):
        read_image("/dev/zero")
