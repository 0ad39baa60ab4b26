"""Timestep densities against their closed forms; schedules against BFL's."""

import json
import math
from pathlib import Path

import pytest
import torch

from flux_trainer.flow.timesteps import (
    flux1_mu,
    flux2_mu,
    loss_weight,
    sample_timesteps,
    schedule,
    time_shift,
    training_mu,
)

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDENS = json.loads((GOLDEN / "schedules.json").read_text())
SCHEDULES = GOLDENS["flux1"]
DRAWS = torch.arange(40_000)


def times(**kwargs) -> torch.Tensor:
    return sample_timesteps(0, DRAWS, **kwargs)


def distance_from_uniform(u: torch.Tensor) -> float:
    """Kolmogorov-Smirnov statistic times sqrt(N); above 1.95 with probability 1e-3."""
    steps = (torch.arange(u.numel(), dtype=torch.float64) + 0.5) / u.numel()
    return math.sqrt(u.numel()) * (u.double().sort().values - steps).abs().max().item()


def test_uniform():
    t = times(sampling="uniform")
    assert t.dtype == torch.float32
    assert t.unique().numel() > 0.99 * t.numel()
    assert distance_from_uniform(t) < 1.95


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_logit_normal(mean, std):
    t = times(sampling="logit_normal", logit_mean=mean, logit_std=std)
    assert distance_from_uniform(torch.special.ndtr((t.double().logit() - mean) / std)) < 1.95


@pytest.mark.parametrize("image_tokens", [256, 1024, 4096])
def test_flux_shift_adds_mu_to_the_logit(image_tokens):
    plain = times(sampling="logit_normal")
    mu = training_mu("flux", "flux1", image_tokens)
    shifted = times(sampling="logit_normal", mu=mu)
    added = shifted.double().logit() - plain.double().logit()
    torch.testing.assert_close(added, torch.full_like(added, flux1_mu(image_tokens)), atol=1e-4, rtol=0)


def test_shift_by_a_number():
    plain = times(sampling="uniform").double()
    shifted = times(sampling="uniform", mu=training_mu(3.0, "flux1", 256))
    torch.testing.assert_close(shifted.double(), 3 * plain / (1 + 2 * plain), atol=1e-7, rtol=0)


def test_each_draw_keeps_its_time():
    whole = times(sampling="logit_normal")
    part = sample_timesteps(0, DRAWS[100:103], sampling="logit_normal")
    assert torch.equal(part, whole[100:103])
    assert not torch.equal(part, sample_timesteps(1, DRAWS[100:103], sampling="logit_normal"))


@pytest.mark.parametrize("case", [c for c in SCHEDULES if "base_shift" not in c])
def test_golden_schedules(case):
    mu = flux1_mu(case["image_seq_len"]) if case["shift"] else None
    ours = schedule(case["num_steps"], mu)
    assert ours[0] == 1.0
    assert ours[-1] == 0.0
    assert ours == pytest.approx(case["timesteps"], abs=2e-7)
    if case["shift"]:
        assert mu == pytest.approx(case["mu"], abs=1e-12)


@pytest.mark.parametrize("case", GOLDENS["flux2"])
def test_golden_schedules_of_flux2(case):
    mu = flux2_mu(case["image_seq_len"], case["num_steps"])
    assert mu == pytest.approx(case["mu"], abs=1e-12)
    assert schedule(case["num_steps"], mu) == pytest.approx(case["timesteps"], abs=2e-7)


def test_training_is_shifted_as_the_family_samples():
    assert training_mu("none", "flux2", 1024) is None
    assert training_mu("flux", "flux1", 1024) == flux1_mu(1024)
    assert training_mu("flux", "flux2", 1024) == flux2_mu(1024, 50) > flux1_mu(1024)


def test_golden_schedule_with_another_line():
    (case,) = [c for c in SCHEDULES if "base_shift" in c]
    mu = flux1_mu(case["image_seq_len"], (256, case["base_shift"]), (4096, case["max_shift"]))
    assert mu == pytest.approx(case["mu"], abs=1e-12)
    evenly = [1 - i / case["num_steps"] for i in range(case["num_steps"] + 1)]
    assert [time_shift(mu, 1.0, t) for t in evenly] == pytest.approx(case["timesteps"], abs=2e-7)


def test_time_shift_with_sigma():
    t, mu, sigma = 0.3, 0.8, 1.7
    assert time_shift(mu, sigma, t) == pytest.approx(math.exp(mu) / (math.exp(mu) + (1 / t - 1) ** sigma))


def test_loss_weights():
    t = torch.tensor([0.25, 0.5, 1.0])
    assert loss_weight(t, "none").tolist() == [1, 1, 1]
    assert loss_weight(t, "sigma_sqrt").tolist() == [16, 4, 1]
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    cosmap = loss_weight(grid, "cosmap")
    assert cosmap.mean() == pytest.approx(1, abs=1e-6)  # a density on [0, 1]
    assert cosmap.max() == pytest.approx(4 / math.pi, abs=1e-5)
