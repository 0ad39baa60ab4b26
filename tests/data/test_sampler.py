"""The order of draws: every sample once an epoch, shares met exactly, a function of seed and draw alone."""

from __future__ import annotations

from collections import Counter

import pytest

from flux_trainer.config.schema import Source
from flux_trainer.data.bad import DataError
from flux_trainer.data.sampler import WEIGHTED_BLOCK, Mixture, open_mixture, quotas


def synthetic(size: int, **options: float) -> Source:
    return Source(type="synthetic", size=size, **options)


def epoch(mixture: Mixture, number: int) -> list[tuple[int, int]]:
    return [mixture.locate(number * mixture.block + i) for i in range(mixture.block)]


def test_an_epoch_visits_every_sample_once_in_a_new_order() -> None:
    mixture = open_mixture([synthetic(101)], seed=7)
    orders = [epoch(mixture, i) for i in (0, 1, 2, 10**6)]
    for order in orders:
        assert sorted(order) == [(0, i) for i in range(101)]
    assert len({tuple(order) for order in orders}) == 4
    assert epoch(open_mixture([synthetic(101)], seed=8), 0) != orders[0]
    assert epoch(open_mixture([synthetic(101)], seed=7), 1) == orders[1]


def test_sources_of_one_size_are_shuffled_differently() -> None:
    sections = [synthetic(5000, weight=1.0), synthetic(5000, weight=1.0)]
    order = epoch(open_mixture(sections, seed=0), 0)  # 500 of each
    first, second = ({index for source, index in order if source == which} for which in (0, 1))
    assert 20 < len(first & second) < 90  # 50 by chance


def test_repeats() -> None:
    mixture = open_mixture([synthetic(5), synthetic(7, repeats=3)], seed=0)
    assert mixture.block == 26
    for number in range(3):
        order = epoch(mixture, number)
        expected = {(0, i): 1 for i in range(5)} | {(1, i): 3 for i in range(7)}
        assert Counter(order) == expected
        assert len({source for source, _ in order[:13]}) == 2  # mixed, not one after the other


def test_weights_are_exact_in_every_block_and_each_source_makes_its_own_epochs() -> None:
    sizes = (3, 450, 1000)
    weights = (1.0, 2.0, 4.0)
    sections = [synthetic(size, weight=weight) for size, weight in zip(sizes, weights, strict=True)]
    mixture = open_mixture(sections, seed=1)
    visited: list[list[int]] = [[], [], []]
    for number in range(3):
        order = epoch(mixture, number)
        assert Counter(source for source, _ in order) == {0: 143, 1: 286, 2: 571}  # 142.86, 285.71, 571.43
        for source, index in order:
            visited[source].append(index)
    # After a block a source has gone through whole epochs and a part of the next: counts differ by one.
    for source, size in enumerate(sizes):
        counts = Counter(visited[source]).values()
        assert max(counts) - (min(counts) if len(counts) == size else 0) <= 1


def test_quotas() -> None:
    equal = [synthetic(9, weight=1.0)] * 3
    assert quotas(equal, [9, 9, 9]) == [334, 333, 333]
    assert quotas([synthetic(9, weight=0.0), synthetic(9, weight=0.2)], [9, 9]) == [0, WEIGHTED_BLOCK]
    for weights, words in (
        ((1.0, None), "for all sources or for none"),
        ((0.0, 0.0), "All sources have weight 0"),
        ((1.0, 1e-4), "Source 2 has so small a weight"),
    ):
        with pytest.raises(DataError, match=words):
            quotas([synthetic(9, weight=weight) for weight in weights], [9, 9])
    with pytest.raises(DataError, match=r"\[\[data.sources\]\]"):
        open_mixture([], seed=0)


def test_a_source_of_weight_zero_is_never_drawn() -> None:
    sections = [synthetic(9, weight=weight) for weight in (0.0, 1.0, 0.0, 1.0, 0.0)]
    mixture = open_mixture(sections, seed=0)
    assert {source for source, _ in epoch(mixture, 0)} == {1, 3}
    assert {mixture.substitute(i, 1)[0] for i in range(200)} == {1, 3}


def test_substitutes_come_from_the_whole_mixture_in_its_shares() -> None:
    mixture = open_mixture([synthetic(4, weight=1.0), synthetic(6, weight=3.0)], seed=0)
    picks = Counter(mixture.substitute(draw, attempt) for draw in range(2000) for attempt in (1, 2))
    for (source, _), times in picks.items():
        expected = 4000 * (0.25 / 4 if source == 0 else 0.75 / 6)
        assert abs(times - expected) < 5 * expected**0.5
    assert len(picks) == 10
    assert mixture.substitute(3, 1) == mixture.substitute(3, 1)
    sources = [(mixture.substitute(draw, 1)[0], mixture.substitute(draw, 2)[0]) for draw in range(200)]
    assert len(set(sources)) == 4  # a second attempt is not bound to the first one's source
