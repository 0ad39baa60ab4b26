"""The path's definition, and a loss that any split of the batch adds up to."""

import pytest
import torch

from flux_trainer.flow.loss import flow_loss
from flux_trainer.flow.path import interpolate, velocity


def test_path_ends_and_velocity():
    x0, noise = (
        torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1).chunk(2)
    )
    noise = noise.flip(0)
    assert torch.equal(interpolate(x0, noise, torch.zeros(3)), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(3)), noise)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    slope = (
        interpolate(x0.double(), noise.double(), t + 1e-3) - interpolate(x0.double(), noise.double(), t)
    ) / 1e-3
    torch.testing.assert_close(slope, velocity(x0, noise).double(), atol=1e-6, rtol=0)


def test_path_is_at_least_float32():
    x0, noise = torch.ones(1, 2).bfloat16(), torch.full((1, 2), 2.0).bfloat16()
    assert interpolate(x0, noise, torch.tensor([0.3])).dtype == torch.float32
    assert velocity(x0, noise).dtype == torch.float32
    assert interpolate(x0.double(), noise, torch.tensor([0.3])).dtype == torch.float64


@pytest.mark.parametrize("sizes", [(6,), (1, 5), (2, 2, 2), (1,) * 6])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_of_any_split_adds_up(sizes, weighted):
    generator = torch.Generator().manual_seed(0)
    pred, target = torch.randn(2, 6, 5, 3, dtype=torch.float64, generator=generator)
    weight = torch.rand(6, dtype=torch.float64, generator=generator) if weighted else None
    reference = (
        sum((1.0 if weight is None else weight[b]) * ((pred[b] - target[b]) ** 2).mean() for b in range(6))
        / 6
    )
    parts = [p.requires_grad_() for p in pred.clone().split(sizes)]
    weights = [None] * len(sizes) if weight is None else weight.split(sizes)
    total = sum(
        flow_loss(p, t, w, 6, 15) for p, t, w in zip(parts, target.split(sizes), weights, strict=True)
    )
    torch.testing.assert_close(total, reference, atol=1e-14, rtol=0)
    whole = pred.clone().requires_grad_()
    flow_loss(whole, target, weight, 6, 15).backward()
    for part, expected in zip(parts, whole.grad.split(sizes), strict=True):
        (gradient,) = torch.autograd.grad(total, part, retain_graph=True)
        torch.testing.assert_close(gradient, expected, atol=1e-15, rtol=0)


def test_loss_counts_samples_of_any_size_alike():
    small, large = torch.full((1, 4), 2.0), torch.full((1, 400), 2.0)
    zero = torch.zeros(1, 1)
    assert flow_loss(small, zero.expand(1, 4), None, 2, 4) == 2.0
    assert flow_loss(large, zero.expand(1, 400), None, 2, 400) == 2.0


def test_loss_of_parts_of_samples_adds_up():
    """As ranks under context parallelism hold them: 2 and 3 of 5 tokens."""
    pred, target = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    parts = zip(pred.split((2, 3), dim=1), target.split((2, 3), dim=1), strict=True)
    total = sum(flow_loss(p, t, None, 4, 15) for p, t in parts)
    torch.testing.assert_close(total, flow_loss(pred, target, None, 4, 15), atol=1e-15, rtol=0)


def test_loss_is_at_least_float32():
    assert flow_loss(torch.ones(2, 3).bfloat16(), torch.zeros(2, 3), None, 2, 3).dtype == torch.float32
