"""Picture files to pixels: whatever people have on their disks, upright, in RGB, in a square.

A square is made as CLIP and LLaVA make theirs: bicubic, the shorter sides padded with the grey that
CLIP sees as zero ("pad"), or the longer ones cut off ("crop").

Letters for shapes: M images, S pixels.
"""

import functools
import io
import re
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin

from common.config import UserError, one_line

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
MAX_PIXELS = 50_000_000  # a larger picture is refused before it is decoded
PADDING = tuple(int(255 * channel) for channel in MEAN)
SHARPNESS = 1.4  # a JPEG is decoded no finer than this many times the size it is wanted in
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # bytes; pictures come with stories
# What is decoded. Pillow knows more, among them PostScript, for which it starts another program.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO", "TGA",
           "PCX", "SGI")
MAX_SCANS = 100  # of a JPEG; cameras and web sites make 10, and each takes time of its own
WIDEST = 8  # times as wide as high, or the other way round; what is beyond is cut off


class ImageError(UserError):
    """A picture that cannot be used; `reason` says why in a few words, the message names it."""

    def __init__(self, reason, message):
        super().__init__(one_line(message, 500))  # names may come from a stranger's archive
        self.reason = reason


def read_image(source, name=None, size=0, how="pad", max_pixels=MAX_PIXELS):
    """A PIL image (RGB, upright) from a path or bytes; ImageError if it cannot be read.

    With a size it will be fitted into, a large JPEG is decoded at a half, a quarter or an eighth.
    """
    name = name or source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow only warns at a bomb; the check below refuses
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=formats()) as image:
                if image.format in ("JPEG", "MPO") and isinstance(source, bytes) and (
                        source.count(b"\xff\xda") > MAX_SCANS):
                    raise ImageError("an unreadable image", f"{name} is a JPEG of more than "
                                       f"{MAX_SCANS} scans, which only an attacker makes")
                width, height = image.size
                if width * height > max_pixels:
                    raise ImageError("an image that is too large", f"{name}: {width} x {height} "
                                       f"is more than {max_pixels / 10**6:g} megapixels")
                share = SHARPNESS * size / (max if how == "pad" else min)(width, height)
                if 0 < share < 1:
                    image.draft(None, (int(width * share) or 1, int(height * share) or 1))
                if image.mode.startswith("I"):  # 16 bits: convert() would clip them to white
                    image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
                image = ImageOps.exif_transpose(image)
                if image.mode in ("P", "LA", "PA", "RGBA"):  # transparent means white
                    image = image.convert("RGBA")
                    white = Image.new("RGBA", image.size, "white")
                    image = Image.alpha_composite(white, image)
                return image.convert("RGB")
    except FileNotFoundError:
        raise ImageError("a missing image", f"there is no picture {name}") from None
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("an image that is too large", f"{name}: {error}") from None
    except Exception as error:  # Pillow's many decoders raise whatever they stumble over
        kind = "a truncated" if "truncated" in str(error).lower() else "an unreadable"
        why = one_line(getattr(error, "strerror", None) or error)
        why = re.sub(r" ?<_io.*?>", "", why)  # bytes in memory have no name
        raise ImageError(f"{kind} image",
                           f"{name} is not a readable picture: {why}") from None


@functools.cache
def formats():
    """Those of FORMATS that this Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def fit(image, size, how="pad"):
    """The picture in a square of `size` pixels: padded ("pad") or its middle ("crop"); or all of
    it with its shorter side that long ("short")."""
    width, height = image.size
    if how == "pad":
        side = max(width, height)
        if side > 2 * WIDEST * size:  # a coarse, quick step first
            image = image.reduce(side // (WIDEST * size))
            width, height = image.size
            side = max(width, height)
        if width != height:
            square = blank(side)
            square.paste(image, ((side - width) // 2, (side - height) // 2))
            image = square
        return image if side == size else image.resize((size, size), Image.Resampling.BICUBIC)
    short = min(width, height)
    if max(width, height) > WIDEST * short:
        width, height = min(width, WIDEST * short), min(height, WIDEST * short)
        image = middle(image, width, height)
    if short != size:
        width, height = int(size * width / short), int(size * height / short)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image if how == "short" or width == height else middle(image, size, size)


def blank(size):
    """A picture of nothing, in the grey that CLIP sees as zero."""
    return Image.new("RGB", (size, size), PADDING)


def middle(image, width, height):
    """The middle of a picture, of that many pixels."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_pixels(images, size, how="pad"):
    """PIL images to one uint8 tensor (M, S, S, 3)."""
    return torch.from_numpy(np.stack([np.asarray(fit(image, size, how)) for image in images]))
