"""From the bytes of an image file to a square RGB tensor.

`decode` turns whatever people keep in their folders (photographs with an orientation tag, transparency,
palettes, CMYK, 16 bits) into plain RGB and refuses what is broken or too large; `square` cuts and resizes.
Both are pure functions: where to cut and whether to mirror is the caller's to decide.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from flux_trainer.data.bad import BadSample

# Raster formats only: Pillow would also open PostScript (by starting a program) and containers whose header
# hides the size of the image inside.
Image.init()
KNOWN = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")
FORMATS: list[str] = [name for name in KNOWN if name in Image.OPEN]  # no AVIF before Pillow 11.3
EXTENSIONS = frozenset(ending for ending, name in Image.registered_extensions().items() if name in FORMATS)

# `max_pixels`, held against the header before anything is decoded, stands in for Pillow's own fixed limit,
# which warns at 89 and fails at 179 megapixels.
Image.MAX_IMAGE_PIXELS = None


def decode(image: bytes | Image.Image, max_pixels: int, size: int = 0) -> Image.Image:
    """Decode a file's bytes (or take a decoded image) to RGB, upright, transparency composited on white.

    `size`: the side of the square that will be cut; a JPEG is then decoded at 1/2, 1/4 or 1/8 scale where at
    least twice that side remains. Raises BadSample for what is no image, truncated, or over `max_pixels`.
    """
    # Broken files make Pillow raise nearly anything (OSError, SyntaxError, ValueError, struct.error, ...).
    # All of it is a fact about this file, and is reported as such.
    try:
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image), formats=FORMATS)
        width, height = image.size
        if width * height <= max_pixels:
            if size:
                image.draft(None, (2 * size, 2 * size))
            ImageOps.exif_transpose(image, in_place=True)  # decodes
            return to_rgb(image)
    except Exception as error:
        detail = "no known image format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BadSample(f"corrupt image: {detail or type(error).__name__}") from error
    raise BadSample(f"image too large: {width} x {height} pixels, data.max_pixels is {max_pixels}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as 8-bit RGB; what is transparent becomes white."""
    if image.mode.startswith("I"):  # 16 bits a pixel, stored as "I;16", "I;16B" or "I"
        grey = np.asarray(image).astype(np.float64) / 257  # 65535 -> 255
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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
