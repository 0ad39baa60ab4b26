"""Validation: the loss on held-out samples at fixed times.

Noise is keyed by the sample's own index, so the figures depend neither on the world size nor on the batch,
are comparable between validations, and leave no trace in training. Pictures come from `sample.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from flux_trainer.data.bad import BadSamples, DataError
from flux_trainer.data.samples import Batch
from flux_trainer.encoders.bundle import Encoded
from flux_trainer.flow import rng
from flux_trainer.flow.path import interpolate, velocity
from flux_trainer.flow.rng import Purpose
from flux_trainer.parallel.mesh import DataGroup

Predict = Callable[[Tensor, Tensor, Encoded], Tensor]
"""(x_t [B, C, h, w], t [B], the encoded samples) -> the model's velocity [B, C, h, w]."""

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
    group: DataGroup,
    dtype: torch.dtype,
    bad_samples: BadSamples,
) -> list[float]:
    """Mean squared error of the velocity at each t = (i + 0.5) / timesteps, over all ranks' valid samples.

    Every rank must be given the same number of batches; rows that only pad have `valid` false.

    Args:
        batch_size: samples in one forward pass.

    Raises:
        DataError: on all ranks, when not one sample is valid.
    """
    columns: list[Tensor] = []  # [timesteps + 1] of each batch: sums of the errors at each t, then the count
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
                v = predict(interpolate(x_0, noise, t), t, sample)
                errors.append((v.to(dtype) - velocity(x_0, noise)).square().flatten(1).mean(1))  # [B]
            column = torch.stack([*errors, torch.ones_like(errors[0])]).double()  # [timesteps + 1, B]
            columns.append(torch.where(valid[part], column, 0.0).sum(1))
    mine = torch.stack(columns).sum(0).tolist() if columns and group.leads else [0.0] * (timesteps + 1)
    *totals, count = group.world.sum(mine)
    if count == 0:
        raise DataError(f"Not one validation sample could be used: {bad_samples.path} says why.")
    return [total / count for total in totals]
