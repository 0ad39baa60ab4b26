"""What `check.py` asks of the sections that say how a model is computed, beside its meshes."""

from __future__ import annotations

from collections.abc import Iterator

from flux_trainer.config.files import Finding
from flux_trainer.config.schema import JobConfig

_POLICIES = ("", "none", "full", "selective", "attention", "memory_budget", "op")


def recompute_and_compile(config: JobConfig) -> Iterator[Finding]:
    option = config.activation_checkpoint.selective_ac_option
    if option != "op" and not (option.isdecimal() and int(option) >= 1):
        yield (
            "activation_checkpoint.selective_ac_option",
            'is not a valid choice; expected "op" or a number such as "2"',
        )
    section = config.activation_checkpoint
    for kind in ("double_blocks", "single_blocks"):
        policy = getattr(section, kind)
        if policy not in _POLICIES and not (policy.isdecimal() and int(policy) >= 1):
            yield (
                f"activation_checkpoint.{kind}",
                f'is not a valid choice; expected {", ".join(_POLICIES[1:])}, or a number such as "2"',
            )
    compiled = config.compile.enable and "model" in config.compile.components
    for key in ("mode", "double_blocks", "single_blocks"):
        if getattr(section, key) == "memory_budget" and not compiled:
            yield (
                f"activation_checkpoint.{key}",
                'needs compile.enable = true with "model" in compile.components: the compiler is what keeps '
                "the budget",
            )
    if config.compile.enable and not config.compile.components:
        yield "compile.components", 'is empty, so compile.enable has nothing to do; name "model" or "loss"'


def attention(config: JobConfig) -> Iterator[Finding]:
    """What is wrong on every device; `models.backends.check_backend` knows the one at hand."""
    key, backend = "attention.backend", config.attention.backend
    dtype = config.training.mixed_precision_param
    if backend == "cudnn" and dtype != "bfloat16":
        yield key, f'computes in bfloat16, not in training.mixed_precision_param = "{dtype}"; take "auto"'
    if backend in ("efficient", "flex") and dtype == "float64":
        yield key, 'does not take training.mixed_precision_param = "float64"; take "math" or "auto"'
    if backend == "cudnn" and config.debug.deterministic:
        yield key, 'does not go with debug.deterministic = true; take "flash" or "auto"'


def flex(config: JobConfig) -> Iterator[Finding]:
    """Selective checkpointing sees a compiled attention where the whole block is compiled, and not alone."""
    section, compiled = config.activation_checkpoint, config.compile.enable
    compiled = compiled and "model" in config.compile.components
    used = {section.double_blocks or section.mode, section.single_blocks or section.mode}
    kept = used & {"op", "attention"} or ("selective" in used and section.selective_ac_option == "op")
    if config.attention.backend == "flex" and kept and not compiled:
        yield (
            "attention.backend",
            'needs compile.enable = true with "model" in compile.components where activation checkpointing '
            'keeps single results (selective op, attention); or set activation_checkpoint.mode to "full" or '
            '"none"',
        )


def quantize(config: JobConfig) -> Iterator[Finding]:
    if config.quantize.linears == "none":
        return
    key = f'quantize.linears = "{config.quantize.linears}"'
    if config.training.mixed_precision_param != "bfloat16":
        yield "training.mixed_precision_param", f'does not go with {key}, which takes "bfloat16"'
    if config.parallelism.tensor_parallel_degree > 1:
        yield (
            "parallelism.tensor_parallel_degree",
            f"does not go with {key}; use FSDP alone, or context parallelism",
        )
