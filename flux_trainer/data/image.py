"""From the bytes of an image file to a square RGB tensor.

`decode` turns whatever people keep in their folders (photographs with an orientation tag, transparency,
palettes, CMYK, 16 bits) into plain RGB and refuses what is broken or too large; `square` cuts and resizes.
Both are pure functions: where to cut and whether to mirror is the caller's to decide.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from flux_trainer.data.bad import BadSample
from flux_trainer.data.metadata import without_metadata

# Raster formats only: Pillow would also open PostScript (by starting a program) and containers whose header
# hides the size of the image inside.
Image.init()
KNOWN = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")
FORMATS: list[str] = [name for name in KNOWN if name in Image.OPEN]  # no AVIF before Pillow 11.3
EXTENSIONS = frozenset(ending for ending, name in Image.registered_extensions().items() if name in FORMATS)

# `max_pixels`, held against the header before anything is decoded, stands in for Pillow's own fixed limit,
# which warns at 89 and fails at 179 megapixels.
Image.MAX_IMAGE_PIXELS = None

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image upright, by the orientation in its metadata."""
_SIGNED, _WHITE_IS_ZERO = 2, 0  # values of a TIFF's SampleFormat and PhotometricInterpretation


def decode(image: bytes | Image.Image, max_pixels: int, size: int = 0) -> Image.Image:
    """Decode a file's bytes (or take a decoded image) to RGB, upright, transparency composited on white.

    Only the pixels and the orientation count: other metadata may be broken, and of any length.

    Args:
        size: the side of the square that will be cut; a JPEG is then decoded at 1/2, 1/4 or 1/8 scale where
            at least twice that side remains.

    Raises:
        BadSample: it is no image, truncated, over `max_pixels`, or its numbers have no agreed range.
    """
    # Broken files make Pillow raise nearly anything (OSError, SyntaxError, ValueError, struct.error, ...).
    # All of it is a fact about this file, and is reported as such.
    try:
        if isinstance(image, bytes):
            image = _open(image)
        width, height = image.size
        if width * height > max_pixels:
            raise BadSample(f"image too large: {width} x {height} pixels, data.max_pixels is {max_pixels}")
        if size:
            image.draft(None, (2 * size, 2 * size))
        image.load()
        rgb, turn = to_rgb(image), _UPRIGHT.get(_orientation(image))
        return rgb if turn is None else rgb.transpose(turn)
    except BadSample:
        raise
    except Exception as error:
        raise BadSample(f"corrupt image: {str(error) or type(error).__name__}") from error


def _open(data: bytes) -> Image.Image:
    """The image in a file's bytes, its header read."""
    try:
        return Image.open(io.BytesIO(without_metadata(data)), formats=FORMATS)
    except UnidentifiedImageError as error:
        looks_like = [
            name for name in FORMATS if (accept := Image.OPEN[name][1]) and accept(data[:16]) is True
        ]
        detail = f"no known image format; these are {', '.join(FORMATS)}"
        if looks_like:
            detail = f"this {looks_like[0]} has a broken header, or pixels of a kind that is not read"
        raise BadSample(f"corrupt image: {detail}") from error


def _orientation(image: Image.Image) -> int:
    """The orientation in a loaded image's metadata, 1 if none can be read. Pillow has applied a TIFF's."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of any kind, as above; the pixels are good all the same
        return 1
    return orientation if isinstance(orientation, int) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as 8-bit RGB; what is transparent becomes white.

    Raises:
        BadSample: the pixels are numbers of a kind for which it is not agreed which one is white.
    """
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode == "F":
        raise _no_range("floating-point numbers")
    if _SIGNED in tags.get(TiffImagePlugin.SAMPLEFORMAT, ()):
        raise _no_range("signed integers")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # these have 16 bits at most
        raise _no_range("32-bit integers")
    if image.mode.startswith("I"):
        image = _grey(image, tags)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _no_range(numbers: str) -> BadSample:
    return BadSample(f"pixels of {numbers} have no agreed range: save the image with 8 or 16 bits")


def _grey(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Grey of 16 bits (a TIFF: or of 12) as grey of 8, with alpha where one number stands for transparent."""
    white = 4095 if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,) else 65535
    numbers = np.asarray(image).astype(np.uint32)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:  # Pillow inverts 8 bits only
        numbers = white - numbers
    grey = Image.fromarray(((numbers * 255 + white // 2) // white).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(numbers == transparent, 0, 255).astype(np.uint8)))
    return grey


def square(image: Image.Image, size: int, position: float = 0.5, flip: bool = False) -> Tensor:
    """The largest square of an RGB image, resized to `size`: uint8 [3, size, size].

    `position` in [0, 1] says where along the longer side the square lies (0.5: the centre). The filter is
    Lanczos, widened when shrinking, so that nothing aliases.
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) * position, (height - side) * position  # one of them is 0
    box = (left, top, left + side, top + side)
    image = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [H, W, C] -> [C, H, W]
    return pixels.flip(2) if flip else pixels.contiguous()
