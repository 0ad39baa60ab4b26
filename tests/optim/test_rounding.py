"""Stochastic rounding: right on average, never further than a neighbour, and bits that look random."""

import math

import pytest
import torch

from flux_trainer.optim.rounding import keys, mix, round_to_bfloat16, word

MASK = 0xFFFFFFFF


def murmur(x: int) -> int:
    """MurmurHash3's finalizer in Python's unbounded integers."""
    x ^= x >> 16
    x = x * 0x85EBCA6B & MASK
    x ^= x >> 13
    x = x * 0xC2B2AE35 & MASK
    return x ^ x >> 16


def unsigned(x: torch.Tensor) -> list[int]:
    return [value & MASK for value in x.tolist()]


def test_mixing_wraps_as_unsigned_integers_do():
    x = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 123456789], dtype=torch.int32)
    assert unsigned(mix(x)) == [murmur(value & MASK) for value in x.tolist()]


def words(name: str, step: int, count: int, seed: int = 0) -> torch.Tensor:
    by_element, by_step, _ = torch.tensor(keys(seed, name), dtype=torch.int32)
    element = mix(torch.arange(count, dtype=torch.int32) ^ by_element)
    return word(element, torch.tensor(step, dtype=torch.int32), by_step)


def test_bits_are_even_and_independent():
    """Half of the bits are set, and half agree with another step's, parameter's, seed's or element's."""
    count = 1 << 16
    here = words("a", 1, count)
    others = [
        torch.zeros_like(here),
        words("a", 2, count),
        words("b", 1, count),
        words("a", 1, count, seed=1),
    ]
    others += [here.roll(1), here.roll(64)]
    for other in others:
        for bit in range(32):
            share = ((here ^ other) >> bit & 1).float().mean().item()
            assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(count), bit


@pytest.mark.parametrize("x", [1.0, -1.0, 1.001, -1.0037, 3.14159e-20, 2.5e30, 1e-41])
def test_rounding_is_right_on_average_and_to_a_neighbour(x):
    count = 1 << 16
    exact = torch.full((count,), x)
    rounded = round_to_bfloat16(exact, words("a", 1, count)).double()
    below = torch.tensor(x).view(torch.int32) & -0x10000
    neighbours = torch.stack([below, below + 0x10000]).view(torch.float32).double()
    assert set(rounded.tolist()) <= set(neighbours.tolist())
    unit = (neighbours[1] - neighbours[0]).abs().item()
    assert abs(rounded.mean().item() - exact[0].double().item()) < 5 * 0.5 * unit / math.sqrt(count)


def test_every_fraction_is_rounded_up_as_often_as_it_should_be():
    """All 2^16 values of the random bits: exactly the share that is cut off rounds up."""
    bits = torch.arange(1 << 16, dtype=torch.int32)
    for cut in (0, 1, 0x7FFF, 0x8000, 0xFFFF):
        x = torch.tensor(0x3F800000 + cut, dtype=torch.int32).view(torch.float32)
        up = round_to_bfloat16(x.expand(1 << 16).clone(), bits) > 1
        assert up.sum() == cut


def test_what_is_no_number_stays_so():
    bits = torch.full((4,), 0xFFFF, dtype=torch.int32)
    all_set = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).item()
    x = torch.tensor([math.inf, -math.inf, math.nan, all_set])
    x.view(torch.int32)[3] = 0x7FFFFFFF
    rounded = round_to_bfloat16(x, bits)
    assert rounded[:2].tolist() == [math.inf, -math.inf]
    assert rounded[2:].isnan().all()
