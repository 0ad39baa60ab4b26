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
from flux_trainer.encoders.bundle import Encoded, Encoders
from flux_trainer.encoders.text import TextFeatures
from flux_trainer.flow import rng
from flux_trainer.flow.euler import euler
from flux_trainer.flow.path import interpolate, velocity
from flux_trainer.flow.rng import Purpose
from flux_trainer.runtime.dist import World, all_gather

Predict = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x_t [B, C, H, W], t [B], txt [B, L, D], vec [B, D']) -> the model's velocity [B, C, H, W]."""

Encode = Callable[[Batch], tuple[Tensor, Tensor, Encoded]]
"""A rank's batch -> draws [n], valid [n] and the encoded samples of all ranks that work on the same ones."""


@torch.no_grad()
def validation_loss(
    batches: Iterable[Batch],
    encode: Encode,
    predict: Predict,
    *,
    batch_size: int,
    timesteps: int,
    seed: int,
    world: World,
    counts: bool,
    dtype: torch.dtype,
    bad_samples: BadSamples,
) -> list[float]:
    """Mean squared error of the velocity at each t = (i + 0.5) / timesteps, over all ranks' valid samples.

    Every rank must be given the same number of batches; rows that only pad have `valid` false.

    Args:
        batch_size: samples in one forward pass.
        counts: whether this rank's figures count: one of those that work on the same samples.

    Raises:
        DataError: on all ranks, when not one sample is valid.
    """
    sums: Tensor | float = 0.0  # [timesteps + 1]: of the errors at each t, then the count
    for batch in batches:
        bad_samples.list(batch.bad)
        draws, valid, encoded = encode(batch)
        for start in range(0, len(draws), batch_size):
            part = slice(start, start + batch_size)
            sample = encoded.rows(part)
            x_0 = sample.latents.to(dtype)
            errors = []
            for i in range(timesteps):
                t = torch.full((len(x_0),), (i + 0.5) / timesteps, dtype=dtype, device=x_0.device)
                noise = rng.normal(seed, Purpose.VAL_NOISE, draws[part] * timesteps + i, x_0.shape[1:], dtype)
                v = predict(interpolate(x_0, noise, t), t, sample.txt, sample.vec)
                errors.append((v.to(dtype) - velocity(x_0, noise)).square().flatten(1).mean(1))  # [B]
            column = torch.stack([*errors, torch.ones_like(errors[0])]).double()  # [timesteps + 1, B]
            sums = sums + torch.where(valid[part], column, 0.0).sum(1)
    mine = sums.tolist() if counts and isinstance(sums, Tensor) else [0.0] * (timesteps + 1)
    *totals, count = world.sum(mine)
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
    group: int,
    groups: int,
    counts: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Pictures uint8 [len(prompts), 3, H, W] of the prompts, the same on every rank.

    The groups share the prompts out; each makes the same number of calls, the last ones possibly for nothing.
    Noise is keyed by the prompt's number. Euler steps from noise to data.

    Args:
        group: number of this rank's group among `groups`; a group's ranks work on the same prompts.
        counts: whether this rank's pictures count: one of its group.
        shape: of one image's latents, [C, H/8, W/8].
        times: falling from 1 to 0 (`flow.timesteps.schedule`).
        cfg_scale: of classifier-free guidance against the empty prompt; None: without it.
    """
    share = -(-len(prompts) // groups)  # prompts per group, rounded up
    mine = [min(group * share + i, len(prompts) - 1) for i in range(share)]
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
    shares = all_gather((group, torch.cat(pictures).cpu()) if counts else None, world.control)
    in_order = sorted((share for share in shares if share is not None), key=lambda share: share[0])
    return torch.cat([pictures for _, pictures in in_order])[: len(prompts)]


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
