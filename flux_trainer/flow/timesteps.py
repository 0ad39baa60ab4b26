"""Which times the model is trained at, and which ones a sampler visits.

t in [0, 1], 0 = data, 1 = noise. More tokens carry more redundant signal, so at the same t a large image is
further from being destroyed; FLUX therefore shifts t towards noise by an amount mu that grows with the number
of image tokens (Esser et al., "Scaling rectified flow transformers", 2024, section 5.3.2).
"""

import math
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor

from flux_trainer.flow.rng import Purpose, normal, uniform

Time = TypeVar("Time", float, Tensor)


def sample_timesteps(
    seed: int,
    draws: Tensor,
    *,
    sampling: Literal["uniform", "logit_normal"],
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mu: float | None = None,
) -> Tensor:
    """One t per draw, [B] float32, continuous, a function of (seed, draw).

    uniform: t = u. logit_normal: logit(t) ~ N(logit_mean, logit_std^2). Then `time_shift` by mu, if given.
    """
    if sampling == "uniform":
        t = uniform(seed, Purpose.TIMESTEP, draws, dtype=torch.float64)
    else:
        t = torch.sigmoid(logit_mean + logit_std * normal(seed, Purpose.TIMESTEP, draws, (), torch.float64))
    if mu is not None:
        t = time_shift(mu, 1.0, t)
    return t.float()


def training_mu(shift: Literal["none", "flux"] | float, family: str, image_tokens: int) -> float | None:
    """The shift of training that the settings mean: none, the family's own, or t -> s t / (1 + (s - 1) t)."""
    if shift == "none":
        return None
    return MU[family](image_tokens, SAMPLER_STEPS) if shift == "flux" else math.log(shift)


def flux1_mu(
    image_tokens: int, base: tuple[int, float] = (256, 0.5), end: tuple[int, float] = (4096, 1.15)
) -> float:
    """FLUX.1's mu: the line through two points (image tokens, mu). Image tokens are packed ones."""
    slope = (end[1] - base[1]) / (end[0] - base[0])
    return base[1] + slope * (image_tokens - base[0])


def flux2_mu(image_tokens: int, num_steps: int) -> float:
    """FLUX.2's mu, fitted by Black Forest Labs (flux2, `sampling.py`): two lines in the number of tokens, for
    samplers of 10 and of 200 steps, and the line in the number of steps between them. Above 4300 tokens the
    second line holds for any number of steps, with a jump there."""
    of_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return of_200
    of_10 = 8.73809524e-05 * image_tokens + 1.89833333
    return of_200 + (of_10 - of_200) * (200 - num_steps) / 190


Mu = Callable[[int, int], float]
"""(image tokens, steps of the sampler) -> mu. Image tokens are those of the image to be drawn."""

MU: dict[str, Mu] = {
    "flux1": lambda image_tokens, num_steps: flux1_mu(image_tokens),
    "flux2": flux2_mu,
}
"""By family."""

SAMPLER_STEPS = 50
"""Training is shifted as a sampler with so many steps is, where that makes a difference (FLUX.2)."""


def time_shift(mu: float, sigma: float, t: Time) -> Time:
    """e^mu / (e^mu + (1/t - 1)^sigma), written so that t = 0 is no division by zero.

    With sigma = 1 this adds mu to logit(t); with s = e^mu it is s t / (1 + (s - 1) t).
    """
    towards_noise = math.exp(mu) * t**sigma
    return towards_noise / (towards_noise + (1 - t) ** sigma)


def schedule(num_steps: int, mu: float | None) -> list[float]:
    """num_steps + 1 falling times from 1 to 0 for a sampler: evenly spaced, then shifted by mu (`MU`).

    FLUX.1-schnell is sampled without a shift: None.
    """
    times = [1.0 - i / num_steps for i in range(num_steps + 1)]
    return times if mu is None else [time_shift(mu, 1.0, t) for t in times]


def loss_weight(t: Tensor, weighting: Literal["none", "sigma_sqrt", "cosmap"]) -> Tensor:
    """Weight of each sample's loss, [B], float32 or wider (Esser et al., 2024, section 3.1).

    sigma_sqrt: t^-2, which has no bound as t goes to 0. cosmap: 2 / (pi (1 - 2t + 2t^2)), between 2/pi and
    4/pi: with uniform t, the density of the paper's cosine map.
    """
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    if weighting == "sigma_sqrt":
        return t**-2
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))
    return torch.ones_like(t)
