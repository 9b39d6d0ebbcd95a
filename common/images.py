"""Image files to pixels: decoded, upright, in RGB, fitted into a square.

A square is made as in CLIP and LLaVA: bicubic, with the shorter side padded in the grey that CLIP
normalizes to zero ("pad"), or the longer side cropped ("crop").

Shapes: M images, S pixels.
"""

import contextlib
import io
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin

from common.config import UserError, one_line

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
PADDING = tuple(int(255 * channel) for channel in MEAN)
MAX_PIXELS = 50_000_000  # a larger image is refused before it is decoded
MAX_SCANS = 100  # of a JPEG; usual files have about 10, and each costs decoding time
SHARPNESS = 1.4  # a JPEG is decoded at no less than this many times the wanted size
WIDEST = 8  # aspect ratio; what is beyond it is cropped
# The decoders in use. Pillow has more, among them PostScript, which starts another program.
Image.init()
with contextlib.suppress(ImportError):
    __import__("pillow_heif").register_heif_opener()
FORMATS = [name for name in ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "HEIF", "BMP", "TIFF", "PPM",
                             "JPEG2000", "ICO", "TGA", "PCX", "SGI") if name in Image.OPEN]
# The transparent colour of a PNG, from the file's bit depth to Pillow's 8 bits.
KEYS = {"L;2": lambda key: key * 85, "L;4": lambda key: key * 17,
        "RGB;16B": lambda key: tuple(channel >> 8 for channel in key)}
# What stands in the place of images: {its beginning, in lower case without NULs: what it is}.
OTHERS = {
    rb"version https://git-lfs": "a Git LFS pointer instead of an image: run git lfs pull",
    rb"(<[?!][^>]*>|\s)*<svg": "an SVG drawing: save it as PNG",
    rb"<!doctype html|(<[?!][^>]*>|\s)*<(html|head|body|title|script|meta)":
        "an HTML page instead of an image: download it again",
    rb"[<{\[]": "a JSON or XML document instead of an image: download it again",
    rb"%pdf": "a PDF document: save its pages as PNG",
    rb".{0,4}ftyp(hei|hev|mif1|msf1)": "HEIF" not in FORMATS and
        "a HEIC image, which needs pillow-heif: pip install pillow-heif",
    rb".{0,4}ftyp(?!avi)|\x1ae\xdf\xa3": "a video: save its frames as images",
}
warnings.filterwarnings("ignore", module="PIL")  # of large images, which are refused, and more
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # bytes of text in a PNG


class ImageError(UserError):
    """An image that cannot be used; `reason` says why in a few words, the message names it."""

    def __init__(self, reason, message):
        super().__init__(one_line(message, 500))  # the name may come from an untrusted archive
        self.reason = reason


def read_image(source, name=None, size=0, how="pad", max_pixels=MAX_PIXELS):
    """A PIL image (RGB, upright) from a path or bytes; ImageError if it cannot be read.

    With the size it will be fitted into, a large JPEG is decoded at a half, quarter or eighth.
    """
    name, content = name or source, b""
    try:
        content = source if isinstance(source, bytes) else read_file(Path(source).expanduser())
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError("an image that is too large", f"{name}: {width} x {height} is more"
                                 f" than {max_pixels / 10**6:g} megapixels")
            if image.format in ("JPEG", "MPO") and content.count(b"\xff\xda") > MAX_SCANS:
                raise ImageError("an unreadable image",
                                 f"{name} is a JPEG of more than {MAX_SCANS} scans")
            scale = SHARPNESS * size / (max if how == "pad" else min)(image.size)
            if 0 < scale < 1:
                image.draft(None, tuple(int(side * scale) or 1 for side in image.size))
            return to_rgb(image)
    except FileNotFoundError:
        raise ImageError("a missing image", f"there is no image {name}") from None
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("an image that is too large", f"{name}: {error}") from None
    except Exception as error:  # Pillow's decoders raise many types
        if what := other(content[:1024]):
            raise ImageError(what, f"{name} is {what}") from None
        kind = "a truncated" if "truncated" in str(error).lower() else "an unreadable"
        why = re.sub(r" ?<_io.*?>", "", one_line(getattr(error, "strerror", None) or error))
        raise ImageError(f"{kind} image", f"{name} is not a readable image: {why}") from None


def read_file(path):
    """The bytes of a file; OSError for a pipe or device, which may never end."""
    if path.exists() and not path.is_file():
        raise OSError("not a regular file")
    return path.read_bytes()


def other(start):
    """What a file with this beginning is instead of an image, and what to do; "" if unknown."""
    text = start.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n").lower()
    return next((what for form, what in OTHERS.items() if re.match(form, text, re.DOTALL)), "")


def to_rgb(image):
    """An opened PIL image upright and in RGB, transparency on white."""
    key = image.info.get("transparency")
    if image.format == "PNG" and key is not None and image.tile and image.tile[0][3] in KEYS:
        image.info["transparency"] = KEYS[image.tile[0][3]](key)
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        deep = np.asarray(image)
        image = Image.fromarray(np.where(deep == key, np.uint8(255), to_8_bits(deep)))
    if image.has_transparency_data:  # of a channel, a palette or one colour
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def to_8_bits(deep):
    """Grey of 16 or 32 bits or floats (an array) in uint8, by what it holds.

    Floats of 0 to 1 are multiplied by 255, values of 0 to 255 stay, those of 16 bits are divided by
    257. Others are scaled from the least, black, to the greatest. What is not finite is black.
    """
    finite, values = np.isfinite(deep), deep.astype(np.float64)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0, 0)
    usual = {1: deep.dtype.kind == "f", 255: True, 65535: deep.itemsize == 2}
    ranges = [top for top, fits in usual.items() if fits and low >= 0 and high <= top]
    if ranges:
        low, high = 0, ranges[0]
    values[~finite] = low
    return ((values - low) * (255 / (high - low or 1))).round().astype(np.uint8)


def fit(image, size, how="pad"):
    """The image in a square of `size` pixels, padded ("pad") or center-cropped ("crop"), or with
    its shorter side resized to `size` ("short")."""
    if how == "pad":
        if max(image.size) > 2 * WIDEST * size:  # first a coarse, fast step
            image = image.reduce(max(image.size) // (WIDEST * size))
        side = max(image.size)
        if image.width != image.height:
            square = blank(side)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        return image if side == size else image.resize((size, size), Image.Resampling.BICUBIC)
    short = min(image.size)
    if max(image.size) > WIDEST * short:
        image = middle(image, *(min(side, WIDEST * short) for side in image.size))
    if short != size:
        sides = tuple(int(size * side / short) for side in image.size)
        image = image.resize(sides, Image.Resampling.BICUBIC)
    return image if how == "short" or image.width == image.height else middle(image, size, size)


def blank(size):
    """An empty image, in the grey that CLIP normalizes to zero."""
    return Image.new("RGB", (size, size), PADDING)


def middle(image, width, height):
    """The center crop of an image."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_pixels(images, size, how="pad"):
    """PIL images to one uint8 tensor (M, S, S, 3)."""
    return torch.from_numpy(np.stack([np.asarray(fit(image, size, how)) for image in images]))
