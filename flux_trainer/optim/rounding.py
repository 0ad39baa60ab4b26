"""Stochastic rounding to bfloat16, with random bits that depend on where an element lies and on the step.

bfloat16 has 8 bits of precision: a sum that grows by less than 1/256 of itself stays where it is when it is
rounded to the nearest. Rounded up with the probability of the share that is cut off, it is right on average.

The bits are a function of (seed, parameter name, step, element of the native tensor): the same on every mesh
and after every resume. One number per element and step has to cost little: Philox, which makes all other
numbers of a run, makes the keys, and a mixing function of 32 bits does the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flux_trainer.flow.rng import Purpose, randint
from flux_trainer.models.init import draw_of

_FACTORS = (0x85EBCA6B - (1 << 32), 0xC2B2AE35 - (1 << 32))  # as int32


def keys(seed: int, name: str) -> list[int]:
    """Three keys of the parameter `name`, as int32: for elements, and for the steps of two words."""
    return [randint(seed, Purpose.ROUNDING, draw_of(name), i, 1 << 32) - (1 << 31) for i in range(3)]


def mix(x: Tensor) -> Tensor:
    """A bijection of int32 in which every bit of x moves about half of the others.

    The finalizer of MurmurHash3 (Appleby, 2011). Products wrap around; masks make the shifts logical.
    """
    x = x ^ (x >> 16 & 0xFFFF)
    x = x * _FACTORS[0]
    x = x ^ (x >> 13 & 0x7FFFF)
    x = x * _FACTORS[1]
    return x ^ (x >> 16 & 0xFFFF)


def word(element: Tensor, step: Tensor, key: Tensor) -> Tensor:
    """32 random bits for each element at a step, as int32.

    Args:
        element: its number, already mixed with the parameter's first key.
        step: int32 scalar.
        key: int32 scalar; each gives other words.
    """
    return mix(element + mix(step ^ key))


def round_to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """x (float32) as bfloat16: away from 0 where the 16 bits that are cut off, plus `bits`, overflow.

    Args:
        bits: int32, uniform in [0, 2^16); only that many are looked at.
    """
    # In 64 bits, then cast to 32: on CUDA, torch 2.11's compiler computes what comes of an int32 arange in 64
    # bits whatever it is called, and fails to view that as float32.
    up = (x.view(torch.int32).to(torch.int64) + (bits.to(torch.int64) & 0xFFFF) & -0x10000).to(torch.int32)
    # All bits of a NaN may be set, and it would overflow into the sign.
    return torch.where(x.isfinite(), up.view(torch.float32), x).to(torch.bfloat16)
