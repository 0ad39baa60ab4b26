"""The learning rate as a function of the step: warm-up, constant, decay. Nothing to save."""

from __future__ import annotations

import math

from flux_trainer.config.schema import LRScheduler


def lr_factor(step: int, section: LRScheduler, training_steps: int) -> float:
    """Share of the peak rate for `step` (1 is the first), in [0, 1].

        warm-up:  step / warmup_steps
        constant: 1
        decay:    1 - (1 - min_lr_factor) * f(p), with p = share of the decay that lies behind, and
                  f = p (linear), sqrt(p) (sqrt) or (1 - cos(pi p)) / 2 (cosine)

    The horizon is `total_steps`, else `training_steps`; beyond it the rate stays at its end.
    """
    horizon = section.total_steps or training_steps
    warmup = min(section.warmup_steps, horizon)
    if step <= warmup:
        return step / warmup
    decay_steps = horizon - warmup
    if section.decay_ratio is not None:
        decay_steps = min(decay_steps, round(horizon * section.decay_ratio))
    behind = step - 1 - (horizon - decay_steps)
    if decay_steps == 0 or behind <= 0:
        return 1.0
    p = min(behind / decay_steps, 1.0)
    fall = {"linear": p, "sqrt": math.sqrt(p), "cosine": (1 - math.cos(math.pi * p)) / 2}[section.decay_type]
    return 1 - (1 - section.min_lr_factor) * fall
