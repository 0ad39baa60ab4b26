"""Randomness as a function: every random number of a run is determined by (seed, purpose, draw, element).

`draw` is a sample's position in the order of the whole run; `element` counts inside that draw's tensor.
There is no state to save, to advance or to keep in step: a draw meets the same numbers on any number of
ranks, on every device, after any resume, and a slice of a tensor can be computed without the rest of it.

Layout: Philox gets key = seed + 2^56 purpose and counter = draw * 2^64 + block; each block of four 32-bit
words serves the four elements 4 block .. 4 block + 3.
"""

import math
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from flux_trainer.flow.gaussian import box_muller
from flux_trainer.flow.philox import MASK, philox

SEED_BITS = 56
_CHUNK = 1 << 17  # elements computed at once: temporaries, ten of 8 bytes each, stay in a CPU's cache
_LARGE_CHUNK = 1 << 20  # on other devices, where 150 small kernels a chunk would cost more than memory does


class Purpose(IntEnum):
    """What a number is for; different purposes never share numbers.

    The values enter every random number: changing one changes all runs, so only append.
    """

    ORDER = 1  # of samples and sources; reserved for `permute`
    SOURCE = 2
    SUBSTITUTE = 3
    CROP = 4
    FLIP = 5
    DROPOUT = 6
    TIMESTEP = 7
    NOISE = 8
    LATENT = 9
    INIT = 10
    SYNTHETIC = 11
    ENCODER = 12
    VAL_NOISE = 13
    PICTURE = 15  # 14 is free
    ROUNDING = 16


def _key(seed: int, purpose: Purpose) -> tuple[int, int]:
    if not 0 <= seed < 1 << SEED_BITS:
        raise ValueError(f"The seed is {seed}; it must lie between 0 and 2^{SEED_BITS} - 1.")
    key = seed | int(purpose) << SEED_BITS
    return key & MASK, key >> 32


