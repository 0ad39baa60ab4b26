"""Which sample a draw is: a closed form, so that the position in the data is one integer.

Draws come in blocks. A block holds a fixed number of slots for each source (its quota); a keyed permutation,
another one in every block, mixes the slots. The k-th slot that a source of n samples gets in the whole run is
its sample permute(k mod n) in epoch k div n: a source goes through all its samples, each time in a new order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from flux_trainer.config.schema import Source
from flux_trainer.data.bad import DataError
from flux_trainer.data.sources import ImageSource, open_source
from flux_trainer.flow.rng import Purpose, permute, randint

WEIGHTED_BLOCK = 1000  # draws in which weights are met exactly (rounded to one draw)


class Mixture:
    """Several sources as one endless sequence of draws, without state.

    `block`: draws after which every source has had its quota exactly. Without weights that is an epoch: each
    source has been seen `repeats` times.
    """

    def __init__(self, sources: Sequence[ImageSource], quotas: Sequence[int], seed: int) -> None:
        assert len(sources) == len(quotas) > 0
        self.sources = list(sources)
        self.quotas = list(quotas)
        self.seed = seed
        self.starts = [0, *accumulate(quotas)][:-1]  # first slot of each source in a block
        self.block = sum(quotas)

    def locate(self, draw: int) -> tuple[int, int]:
        """(number of the source, index in it) of a draw."""
        block, slot = divmod(draw, self.block)
        if len(self.sources) > 1:
            slot = permute(slot, self.block, self.seed, block)
        source = self._source_of(slot)
        turn = block * self.quotas[source] + slot - self.starts[source]  # this source's draws before this one
        size = len(self.sources[source])
        return source, permute(turn % size, size, self.seed, turn // size, stream=1 + source)

    def substitute(self, draw: int, attempt: int) -> tuple[int, int]:
        """(number of the source, index in it) that replaces a bad sample: any, in the same shares."""
        source = self._source_of(randint(self.seed, Purpose.SUBSTITUTE, draw, 2 * attempt, self.block))
        size = len(self.sources[source])
        return source, randint(self.seed, Purpose.SUBSTITUTE, draw, 2 * attempt + 1, size)

    def _source_of(self, slot: int) -> int:
        return bisect_right(self.starts, slot) - 1


def open_mixture(sections: Sequence[Source], seed: int) -> Mixture:
    """Open the [[data.sources]] tables. Raises DataError if there are none, or if one cannot be used."""
    if not sections:
        raise DataError("There is no data: give at least one [[data.sources]] table.")
    sources = [open_source(section) for section in sections]
    return Mixture(sources, quotas(sections, [len(source) for source in sources]), seed)


def quotas(sections: Sequence[Source], sizes: Sequence[int]) -> list[int]:
    """Slots of each source in a block: size x repeats, or shares of WEIGHTED_BLOCK by largest remainder."""
    weights = [section.weight for section in sections if section.weight is not None]
    if not weights:
        return [size * section.repeats for section, size in zip(sections, sizes, strict=True)]
    if len(weights) < len(sections):
        raise DataError("Give weight for all sources or for none.")
    total = sum(weights)
    if total == 0:
        raise DataError("All sources have weight 0.")
    exact = [WEIGHTED_BLOCK * weight / total for weight in weights]
    slots = [int(x) for x in exact]
    remainders = sorted(range(len(exact)), key=lambda i: slots[i] - exact[i])  # largest first
    for i in remainders[: WEIGHTED_BLOCK - sum(slots)]:
        slots[i] += 1
    for i, (weight, slot) in enumerate(zip(weights, slots, strict=True)):
        if weight > 0 and slot == 0:
            raise DataError(
                f"Source {i + 1} has so small a weight ({weight:g} of {total:g}) that it is never drawn."
            )
    return slots
