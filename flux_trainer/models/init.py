"""What a parameter's values are at the start of training, as data.

A model describes its initial weights by name (`init_distributions`); whoever holds a parameter, or a shard of
one, computes its elements here. Each element is a function of (seed, parameter name, place in the parameter),
so the weights are the same for any world size and nobody ever holds them all.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flux_trainer.flow.rng import Purpose, normal_slice, uniform_slice


@dataclass(frozen=True)
class Normal:
    """Mean 0, deviation std."""

    std: float


@dataclass(frozen=True)
class Uniform:
    """Between -bound and bound."""

    bound: float


@dataclass(frozen=True)
class Constant:
    value: float


@dataclass(frozen=True)
class Rows:
    """Sections stacked along the first dimension, as (rows, distribution)."""

    sections: tuple[tuple[int, "Normal | Uniform | Constant"], ...]


Distribution = Normal | Uniform | Constant | Rows


def xavier_uniform(fan_in: int, fan_out: int) -> Uniform:
    """Variance 2 / (fan_in + fan_out) (Glorot and Bengio, 2010)."""
    return Uniform(math.sqrt(6.0 / (fan_in + fan_out)))


def initial_values(
    distribution: Distribution,
    name: str,
    shape: torch.Size,
    seed: int,
    start: int,
    count: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Elements [start, start + count) of the flattened parameter `name` of that full shape, as [count]."""
    if isinstance(distribution, Rows):
        assert sum(rows for rows, _ in distribution.sections) == shape[0], (
            f"{name}: {distribution} for {shape}"
        )
        parts, first = [], 0
        for rows, part in distribution.sections:
            last = first + rows * shape[1:].numel()
            begin, end = max(start, first), min(start + count, last)
            if begin < end:
                parts.append(initial_values(part, name, shape, seed, begin, end - begin, device, dtype))
            first = last
        return torch.cat(parts) if parts else torch.empty(0, device=device, dtype=dtype)
    if isinstance(distribution, Constant):
        return torch.full((count,), distribution.value, device=device, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    draw = draw_of(name)
    if isinstance(distribution, Normal):
        values = normal_slice(seed, Purpose.INIT, draw, start, count, device, wide).mul_(distribution.std)
    else:
        values = uniform_slice(seed, Purpose.INIT, draw, start, count, device, wide)
        values = values.mul_(2).sub_(1).mul_(distribution.bound)
    return values.to(dtype)


def draw_of(name: str) -> int:
    """A parameter's draw: its name hashed to 63 bits, so that it does not depend on the other parameters."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1
