"""Reference images: what a sample's image or a picture to be drawn refers to, in the sizes the models know.

They keep their aspect, unlike training images; each has a size of its own. FLUX.2 takes references as they
are, up to an area; FLUX.1 Kontext was trained on 17 sizes of about a megapixel.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux_trainer.data.bad import BadSample
from flux_trainer.data.image import decode
from flux_trainer.data.sources.base import read

UNIT = 16  # pixels of a token, along each side

KONTEXT_SIZES = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
)
"""(width, height) in pixels."""

FLUX2_SIDE, FLUX2_SIDE_OF_SEVERAL = 2024, 1024
"""As in BFL's code; diffusers has 1024 in either case."""


def shrunk(image: Image.Image, side: int) -> Tensor:
    """An RGB image of at most side x side pixels' area, aspect kept, cut at the centre to multiples of 16.

    uint8 [3, H, W]. Smaller images keep their size. So does BFL's FLUX.2 code, which moreover refuses sides
    below 64 pixels and aspects above 8. Raises BadSample where a side comes to less than 16 pixels.
    """
    width, height = image.size
    if width * height > side * side:
        scale = sqrt(side * side / (width * height))
        width, height = int(width * scale), int(height * scale)
    if min(width, height) < UNIT:
        raise BadSample(f"a reference image of {image.width} x {image.height} pixels is too thin for a token")
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = width % UNIT // 2, height % UNIT // 2
    return _pixels(image.crop((left, top, left + width // UNIT * UNIT, top + height // UNIT * UNIT)))


def kontext(image: Image.Image) -> Tensor:
    """An RGB image in the one of Kontext's sizes that is nearest in aspect, bent to it: uint8 [3, H, W]."""
    aspect = image.width / image.height
    size = min(KONTEXT_SIZES, key=lambda size: abs(aspect - size[0] / size[1]))
    return _pixels(image.resize(size, Image.Resampling.LANCZOS))


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # [H, W, C] -> [C, H, W]


def load_reference(path: str, side: int | None, max_pixels: int) -> Tensor:
    """A reference image from its file, uint8 [3, H, W].

    Args:
        side: as of `shrunk`; None: as of `kontext`.

    Raises:
        BadSample: the file is no image, or one that cannot be taken; it is named.
    """
    data = read(path)
    try:
        image = decode(data, max_pixels, side or 0)
        return shrunk(image, side) if side else kontext(image)
    except BadSample as error:
        raise BadSample(f"{path}: {error}") from error


def published_side(family: str, count: int) -> int | None:
    """What a family takes for `side` of `load_reference` where a picture has `count` references."""
    if family == "flux1":
        return None
    return FLUX2_SIDE if count == 1 else FLUX2_SIDE_OF_SEVERAL
