"""Philox4x32-10, the counter-based generator under all randomness of a run.

A counter-based generator is a keyed function from a counter to random words: nothing is drawn "after"
anything else, so any element can be computed alone. Source: Salmon, Moraes, Dror, Shaw, "Parallel random
numbers: as easy as 1, 2, 3", SC 2011.
"""

from typing import TypeVar

from torch import Tensor

Word = TypeVar("Word", int, Tensor)  # values in [0, 2^32): a Python int, or int64 tensors that broadcast

MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # the key's steps: golden ratio and sqrt(3) - 1 as 32-bit fractions


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Four random 32-bit words for a 128-bit counter and a 64-bit key (32-bit words too, lowest first).

    Python ints and int64 tensors give the same words. On tensors the 64-bit product may wrap around to a
    negative number; its bits, which are all that is used, are those of the unsigned product.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & MASK) ^ c1 ^ k0, p1 & MASK, (p0 >> 32 & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + _WEYL[0]) & MASK, (k1 + _WEYL[1]) & MASK
    return c0, c1, c2, c3
