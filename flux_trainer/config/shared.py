"""Which settings all ranks of a job must have in common; machines may have different files and flags."""

from __future__ import annotations

from typing import Any

from flux_trainer.config.schema import JobConfig


def of_a_run(config: JobConfig) -> dict[str, Any]:
    """Those of training: all but names, profiles, and how many workers read data."""
    machines: dict[str, Any] = {"job": True, "profiling": True, "data": {"num_workers", "prefetch_factor"}}
    return config.model_dump(mode="json", exclude=machines)


def of_pictures(config: JobConfig) -> dict[str, Any]:
    """Those of drawing, besides what is ordered."""
    names = ("model", "encoder", "training", "parallelism", "attention", "compile")
    sections: dict[str, Any] = dict.fromkeys(names, True)
    return config.model_dump(mode="json", include={**sections, "inference": {"ema", "local_batch_size"}})
