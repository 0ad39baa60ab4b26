"""Latents to tokens and back, and the position of every token: where a family's images live.

FLUX.1 makes a token of each 2 x 2 square of latents; its position is (0, row, column) of the square, and
text tokens all stand at (0, 0, 0). FLUX.2's latents are tokens as they are; a position is (time, row, column,
place in the text): images stand at (0, row, column, 0), text tokens at (0, 0, 0, place), and the i-th
reference image, from 0 on, at time 10 (i + 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

REFERENCE_TIME = 10  # between one reference image and the next


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


FLUX1 = LatentSpace(channels=16, pixels=8, patch=2, axes=3)
FLUX2 = LatentSpace(channels=128, pixels=16, patch=1, axes=4)
SPACES = {"flux1": FLUX1, "flux2": FLUX2}
"""By family."""
