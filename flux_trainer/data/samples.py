"""From a draw to the sample that is trained on, and from a number to the sample that is validated on.

All that is random about a training sample (crop, flip, caption dropout, the substitute for a bad one) is a
function of the seed and the draw. So a draw is the same whoever loads it, and a bad sample changes no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux_trainer.config.pictures import reference_side
from flux_trainer.config.schema import Data, Source
from flux_trainer.data.bad import BadRecord, BadSample, DataError
from flux_trainer.data.image import decode, square
from flux_trainer.data.reference import load_reference
from flux_trainer.data.sampler import Mixture
from flux_trainer.data.sources import ImageSource, open_source
from flux_trainer.flow.rng import Purpose, scalar

MAX_ATTEMPTS = 16  # at 5 % bad samples, 16 in a row happen once in 10^21 draws


@dataclass
class Sample:
    """One sample. `valid` is False only where validation has nothing to show: `image` is then blank."""

    draw: int
    image: Tensor  # uint8 [3, S, S]
    caption: str  # as in the data: dropout is in the two flags
    drop_t5: bool = False
    drop_clip: bool = False
    valid: bool = True
    references: list[Tensor] = field(default_factory=list)  # uint8 [3, H, W], each of its own size
    bad: list[BadRecord] = field(default_factory=list)  # what had been tried before


@dataclass
class Batch:
    """Samples side by side."""

    draws: Tensor  # int64 [n]
    images: Tensor  # uint8 [n, 3, S, S]
    captions: list[str]
    drop_t5: Tensor  # bool [n]: the caption counts as empty for T5
    drop_clip: Tensor  # bool [n]: ... for CLIP
    valid: Tensor  # bool [n]: False: padding or a bad validation sample
    bad: list[BadRecord]  # met while loading this batch
    bad_draws: int  # draws whose own sample was bad
    tokens: dict[str, Tensor] = field(default_factory=dict)  # the captions' ids for each text encoder
    reference_sizes: list[list[tuple[int, int]]] = field(default_factory=list)  # by sample: (H, W); or empty
    reference_pixels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.uint8))  # one by one

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Batch:
        """Put samples of one image size together."""
        return cls(
            draws=torch.tensor([s.draw for s in samples], dtype=torch.int64),
            images=torch.stack([s.image for s in samples]),
            captions=[s.caption for s in samples],
            drop_t5=torch.tensor([s.drop_t5 for s in samples]),
            drop_clip=torch.tensor([s.drop_clip for s in samples]),
            valid=torch.tensor([s.valid for s in samples]),
            bad=[record for s in samples for record in s.bad],
            bad_draws=sum(bool(s.bad) for s in samples),
            reference_sizes=[[(x.shape[1], x.shape[2]) for x in s.references] for s in samples],
            reference_pixels=torch.cat(
                [torch.zeros(0, dtype=torch.uint8), *(x.flatten() for s in samples for x in s.references)]
            ),
        )

    def references(self, device: torch.device | str = "cpu") -> list[list[Tensor]]:
        """The reference images of each sample, uint8 [3, H, W], sent to `device` in one piece."""
        pixels = self.reference_pixels.to(device, non_blocking=True)
        images: list[list[Tensor]] = []
        start = 0
        for sizes in self.reference_sizes or [[] for _ in self.captions]:
            images.append([])
            for height, width in sizes:
                end = start + 3 * height * width
                images[-1].append(pixels[start:end].view(3, height, width))
                start = end
        return images

    # Between processes a tensor is a shared file, which costs more than a copy for all but the images.
    def __getstate__(self) -> dict[str, Any]:
        state = {
            k: v.numpy() if isinstance(v, Tensor) and k not in ("images", "reference_pixels") else v
            for k, v in vars(self).items()
        }
        return state | {"tokens": {k: v.numpy() for k, v in self.tokens.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(
            {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state.items()}
        )
        self.tokens = {k: torch.from_numpy(v) for k, v in state["tokens"].items()}

    def pin_memory(self) -> Batch:
        """In page-locked memory, from where a GPU copies without waiting. Called by the loader."""
        for name in ("draws", "images", "drop_t5", "drop_clip", "valid", "reference_pixels"):
            setattr(self, name, getattr(self, name).pin_memory())
        self.tokens = {name: ids.pin_memory() for name, ids in self.tokens.items()}
        return self


class TrainSamples:
    """draw -> Sample, out of a mixture. Raises DataError if no substitute is any good either."""

    def __init__(
        self,
        section: Data,
        mixture: Mixture,
        *,
        image_size: int,
        seed: int,
        dropout_prob: float,
        joint_dropout: bool,
    ) -> None:
        self.mixture = mixture
        self.image_size = image_size
        self.seed = seed
        self.crop, self.flip_prob = section.crop, section.flip_prob
        self.limits = Limits.of(section, image_size)
        self.dropout_prob, self.joint_dropout = dropout_prob, joint_dropout

    def get(self, draw: int) -> Sample:
        """The sample of one draw: the same image, caption and flags wherever and whenever it is asked for."""
        bad: list[BadRecord] = []
        for attempt in range(MAX_ATTEMPTS):
            source, index = self.mixture.substitute(draw, attempt) if attempt else self.mixture.locate(draw)
            try:
                return self._finish(draw, load(self.mixture.sources[source], index, self.limits), bad)
            except BadSample as error:
                bad.append(BadRecord(self.mixture.sources[source].name, index, str(error)))
        reasons = "\n".join(f"  {record}" for record in dict.fromkeys(bad))
        raise DataError(f"Draw {draw} and {MAX_ATTEMPTS - 1} substitutes were all bad samples:\n{reasons}")

    def _finish(self, draw: int, loaded: Loaded, bad: list[BadRecord]) -> Sample:
        position = scalar(self.seed, Purpose.CROP, draw) if self.crop == "random" else 0.5
        flip = scalar(self.seed, Purpose.FLIP, draw) < self.flip_prob
        elements = (0, 0) if self.joint_dropout else (0, 1)
        drop_t5, drop_clip = (
            scalar(self.seed, Purpose.DROPOUT, draw, element) < self.dropout_prob for element in elements
        )
        pixels = square(loaded.image, self.image_size, position, flip)
        references = [image.flip(2) if flip else image for image in loaded.references]
        return Sample(draw, pixels, loaded.caption, drop_t5, drop_clip, references=references, bad=bad)


class ValidationSamples:
    """i -> Sample for i = 0, 1, ..., `count` - 1: fixed images, cut at the centre, not flipped, no dropout.

    They are the sources' samples in order or, where `count` is less, as many at even distances, so that a
    sorted folder is represented from end to end. A bad sample, and an i past the end, is blank, not `valid`.
    """

    def __init__(self, sections: Sequence[Source], *, count: int, image_size: int, data: Data) -> None:
        """`count` of -1: all. Raises DataError for an empty list, and for weights and repeats."""
        if not sections:
            raise DataError("There is no validation data: give at least one [[validation.sources]] table.")
        if any(section.weight is not None or section.repeats != 1 for section in sections):
            raise DataError("Validation reads every sample once: remove weight and repeats from its sources.")
        self.sources: list[ImageSource] = [open_source(section) for section in sections]
        self.ends = list(accumulate(len(source) for source in self.sources))
        self.count = self.ends[-1] if count < 0 else min(count, self.ends[-1])
        self.image_size, self.limits = image_size, Limits.of(data, image_size)

    def get(self, i: int) -> Sample:
        """Sample number i. Its number serves as its draw."""
        blank = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)
        if i >= self.count:
            return Sample(i, blank, "", valid=False)
        item = i * self.ends[-1] // self.count
        number = next(k for k, end in enumerate(self.ends) if item < end)
        source, index = self.sources[number], item - self.ends[number] + len(self.sources[number])
        try:
            image, caption, references = load(source, index, self.limits)
        except BadSample as error:
            return Sample(i, blank, "", valid=False, bad=[BadRecord(source.name, index, str(error))])
        return Sample(i, square(image, self.image_size), caption, references=references)


@dataclass(frozen=True)
class Limits:
    """What images are decoded for, and which are refused."""

    max_pixels: int
    image_size: int
    reference_side: int
    max_references: int

    @classmethod
    def of(cls, section: Data, image_size: int) -> Limits:
        side = reference_side(section, image_size)
        return cls(section.max_pixels, image_size, side, section.max_references)


class Loaded(NamedTuple):
    """A sample, decoded."""

    image: Image.Image
    caption: str
    references: list[Tensor]


def load(source: ImageSource, index: int, limits: Limits) -> Loaded:
    """One sample. Raises BadSample, naming the file that is bad."""
    raw = source[index]
    if len(raw.references) > limits.max_references:
        raise BadSample(
            f"{raw.origin}: {len(raw.references)} reference images, data.max_references is "
            f"{limits.max_references}"
        )
    try:
        image = decode(raw.image, limits.max_pixels, limits.image_size)
    except BadSample as error:
        raise BadSample(f"{raw.origin}: {error}") from error
    shown = [load_reference(path, limits.reference_side, limits.max_pixels) for path in raw.references]
    return Loaded(image, raw.caption, shown)
