"""Box-Muller from IEEE basic operations only, so that normal numbers are the same bits everywhere.

`torch.log` and `torch.cos` may differ in the last bit between devices, vector widths and even places in
a tensor. Addition, multiplication, division and square root of float64 are correctly rounded on all of
them, so a logarithm and a sine built from these (one operation per kernel, hence no fused multiply-add)
are reproducible. The series below are good to about 1e-15, far beyond the float32 of the results' use.
"""

import math

import torch
from torch import Tensor

# log m = 2 atanh(s) = 2 s (1 + s^2/3 + s^4/5 + ...) with s = (m - 1) / (m + 1);
# |s| <= 0.172 for m in [sqrt(1/2), sqrt(2)]
_ATANH = tuple(2.0 / (2 * i + 1) for i in range(10))
# Taylor series of sin(x)/x and cos(x) in x^2, for |x| <= pi/4
_SIN = tuple((-1.0) ** i / math.factorial(2 * i + 1) for i in range(9))
_COS = tuple((-1.0) ** i / math.factorial(2 * i) for i in range(9))


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """c_0 + c_1 x + c_2 x^2 + ..."""
    y = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        y.mul_(x).add_(c)
    return y


def log(u: Tensor) -> Tensor:
    """Natural logarithm of positive float64 numbers."""
    mantissa, exponent = torch.frexp(u)  # u = mantissa * 2^exponent, mantissa in [1/2, 1)
    low = mantissa < math.sqrt(0.5)
    mantissa = torch.where(low, mantissa * 2.0, mantissa)
    exponent = exponent - low.to(exponent.dtype)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return exponent.to(u.dtype) * math.log(2.0) + s * _horner(s * s, _ATANH)


def cos_sin_turns(word: Tensor) -> tuple[Tensor, Tensor]:
    """float64 cosine and sine of 2 pi word / 2^32, for int64 words in [0, 2^32)."""
    quadrant = word >> 30  # a quarter turn is 2^30 words; what remains is centred: [-pi/4, pi/4)
    x = ((word & (2**30 - 1)) - 2**29).to(torch.float64) * (0.5 * math.pi / 2**30)
    square = x * x
    sine, cosine = x * _horner(square, _SIN), _horner(square, _COS)
    # The angle is x + pi/4 + quadrant pi/2: first the eighth of a turn, then the quarters.
    c, s = (cosine - sine) * math.sqrt(0.5), (sine + cosine) * math.sqrt(0.5)
    odd = (quadrant & 1).bool()
    c, s = torch.where(odd, -s, c), torch.where(odd, c, s)
    half = quadrant >= 2
    return torch.where(half, -c, c), torch.where(half, -s, s)


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normal float64 tensors from two int64 tensors of random 32-bit words.

    z = sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v);  u = (word + 1/2) / 2^32 is never 0, and |z| is at most 6.8.
    """
    u = (radius_word.to(torch.float64) + 0.5) * 2.0**-32
    radius = torch.sqrt(log(u) * -2.0)
    c, s = cos_sin_turns(angle_word)
    return radius * c, radius * s
