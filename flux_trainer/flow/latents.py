"""Latents to tokens and back, and the position of every token: where a family's images live.

FLUX.1 makes a token of each 2 x 2 square of latents; its position is (0, row, column) of the square, and
text tokens all stand at (0, 0, 0). FLUX.2's latents are tokens as they are; a position is (time, row, column,
place in the text): images stand at (0, row, column, 0), text tokens at (0, 0, 0, place).

The i-th reference image of a sample, from 1 on, stands at time 10 i in FLUX.2, at first coordinate i in
FLUX.1 (Kontext, Labs et al. 2025), with rows and columns of its own from 0 on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class References:
    """The reference images of B samples as tokens, those of a sample one after another."""

    tokens: Tensor
    """[B, R, C]; zeros where a sample has fewer than R."""
    ids: Tensor
    """[B, R, axes]: positions."""
    counts: tuple[int, ...]
    """Tokens of each sample."""


@dataclass(frozen=True)
class LatentSpace:
    """How images of a family become tokens."""

    channels: int
    """Of the latents."""
    pixels: int
    """Per latent, along each side."""
    patch: int
    """Latents per token, along each side."""
    axes: int
    """Numbers in a position."""
    reference_time: int
    """From one reference image to the next."""

    @property
    def pixels_per_token(self) -> int:
        """Along each side."""
        return self.pixels * self.patch

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """[C, h, w] of the latents of an image of `height` x `width` pixels."""
        return (self.channels, height // self.pixels, width // self.pixels)

    def tokens(self, height: int, width: int) -> int:
        """Tokens of an image of `height` x `width` pixels."""
        return (height // self.pixels_per_token) * (width // self.pixels_per_token)

    def pack(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> tokens [B, (h/p)(w/p), p p C], row by row; channels ordered (c, row, column)."""
        b, c, h, w = latents.shape
        rows, columns, p = *self._grid(h, w), self.patch
        squares = latents.reshape(b, c, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)  # [B, ., ., C, p, p]
        return squares.reshape(b, rows * columns, c * p * p)

    def unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Tokens -> latents [B, C, height, width]: the inverse of `pack`."""
        rows, columns, p = *self._grid(height, width), self.patch
        b, length, channels = tokens.shape
        assert length == rows * columns, f"{length} tokens for latents of {height} x {width}"
        c = channels // p**2
        squares = tokens.reshape(b, rows, columns, c, p, p).permute(0, 3, 1, 4, 2, 5)
        return squares.reshape(b, c, height, width)

    def image_ids(
        self, batch: int, height: int, width: int, device: torch.device | str = "cpu", time: int = 0
    ) -> Tensor:
        """Positions [B, L, axes] in float32 of the tokens of latents of that height and width."""
        rows, columns = self._grid(height, width)
        ids = torch.zeros(rows, columns, self.axes, device=device)
        ids[..., 0] = time
        ids[..., 1] = torch.arange(rows, device=device)[:, None]
        ids[..., 2] = torch.arange(columns, device=device)
        return ids.view(1, -1, self.axes).expand(batch, -1, -1)

    def references(
        self, samples: Sequence[Sequence[Tensor]], like: Tensor, length: int = 0
    ) -> References | None:
        """The latents [C, h, w], of any sizes, of each sample's reference images as tokens.

        Args:
            like: of the dtype and on the device of the result.
            length: tokens to pad each sample to; the longest sample's, if that has more.

        Returns:
            None if there is not a token.
        """
        counts = tuple(map(self.reference_tokens, samples))
        length = max((length, *counts))
        if length == 0:
            return None
        tokens = like.new_zeros(len(samples), length, self.channels * self.patch**2)
        ids = torch.zeros(len(samples), length, self.axes, device=like.device)
        for sample, images in enumerate(samples):
            end = 0
            for i, x in enumerate(images, 1):
                start, end = end, end + self.reference_tokens([x])
                tokens[sample, start:end] = self.pack(x[None])[0]
                height, width = x.shape[1:]
                time = i * self.reference_time
                ids[sample, start:end] = self.image_ids(1, height, width, like.device, time)
        return References(tokens, ids, counts)

    def reference_tokens(self, images: Sequence[Tensor]) -> int:
        """Tokens of images' latents [C, h, w]."""
        return sum((x.shape[1] // self.patch) * (x.shape[2] // self.patch) for x in images)

    def text_ids(self, batch: int, length: int, device: torch.device | str = "cpu") -> Tensor:
        """Positions [B, L, axes] in float32 of text tokens."""
        ids = torch.zeros(length, self.axes, device=device)
        if self.axes == 4:
            ids[:, 3] = torch.arange(length, device=device)
        return ids.expand(batch, -1, -1)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of latents of that height and width."""
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"Latents of {height} x {width} cannot be cut into {self.patch} x {self.patch} squares; "
                f"height and width of the image must be multiples of {self.pixels_per_token} pixels."
            )
        return height // self.patch, width // self.patch


FLUX1 = LatentSpace(channels=16, pixels=8, patch=2, axes=3, reference_time=1)
FLUX2 = LatentSpace(channels=128, pixels=16, patch=1, axes=4, reference_time=10)
SPACES = {"flux1": FLUX1, "flux2": FLUX2}
"""By family."""
