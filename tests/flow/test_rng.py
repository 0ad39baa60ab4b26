"""Known answers, agreement of all entry points, distributions, and the keyed permutation."""

import math

import pytest
import torch

from flux_trainer.flow import gaussian
from flux_trainer.flow.philox import philox
from flux_trainer.flow.rng import (
    Purpose,
    normal,
    normal_slice,
    permute,
    randint,
    scalar,
    uniform,
    uniform_slice,
)

# kat_vectors of the Random123 library: counter, key, result, lowest word first
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, result):
    assert philox(counter, key) == result
    words = philox(tuple(torch.tensor([c, c]) for c in counter), key)
    assert [w.tolist() for w in words] == [[r, r] for r in result]


def test_ints_and_tensors_agree():
    draws = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**40 + 5])
    numbers = uniform(7, Purpose.CROP, draws, (3, 5), dtype=torch.float64)
    for row, draw in enumerate(draws.tolist()):
        expected = [scalar(7, Purpose.CROP, draw, e) for e in range(15)]
        assert numbers[row].flatten().tolist() == expected
    assert torch.equal(numbers.float(), uniform(7, Purpose.CROP, draws, (3, 5)))
    assert torch.equal(numbers.float().double(), numbers)  # exact in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_slices_equal_wholes(dtype, monkeypatch):
    count = 1003
    whole_normal = normal(3, Purpose.NOISE, torch.tensor([11, 12]), (17, 59), dtype=dtype)[1].flatten()
    whole_uniform = uniform(3, Purpose.INIT, torch.tensor([12]), (count,), dtype=dtype)[0]
    for chunk in (4, 10, 1 << 18):  # the result does not depend on how the work is cut
        monkeypatch.setattr("flux_trainer.flow.rng._CHUNK", chunk)
        for start, size in [(0, count), (1, 2), (5, 500), (998, 5), (4, 0), (401, 1)]:
            part = normal_slice(3, Purpose.NOISE, 12, start, size, dtype=dtype)
            assert torch.equal(part, whole_normal[start : start + size])
            part = uniform_slice(3, Purpose.INIT, 12, start, size, dtype=dtype)
            assert torch.equal(part, whole_uniform[start : start + size])


def test_far_elements_use_the_whole_counter():
    near = normal_slice(0, Purpose.INIT, 0, 0, 8)
    far = normal_slice(0, Purpose.INIT, 0, 4 << 32, 8)
    assert not torch.equal(near, far)
    assert torch.equal(far[3:6], normal_slice(0, Purpose.INIT, 0, (4 << 32) + 3, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_bits_on_a_gpu():
    draws = torch.tensor([0, 5, 2**40])
    for function in (normal, uniform):
        here = function(2, Purpose.NOISE, draws, (1000, 999), dtype=torch.float64)
        there = function(2, Purpose.NOISE, draws.cuda(), (1000, 999), dtype=torch.float64)
        assert torch.equal(here, there.cpu())


def test_batch_independence():
    draws = torch.arange(40, 50)
    batch = normal(1, Purpose.NOISE, draws, (4, 3))
    single = torch.cat([normal(1, Purpose.NOISE, d[None], (4, 3)) for d in draws])
    assert torch.equal(batch, single)


def test_seed_purpose_and_draw_all_matter():
    numbers = {
        scalar(seed, purpose, draw) for seed in (0, 1, 2**40) for purpose in Purpose for draw in (0, 1, 2**35)
    }
    assert len(numbers) == 3 * len(Purpose) * 3


@pytest.mark.parametrize("seed", [-1, 1 << 56])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match="seed"):
        scalar(seed, Purpose.CROP, 0)


def _kolmogorov_smirnov(sample: torch.Tensor, cdf: torch.Tensor) -> float:
    """sqrt(N) times the distance of the empirical distribution from `cdf`, given at the sorted sample."""
    n = sample.numel()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * max((cdf - steps[:-1]).max().item(), (steps[1:] - cdf).max().item())


def test_uniform_distribution():
    u = uniform(0, Purpose.DROPOUT, torch.arange(1000), (200,), dtype=torch.float64).flatten()
    assert u.min() > 0
    assert u.max() < 1
    assert _kolmogorov_smirnov(u, u.sort().values) < 1.95  # exceeded with probability 1e-3
    assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / u.numel())


def test_normal_distribution():
    z = normal(0, Purpose.NOISE, torch.arange(1000), (200,), dtype=torch.float64)
    flat = z.flatten()
    n = flat.numel()
    assert _kolmogorov_smirnov(flat, torch.special.ndtr(flat.sort().values)) < 1.95
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((flat**power).mean() - moment) < 4 * math.sqrt(variance / n)
    for shift in (1, 2, 3, 4):  # neighbours within a block, and draws, are uncorrelated
        assert abs((z[:, :-shift] * z[:, shift:]).mean()) < 4 / math.sqrt(n)
        assert abs((z[:-shift] * z[shift:]).mean()) < 4 / math.sqrt(n)


def test_series_against_torch():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    u = torch.cat([u, torch.tensor([0.5 * 2**-32, 1 - 2**-33, math.sqrt(0.5)], dtype=torch.float64)])
    torch.testing.assert_close(gaussian.log(u), u.log(), rtol=2e-15, atol=1e-17)
    word = torch.cat([torch.arange(0, 2**32, 40_009), torch.arange(5) * 2**30, torch.tensor([2**32 - 1])])
    word = word.clamp(max=2**32 - 1)
    c, s = gaussian.cos_sin_turns(word)
    angle = word.double() * (2 * math.pi / 2**32)
    torch.testing.assert_close(c, angle.cos(), rtol=0, atol=2e-15)
    torch.testing.assert_close(s, angle.sin(), rtol=0, atol=2e-15)


def test_randint_covers_its_range_evenly():
    counts = torch.zeros(7)
    for draw in range(3500):
        counts[randint(5, Purpose.SUBSTITUTE, draw, 0, 7)] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 22.5  # chi-square, 6 degrees of freedom, 1e-3


@pytest.mark.parametrize("n", [*range(1, 51), 127, 128, 1000, 1449])
def test_permute_is_a_bijection(n):
    assert sorted(permute(i, n, seed=4, epoch=9) for i in range(n)) == list(range(n))


def test_permute_of_a_large_range():
    n = 10**9 + 7
    positions = [*range(200), *range(n - 200, n)]
    images = [permute(i, n, seed=0, epoch=0) for i in positions]
    assert len(set(images)) == len(positions)
    assert all(0 <= x < n for x in images)
    assert abs(sum(images) / len(images) / n - 0.5) < 4 * math.sqrt(1 / 12 / len(images))


def test_permute_depends_on_seed_epoch_and_stream():
    def order(seed, epoch, stream):
        return tuple(permute(i, 100, seed, epoch, stream) for i in range(100))

    orders = {order(s, e, t) for s in (0, 1) for e in (0, 1, 2) for t in (0, 1)}
    assert len(orders) == 12


def test_permute_reaches_every_order_evenly():
    """All 24 permutations of 4 things, over 1200 epochs (chi-square, 23 degrees of freedom, 1e-3)."""
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(1200):
        order = tuple(permute(i, 4, seed=1, epoch=epoch) for i in range(4))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((c - 50) ** 2 / 50 for c in counts.values()) < 49.7
