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

from flux_trainer.data.bad import BadSample, DataError
from flux_trainer.data.image import decode
from flux_trainer.data.sources import read

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


def shrunk(image: Image.Image, side: int, flip: bool = False) -> Tensor:
    """An RGB image of at most side x side pixels' area, aspect kept, cut at the centre to multiples of 16.

    uint8 [3, H, W]. Smaller images keep their size. That is how BFL's FLUX.2 code does it. Raises BadSample
    where a side comes to less than 16 pixels.
    """
    width, height = image.size
    if width * height > side * side:
        scale = sqrt(side * side / (width * height))
        width, height = int(width * scale), int(height * scale)
        if min(width, height) >= UNIT:
            image = image.resize((width, height), Image.Resampling.LANCZOS)
    if min(width, height) < UNIT:
        raise BadSample(f"a reference image of {image.width} x {image.height} pixels is too thin for a token")
    left, top = width % UNIT // 2, height % UNIT // 2
    image = image.crop((left, top, left + width // UNIT * UNIT, top + height // UNIT * UNIT))
    return _pixels(image, flip)


def read_reference(path: str, count: int, *, family: str, side: int | None, max_pixels: int) -> Tensor:
    """What a picture refers to, from a file, uint8 [3, H, W].

    Args:
        count: of the references that the picture has.
        family: of the model that draws it.
        side: as in `shrunk`; None: the size that was published for the family.

    Raises:
        DataError: the file is no image, or one that cannot be taken; it is named.
    """
    try:
        image = decode(read(path), max_pixels)
        if side is None and family == "flux1":
            return kontext(image)
        return shrunk(image, side or (FLUX2_SIDE if count == 1 else FLUX2_SIDE_OF_SEVERAL))
    except BadSample as error:
        raise DataError(f"{path}: {error}") from error


def kontext(image: Image.Image) -> Tensor:
    """An RGB image in the one of Kontext's sizes that is nearest in aspect, bent to it: uint8 [3, H, W]."""
    aspect = image.width / image.height
    size = min(KONTEXT_SIZES, key=lambda size: abs(aspect - size[0] / size[1]))
    return _pixels(image.resize(size, Image.Resampling.LANCZOS))


def _pixels(image: Image.Image, flip: bool = False) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [H, W, C] -> [C, H, W]
    return pixels.flip(2) if flip else pixels.contiguous()
