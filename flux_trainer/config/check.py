"""Checks that look at several keys, or at the disk. They need no torch: `run_train.sh` runs them first.

Each check yields (key, sentence); the sentence goes on after "KEY = VALUE" and says how to mend the mistake.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flux_trainer.config import check_compute, toml
from flux_trainer.config.check_text import unusable_text
from flux_trainer.config.files import Finding, missing_files, missing_for_pictures
from flux_trainer.config.outputs import unusable_outputs
from flux_trainer.config.pictures import SEED_LIMIT, parse_size
from flux_trainer.config.problems import ConfigError, origin_of
from flux_trainer.config.schema import FAMILIES, JobConfig

_BITS = {"bfloat16": 16, "float32": 32, "float64": 64}


def check(
    config: JobConfig,
    world_size: int | None,
    origins: Mapping[str, str] | None = None,
    *,
    files: bool = True,
) -> list[str]:
    """Refuse settings that cannot work together, or name files or folders that cannot be used.

    Args:
        config: the settings; each key is already known to be valid alone.
        world_size: number of ranks; None where it is not known yet, which leaves out the checks that need it.
        origins: where each key was written (`Loaded.origins`), to be named in the messages.
        files: look whether the files that the settings name are there, and their folders can be written to.

    Returns:
        Remarks about settings that work, but hardly as they were meant; for the run's log.

    Raises:
        ConfigError: with one line for each mistake.
    """
    findings = [*inconsistencies(config, world_size)]
    if files:
        findings += [*missing_files(config), *unusable_outputs(config)]
    if findings:
        raise ConfigError([_line(config, finding, origins or {}) for finding in findings])
    return [_line(config, finding, origins or {}) for finding in _remarks(config, world_size)]


def check_generation(
    config: JobConfig, world_size: int | None, origins: Mapping[str, str] | None = None
) -> None:
    """As `check`, for drawing pictures with the settings: those of data and training do not matter."""
    findings = [*_model(config), *_parallelism(config, world_size), *_references(config), *_inference(config)]
    findings += check_compute.attention(config)
    findings += [*unusable_text(config), *missing_for_pictures(config)]
    if findings:
        raise ConfigError([_line(config, finding, origins or {}) for finding in findings])


def inconsistencies(config: JobConfig, world_size: int | None) -> Iterator[Finding]:
    """What is wrong with the values alone, whatever is on the disk."""
    yield from _parallelism(config, world_size)
    yield from _batch(config, world_size)
    yield from _in_backward(config, world_size)
    yield from unusable_text(config)
    for part in _CHECKS:
        yield from part(config)


def _line(config: JobConfig, finding: Finding, origins: Mapping[str, str]) -> str:
    key, sentence = finding
    value: Any = config
    for name in key.split("."):
        value = value[int(name)] if name.isdigit() else getattr(value, name)
    text = "" if value is None else f" = {toml.value(value)}"
    return f"{origin_of(key, origins)}: {key}{text} {sentence}"


def _sharing(config: JobConfig) -> int:
    """Ranks that work on the same samples."""
    section = config.parallelism
    return section.tensor_parallel_degree * section.context_parallel_degree * section.pipeline_parallel_degree


def _parallelism(config: JobConfig, world_size: int | None) -> Iterator[Finding]:
    section = config.parallelism
    replicate, shard = section.data_parallel_replicate_degree, section.data_parallel_shard_degree
    if shard < 1 and shard != -1:
        yield (
            "parallelism.data_parallel_shard_degree",
            "is out of range; expected an integer >= 1, or -1 for all ranks that remain",
        )
        return
    if world_size is None:
        return
    degrees = {"data_parallel_replicate_degree": replicate} | {
        f"{kind}_parallel_degree": getattr(section, f"{kind}_parallel_degree")
        for kind in ("tensor", "context", "pipeline")
    }
    factors = [f"{name} {n}" for name, n in degrees.items() if n > 1]
    product = math.prod(degrees.values())
    if shard == -1 and world_size % product:
        key, possible = max(degrees, key=lambda name: degrees[name]), f"; possible: {_divisors(world_size)}"
        others = [factor for factor in factors if not factor.startswith(key)]
        arithmetic = f"x {' x '.join(others)} = {product}, which " if others else ""
        yield (
            f"parallelism.{key}",
            f"{arithmetic}does not divide the {world_size} ranks of this run{'' if others else possible}",
        )
    elif shard != -1 and product * shard != world_size:
        times = f"x {' x '.join(factors)} " if factors else ""
        yield (
            "parallelism.data_parallel_shard_degree",
            f"{times}= {product * shard} ranks, but this run has {world_size}; -1 takes all that remain",
        )


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def _batch(config: JobConfig, world_size: int | None) -> Iterator[Finding]:
    total, local = config.training.global_batch_size, config.training.local_batch_size
    if total == -1:
        return
    if total < 1:
        yield (
            "training.global_batch_size",
            "is out of range; expected an integer >= 1, or -1 for one local batch per rank",
        )
        return
    shared = _sharing(config)
    groups = (world_size or shared) // shared  # of ranks that work on the same samples
    unit = local * max(1, groups)
    if total % unit:
        ranks = f" x {groups} {'ranks' if shared == 1 else 'groups of ranks'} = {unit}" if world_size else ""
        near = " or ".join(str(n) for n in (total // unit * unit, (total // unit + 1) * unit) if n)
        yield (
            "training.global_batch_size",
            f"is not a multiple of training.local_batch_size {local}{ranks}; try {near}",
        )


def _model(config: JobConfig) -> Iterator[Finding]:
    name, flavor = config.model.name, config.model.flavor
    if flavor not in FAMILIES[name]:
        yield (
            "model.flavor",
            f'does not belong to model.name = "{name}", whose flavors are {", ".join(FAMILIES[name])}; '
            "leave model.name out, and the flavor decides",
        )


def _training(config: JobConfig) -> Iterator[Finding]:
    section = config.training
    if section.img_size % 16:
        low = section.img_size // 16 * 16
        near = " or ".join(str(n) for n in (low, low + 16) if n)
        yield (
            "training.img_size",
            f"is not a multiple of 16 (8 pixels per latent, 2 latents per token); try {near}",
        )
    if 0 < section.spike_factor <= 1:
        yield (
            "training.spike_factor",
            "would skip ordinary steps; expected a number > 1, or 0 for no such limit",
        )
    if section.dtype == "float64":
        for key in ("mixed_precision_param", "mixed_precision_reduce"):
            if getattr(section, key) != "float64":
                yield (
                    f"training.{key}",
                    'would round what training.dtype = "float64" keeps; set it to "float64" too',
                )
    elif _BITS[section.mixed_precision_param] > _BITS[section.dtype]:
        yield (
            "training.mixed_precision_param",
            f'is wider than training.dtype = "{section.dtype}", the weights it is made from',
        )


def _optimizer(config: JobConfig) -> Iterator[Finding]:
    for key in ("beta1", "beta2"):
        if getattr(config.optimizer, key) == 1:
            yield f"optimizer.{key}", "would never take in a gradient; expected a number below 1"
    total, warmup = config.lr_scheduler.total_steps, config.lr_scheduler.warmup_steps
    if total is not None and warmup > total:
        yield (
            "lr_scheduler.warmup_steps",
            f"is longer than the whole schedule, lr_scheduler.total_steps = {total}",
        )

    if config.optimizer.state_dtype and config.training.dtype == "float64":
        yield "optimizer.state_dtype", 'would round what training.dtype = "float64" keeps; leave it out'


def _in_backward(config: JobConfig, world_size: int | None) -> Iterator[Finding]:
    """A step in backward never has all gradients together, and knows only one micro-batch."""
    if not config.optimizer.in_backward:
        return
    training, key = config.training, "optimizer.in_backward = true"
    if training.max_norm:
        yield "training.max_norm", f"needs the norm of all gradients before any step; with {key}, set it to 0"
    if training.spike_factor:
        yield "training.spike_factor", f"judges a step before it is done; with {key}, set it to 0"
    if config.parallelism.pipeline_parallel_degree > 1:
        yield "parallelism.pipeline_parallel_degree", f"needs several micro-batches, of which {key} takes one"
    elif world_size and training.global_batch_size != -1:
        single = training.local_batch_size * max(1, world_size // _sharing(config))
        if training.global_batch_size != single:
            yield (
                "training.global_batch_size",
                f"needs gradient accumulation, which {key} cannot do; set it to {single}, or to -1",
            )


def _sources(config: JobConfig) -> Iterator[Finding]:
    if not config.data.sources:
        yield (
            "data.sources",
            "is empty: nothing to train on; add a [[data.sources]] table or --data.sources.0.type synthetic",
        )
    for name, sources in (
        ("data.sources", config.data.sources),
        ("validation.sources", config.validation.sources),
    ):
        weights = [source.weight for source in sources]
        if any(w is None for w in weights) and any(w is not None for w in weights):
            yield (
                f"{name}.{weights.index(None)}.weight",
                "is missing: weights are given for all sources or for none",
            )
        elif weights and None not in weights and sum(w or 0 for w in weights) == 0:
            yield f"{name}.0.weight", "is 0 as are all the others: no source would be drawn from"
        for i, source in enumerate(sources):
            if source.type != "synthetic" and not source.path:
                yield f"{name}.{i}.path", f'is empty; a source of type "{source.type}" needs one'
            for key, kind in (("reference_key", "jsonl"), ("reference_paths", "folder")):
                if getattr(source, key) and source.type != kind:
                    yield f"{name}.{i}.{key}", f'is for sources of type "{kind}"; this is "{source.type}"'
            if source.weight is not None and source.repeats != 1:
                yield f"{name}.{i}.repeats", "has no effect beside a weight; give one of the two"


def _references(config: JobConfig) -> Iterator[Finding]:
    if config.data.reference_size < 16 and config.data.reference_size != -1:
        yield "data.reference_size", "is less than a token; expected at least 16 pixels, or -1 for img_size"
    if (config.inference.reference_size or 16) < 16:
        yield "inference.reference_size", "is less than a token; expected at least 16 pixels"


def _validation(config: JobConfig) -> Iterator[Finding]:
    section = config.validation
    if section.samples < 1 and section.samples != -1:
        yield "validation.samples", "is out of range; expected an integer >= 1, or -1 for all"
    if section.prompts and section.prompts_path:
        yield "validation.prompts_path", "and validation.prompts are both given; give one of the two"
    if section.enable and not (section.sources or section.prompts or section.prompts_path):
        yield (
            "validation.enable",
            "has nothing to do; add [[validation.sources]] for the loss or validation.prompts for pictures",
        )


def _inference(config: JobConfig) -> Iterator[Finding]:
    section = config.inference
    if section.prompts and section.prompts_path:
        yield "inference.prompts_path", "and inference.prompts are both given; give one of the two"
    for i, size in enumerate(section.sizes):
        if parse_size(size) is None:
            yield (
                f"inference.sizes.{i}",
                'is no size of a picture; expected WIDTHxHEIGHT such as "1024x768", or one number for a '
                "square, in multiples of 16 pixels",
            )
    if section.seed + section.images_per_prompt > SEED_LIMIT:
        yield "inference.seed", f"is too large; the seeds of all pictures lie below 2^56 = {SEED_LIMIT}"


def _checkpoint(config: JobConfig) -> Iterator[Finding]:
    section = config.checkpoint
    if section.load_step < -1:
        yield "checkpoint.load_step", "is out of range; expected a step, or -1 for the newest"
    elif section.load_step != -1 and not section.enable:
        yield "checkpoint.load_step", "has no effect without checkpoint.enable = true"
    if section.export and not section.enable:
        yield "checkpoint.export", "needs checkpoint.enable = true: it is made from the last checkpoint"
    if section.export_ema and not (section.export and config.ema.enable):
        yield "checkpoint.export_ema", "needs ema.enable = true, and a format in checkpoint.export"


def _profiling(config: JobConfig) -> Iterator[Finding]:
    section = config.profiling
    if section.enable_profiling and section.profiler_warmup + section.profiler_active > section.profile_freq:
        needed = f"profiler_warmup {section.profiler_warmup} + profiler_active {section.profiler_active}"
        yield "profiling.profile_freq", f"is less than {needed}"


_CHECKS: tuple[Callable[[JobConfig], Iterator[Finding]], ...] = (
    _model,
    _training,
    _optimizer,
    _sources,
    _references,
    _validation,
    _inference,
    check_compute.recompute_and_compile,
    check_compute.attention,
    check_compute.flex,
    check_compute.quantize,
    _checkpoint,
    _profiling,
)


def _remarks(config: JobConfig, world_size: int | None) -> Iterator[Finding]:
    steps, schedule = config.training.steps, config.lr_scheduler
    if schedule.total_steps is None and schedule.warmup_steps > steps:
        yield (
            "lr_scheduler.warmup_steps",
            f"is cut to training.steps = {steps}; to try the first steps of a longer run as they are, set "
            "lr_scheduler.total_steps to its length",
        )
    per_step = config.training.global_batch_size
    if per_step == -1 and world_size is not None:
        per_step = config.training.local_batch_size * world_size // _sharing(config)
    if config.ema.enable and config.ema.rampup_ratio == 0 and 0 < per_step * steps < config.ema.half_life:
        yield (
            "ema.half_life",
            f"samples are more than the whole run's {per_step * steps}, so the average will stay near the "
            "initial weights; set ema.rampup_ratio",
        )
    replicas = config.parallelism.data_parallel_replicate_degree
    if config.training.encode_ahead and world_size is not None and world_size > replicas:
        yield (
            "training.encode_ahead",
            f"has no effect where {world_size // replicas} ranks share a copy of the model: the text "
            "encoder's traffic would get in the way of the step's",
        )