def normal(
    seed: int, purpose: Purpose, draws: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal numbers [B, *shape] on the device of `draws` (int64 [B]), independent for each draw.

    Computed in float64 from basic IEEE operations and then cast: the same bits on every device.
    """
    return _fill("normal", seed, purpose, draws, 0, math.prod(shape), dtype).view(-1, *shape)


def uniform(
    seed: int, purpose: Purpose, draws: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform numbers [B, *shape] in the open interval (0, 1) on the device of `draws` (int64 [B]).

    The values are odd multiples of 2^-24: exact in float32, and equal in float32 and float64.
    """
    return _fill("uniform", seed, purpose, draws, 0, math.prod(shape), dtype).view(-1, *shape)


def normal_slice(
    seed: int,
    purpose: Purpose,
    draw: int,
    start: int,
    count: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Elements [start, start + count) of the flattened `normal` tensor of one draw, as [count]."""
    draws = torch.tensor([draw], dtype=torch.int64, device=device)
    return _fill("normal", seed, purpose, draws, start, count, dtype)[0]


def uniform_slice(
    seed: int,
    purpose: Purpose,
    draw: int,
    start: int,
    count: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Elements [start, start + count) of the flattened `uniform` tensor of one draw, as [count]."""
    draws = torch.tensor([draw], dtype=torch.int64, device=device)
    return _fill("uniform", seed, purpose, draws, start, count, dtype)[0]


def scalar(seed: int, purpose: Purpose, draw: int, element: int = 0) -> float:
    """The number in (0, 1) that `uniform` has for this draw and element, as a Python float."""
    return _unit(_block(seed, purpose, draw, element // 4)[element % 4])


def randint(seed: int, purpose: Purpose, draw: int, element: int, n: int) -> int:
    """An integer in [0, n), n < 2^48, as a Python int.

    It uses up block `element`: within one purpose and draw take either `randint`, or `scalar` and `uniform`.
    """
    return _randint(_block(seed, purpose, draw, element), n)


def permute(position: int, n: int, seed: int, epoch: int, stream: int = 0) -> int:
    """Where a keyed random permutation of range(n) sends `position`; each (seed, epoch, stream) has its own.

    Swap-or-not (Hoang, Morris, Rogaway, "An enciphering scheme based on a card shuffle", CRYPTO 2012): each
    round pairs x with K - x mod n and swaps the two if a random bit of the pair says so. Any n, no table; the
    rounds are plenty for an order that has to look random. 0 <= epoch, n < 2^48; 0 <= stream < 2^16.
    """
    assert 0 <= position < n < 1 << 48, f"position {position} of {n}"
    assert 0 <= epoch < 1 << 48, f"epoch {epoch}"
    assert 0 <= stream < 1 << 16, f"stream {stream}"
    draw = stream << 48 | epoch
    x = position
    for r in range(24 + 3 * n.bit_length()):
        partner = (_pairing(seed, draw, r, n) - x) % n
        pair = max(x, partner)
        if _coins(seed, draw, r, pair >> 7) >> (pair & 127) & 1:
            x = partner
    return x


@lru_cache(maxsize=4096)
def _pairing(seed: int, draw: int, r: int, n: int) -> int:
    """K of round r."""
    return _randint(_block(seed, Purpose.ORDER, draw, r << 48 | (1 << 48) - 1), n)


@lru_cache(maxsize=65536)  # 128 pairs share a call: with small n most positions find all their coins here
def _coins(seed: int, draw: int, r: int, index: int) -> int:
    """The coins of pairs 128 index .. 128 index + 127 in round r, as bits."""
    w0, w1, w2, w3 = _block(seed, Purpose.ORDER, draw, r << 48 | index)
    return w0 | w1 << 32 | w2 << 64 | w3 << 96


def _block(seed: int, purpose: Purpose, draw: int, block: int) -> tuple[int, int, int, int]:
    """Four random words, as Python ints."""
    return philox((block & MASK, block >> 32, draw & MASK, draw >> 32), _key(seed, purpose))


def _randint(words: tuple[int, int, int, int], n: int) -> int:
    """floor(n * w / 2^64) for a 64-bit w; no value's probability is off by more than 2^-64."""
    return (words[0] | words[1] << 32) * n >> 64


def _unit(word: int) -> float:
    """The centre of one of 2^23 equal cells of (0, 1)."""
    return ((word >> 9) + 0.5) * 2.0**-23


def _fill(
    kind: Literal["normal", "uniform"],
    seed: int,
    purpose: Purpose,
    draws: Tensor,  # [B] int64
    start: int,
    count: int,
    dtype: torch.dtype,
) -> Tensor:
    """Elements [start, start + count) of every draw: [B, count]."""
    assert draws.dim() == 1, f"draws has shape {tuple(draws.shape)}"
    assert draws.dtype == torch.int64, f"draws are {draws.dtype}"
    out = torch.empty(len(draws), count, dtype=dtype, device=draws.device)
    chunk = _CHUNK if draws.device.type == "cpu" else _LARGE_CHUNK
    step = max(4, chunk // max(1, len(draws)))
    for begin in range(start, start + count, step):
        end = min(begin + step, start + count)
        first = begin // 4
        words = _words(seed, purpose, draws, first, (end + 3) // 4)  # 4 x [B, N]
        if kind == "normal":
            numbers = [*box_muller(words[0], words[1]), *box_muller(words[2], words[3])]
        else:
            numbers = [((w >> 9).to(torch.float64) + 0.5) * 2.0**-23 for w in words]  # as `_unit`
        row = torch.stack(numbers, dim=-1).flatten(1)  # [B, 4 N]
        out[:, begin - start : end - start] = row[:, begin - 4 * first : end - 4 * first]
    return out


def _words(seed: int, purpose: Purpose, draws: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
    """The random words of blocks [first, last) of every draw: four int64 tensors [B, last - first]."""
    blocks = torch.arange(first, last, device=draws.device)[None, :]
    draws = draws[:, None]
    return philox((blocks & MASK, blocks >> 32, draws & MASK, draws >> 32), _key(seed, purpose))
