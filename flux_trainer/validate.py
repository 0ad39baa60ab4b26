"""Validation: the loss on held-out samples at fixed times, and pictures of fixed prompts.

Noise is keyed by the sample's (or the prompt's) own index, so the figures depend neither on the world size
nor on the batch, are comparable between validations, and leave no trace in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from flux_trainer.data.bad import BadSamples, DataError
from flux_trainer.data.samples import Batch
from flux_trainer.encoders.bundle import Encoders
from flux_trainer.encoders.text import TextFeatures
from flux_trainer.flow import rng
from flux_trainer.flow.euler import euler
from flux_trainer.flow.path import interpolate, velocity
from flux_trainer.flow.rng import Purpose
from flux_trainer.runtime.dist import World, all_gather

Predict = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x_t [B, C, H, W], t [B], txt [B, L, D], vec [B, D']) -> the model's velocity [B, C, H, W]."""


@torch.no_grad()
def validation_loss(
    batches: Iterable[Batch],
    encoders: Encoders,
    predict: Predict,
    *,
    timesteps: int,
    seed: int,
    world: World,
    dtype: torch.dtype,
    bad_samples: BadSamples,
) -> list[float]:
    """Mean squared error of the velocity at each t = (i + 0.5) / timesteps, over all ranks' valid samples.

    Every rank must be given the same number of batches; rows that only pad have `valid` false.

    Raises:
        DataError: on all ranks, when not one sample is valid.
    """
    sums = torch.zeros(
        timesteps + 1, dtype=torch.float64, device=encoders.device
    )  # one per t, then the count
    for batch in batches:
        bad_samples.list(batch.bad)
        draws, valid = batch.draws.to(encoders.device), batch.valid.to(encoders.device)
        encoded = encoders.encode(batch.images, batch.tokens, batch.drop_t5, batch.drop_clip)
        x_0 = encoded.latents.to(dtype)
        for i in range(timesteps):
            t = torch.full((len(draws),), (i + 0.5) / timesteps, dtype=dtype, device=encoders.device)
            noise = rng.normal(seed, Purpose.VAL_NOISE, draws * timesteps + i, x_0.shape[1:], dtype)
            v = predict(interpolate(x_0, noise, t), t, encoded.txt, encoded.vec)
            error = (v.to(dtype) - velocity(x_0, noise)).square().flatten(1).mean(1)  # [B]
            sums[i] += error.double()[valid].sum()
        sums[-1] += valid.sum()
    *totals, count = world.sum(sums.tolist())
    if count == 0:
        raise DataError(f"Not one validation sample could be used: {bad_samples.path} says why.")
    return [total / count for total in totals]


@torch.no_grad()
def draw_pictures(
    prompts: Sequence[str],
    encoders: Encoders,
    predict: Predict,
    *,
    shape: Sequence[int],
    times: Sequence[float],
    cfg_scale: float | None,
    batch_size: int,
    seed: int,
    world: World,
    dtype: torch.dtype,
) -> Tensor:
    """Pictures uint8 [len(prompts), 3, H, W] of the prompts, the same on every rank.

    The ranks share the prompts out; each makes the same number of calls, the last ones possibly for nothing.
    Noise is keyed by the prompt's number. Euler steps from noise to data.

    Args:
        shape: of one image's latents, [C, H/8, W/8].
        times: falling from 1 to 0 (`flow.timesteps.schedule`).
        cfg_scale: of classifier-free guidance against the empty prompt; None: without it.
    """
    share = -(-len(prompts) // world.size)  # prompts per rank, rounded up
    mine = [min(world.rank * share + i, len(prompts) - 1) for i in range(share)]
    pictures = []
    for start in range(0, share, batch_size):
        numbers = mine[start : start + batch_size]
        features = encoders.text.encode(encoders.text.tokenize([prompts[i] for i in numbers]))
        noise = rng.normal(seed, Purpose.PICTURE, torch.tensor(numbers, device=encoders.device), shape, dtype)

        empty = encoders.text.empty
        guided = partial(
            _guided,
            predict,
            cfg_scale,
            features,
            TextFeatures(empty.txt.expand_as(features.txt), empty.vec.expand_as(features.vec)),
        )
        pictures.append(encoders.decode(euler(guided, noise, times)))
    shares = all_gather(torch.cat(pictures).cpu(), world.control)
    return torch.cat(shares)[: len(prompts)]


def _guided(
    predict: Predict, cfg_scale: float | None, text: TextFeatures, empty: TextFeatures, x: Tensor, t: Tensor
) -> Tensor:
    """u + cfg_scale (c - u), c for the prompts, u for the empty one (Ho & Salimans 2022); or c alone."""
    if cfg_scale is None:
        return predict(x, t, text.txt, text.vec).to(x.dtype)
    both = predict(
        torch.cat([x, x]),
        torch.cat([t, t]),
        torch.cat([empty.txt, text.txt]),
        torch.cat([empty.vec, text.vec]),
    )
    u, c = both.to(x.dtype).chunk(2)
    return u + cfg_scale * (c - u)
