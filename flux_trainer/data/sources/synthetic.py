"""Samples out of nothing."""

from __future__ import annotations

from collections import Counter

import torch
from PIL import Image

from flux_trainer.data.sources.base import Fingerprint, RawSample
from flux_trainer.flow.rng import Purpose, uniform


class SyntheticSource:
    """Smooth random colours, the same in every run: for benchmarks, and to try a setup without data."""

    PATCHES = 16

    def __init__(self, size: int) -> None:
        self.name = "synthetic"
        self.size = size
        self.fingerprint = Fingerprint(size)
        self.passed_over: Counter[str] = Counter()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> RawSample:
        shape = (self.PATCHES, self.PATCHES, 3)
        colours = uniform(0, Purpose.SYNTHETIC, torch.tensor([index]), shape)[0] * 256
        name = f"synthetic sample {index}"
        return RawSample(Image.fromarray(colours.to(torch.uint8).numpy()), name, name)
