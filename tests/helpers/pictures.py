"""Comparing what a source reads with the picture that was written."""

from __future__ import annotations

import numpy as np
from PIL import Image

from flux_trainer.data.image import decode
from flux_trainer.data.sources import RawSample


def same(sample: RawSample, expected: Image.Image) -> bool:
    return np.array_equal(np.array(decode(sample.image, 10**6)), np.array(expected))
