"""Latents to tokens and back, and the position of every token.

FLUX.1 makes a token of each 2 x 2 square of latents; its position is (0, row, column) of the square.
Text tokens all stand at (0, 0, 0).
"""

import torch
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> tokens [B, (H/2)(W/2), 4C], row by row; channels ordered (c, row in square, column)."""
    b, c, h, w = latents.shape
    _check_even(h, w)
    squares = latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)  # [B, H/2, W/2, C, 2, 2]
    return squares.reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, (H/2)(W/2), 4C] -> latents [B, C, H, W] of that height and width: the inverse of `pack`."""
    _check_even(height, width)
    b, length, channels = tokens.shape
    assert length == (height // 2) * (width // 2), f"{length} tokens for latents of {height} x {width}"
    squares = tokens.reshape(b, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(b, channels // 4, height, width)


def image_ids(batch: int, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Positions [B, (H/2)(W/2), 3] in float32 of the tokens of latents of that height and width."""
    _check_even(height, width)
    rows = torch.arange(height // 2, dtype=torch.float32, device=device)
    columns = torch.arange(width // 2, dtype=torch.float32, device=device)
    grid = torch.meshgrid(rows.new_zeros(1), rows, columns, indexing="ij")
    return torch.stack(grid, dim=-1).view(1, -1, 3).expand(batch, -1, -1)


def text_ids(batch: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Positions [B, L, 3] in float32 of text tokens: all zero."""
    return torch.zeros(batch, length, 3, device=device)


def _check_even(height: int, width: int) -> None:
    if height % 2 or width % 2:
        raise ValueError(
            f"Latents of {height} x {width} cannot be cut into 2 x 2 squares; "
            "height and width of the image must be multiples of 16 pixels."
        )
