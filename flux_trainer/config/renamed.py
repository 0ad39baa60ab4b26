"""Keys of torchtitan v0.2.2 (the last release with TOML files) that have another name or no meaning here.

A key whose meaning is the same keeps its name and is not listed. Every other one is either translated or
ignored, with a notice that the run logs, or refused with the key to use instead: nothing changes unseen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from flux_trainer.config import toml
from flux_trainer.config.fields import Path


class Assignment(NamedTuple):
    """`path` was set to `value` in `origin` (a file or the command line)."""

    origin: str
    path: Path
    value: Any


@dataclass(frozen=True)
class Renamed:
    """What becomes of an old key.

    moved: `note` is the new key, of the same meaning. switch: true sets the key `note` to `value`, false is
    dropped. ignored: any value is dropped. refused: every value is. neutral: `value` is what happens here
    anyway and is dropped, others are refused.
    """

    kind: Literal["moved", "switch", "ignored", "refused", "neutral"]
    note: str
    value: Any = None


def _moved(key: str) -> Renamed:
    return Renamed("moved", key)


def _ignored(note: str) -> Renamed:
    return Renamed("ignored", note)


def _refused(note: str) -> Renamed:
    return Renamed("refused", note)


def _only(value: Any, note: str) -> Renamed:
    return Renamed("neutral", note, value)


_SOURCES = "use [[data.sources]] tables"
_HELD_OUT = "use [[validation.sources]] tables"
_TOKENIZERS = "the tokenizers come from encoder.t5_tokenizer and encoder.clip_tokenizer"
_RECORDER = "torch reads the settings of its flight recorder from the environment"
_NO_SUCH_MESH = "the mesh it belongs to is not in this version"

# The longest matching name counts; the name of a section stands for all its keys.
RENAMED: dict[str, Renamed] = {
    "job.config_file": _refused(
        "files are layered on the command line: --job.config_file A.toml --job.config_file B.toml"
    ),
    "job.custom_config_module": _ignored(
        "FLUX's settings are built in. v0.2's own choices: training.classifier_free_guidance_joint = false "
        "(T5's and CLIP's captions dropped independently) and optimizer.decay_all = true"
    ),
    "job.save_config_file": _ignored("the resolved settings are always saved in job.dump_folder"),
    "model.hf_assets_path": _ignored(_TOKENIZERS),
    "model.tokenizer_path": _ignored(_TOKENIZERS),
    "model.converters": _only([], "8-bit linears are chosen with quantize.linears"),
    "model.print_after_conversion": _ignored("the log names the linears that quantize.linears has changed"),
    "training.dataset": _refused(_SOURCES),
    "training.dataset_path": _refused(_SOURCES + " (key path)"),
    "training.dataloader.num_workers": _moved("data.num_workers"),
    "training.dataloader.prefetch_factor": _moved("data.prefetch_factor"),
    "training.dataloader": _ignored("pinned memory and lasting workers are no settings here"),
    "training.classifer_free_guidance_prob": _moved("training.classifier_free_guidance_prob"),
    "training.test_mode": _only(
        False, "use encoder.random_init = true with encoder.t5_tokenizer and encoder.clip_tokenizer"
    ),
    "training.seq_len": _ignored("the token count follows from training.img_size"),
    "training.enable_cpu_offload": _only(False, "this version does not offload to the CPU"),
    "training.gc_debug": _only(False, "this version has no garbage-collection debugging"),
    "optimizer.early_step_in_backward": _moved("optimizer.in_backward"),
    "parallelism.enable_compiled_autograd": _only(False, "this version does not have it"),
    "parallelism.expert_parallel_degree": _only(1, "FLUX has no experts"),
    "parallelism.expert_tensor_parallel_degree": _only(1, "FLUX has no experts"),
    "parallelism.expert_parallel_comm_backend": _ignored("FLUX has no experts"),
    "parallelism.disable_loss_parallel": _ignored(_NO_SUCH_MESH),
    "parallelism.enable_async_tensor_parallel": _ignored(_NO_SUCH_MESH),
    "parallelism.context_parallel_load_balancer": _ignored(
        "attention is not causal: all parts cost the same"
    ),
    "parallelism.context_parallel_rotate_method": _ignored("see parallelism.context_parallel_method"),
    "parallelism.module_fqns_per_model_part": _ignored(_NO_SUCH_MESH),
    **{
        f"parallelism.pipeline_parallel_{key}": _ignored(_NO_SUCH_MESH)
        for key in (
            "first_stage_less_layers",
            "last_stage_less_layers",
            "layers_per_stage",
            "schedule_csv",
            "microbatch_size",
            "expert_parallel_overlap",
        )
    },
    **{
        f"activation_checkpoint.{key}": _ignored("FLUX's blocks need no such setting")
        for key in (
            "per_op_sac_force_recompute_mm_shapes_by_fqns",
            "early_stop",
            "visualize_memory_budget_pareto",
            "preserve_rng_state",
            "determinism_check",
            "debug",
        )
    },
    "checkpoint.initial_load_model_only": _only(
        True, "checkpoint.initial_load_path takes the model's weights only"
    ),
    "checkpoint.initial_load_in_hf": _ignored("the layout of checkpoint.initial_load_path is found out"),
    "checkpoint.initial_load_in_hf_quantized": _only(False, "quantised weights are not read"),
    "checkpoint.last_save_model_only": _ignored("the last save is always resumable"),
    "checkpoint.last_save_in_hf": Renamed("switch", "checkpoint.export", ["diffusers"]),
    "checkpoint.exclude_from_loading": _only(
        [], "checkpoint.initial_load_path takes the model's weights only; a resume takes everything"
    ),
    "checkpoint.enable_first_step_checkpoint": _only(False, "set checkpoint.interval"),
    "checkpoint.create_seed_checkpoint": _only(
        False, "not needed: the initial weights are the same for any number of ranks"
    ),
    "checkpoint.load_only": _only(False, "set checkpoint.enable = false with checkpoint.initial_load_path"),
    "comm.mode": _only("default", "this version has no other modes"),
    "comm.trace_buf_size": _ignored(_RECORDER),
    "comm.save_traces_folder": _ignored(_RECORDER),
    "comm.save_traces_file_prefix": _ignored(_RECORDER),
    "metrics.save_for_all_ranks": _only(False, "metrics are written once, for the whole run"),
    "debug.deterministic_warn_only": _only(False, "debug.deterministic refuses other kernels"),
    "debug.moe_force_load_balance": _ignored("FLUX has no experts"),
    "validation.eval_freq": _refused("use validation.freq (nothing read eval_freq)"),
    "validation.dataset": _refused(_HELD_OUT),
    "validation.dataset_path": _refused(_HELD_OUT + " (key path)"),
    "validation.dataloader": _ignored("the loader's settings are those of [data]"),
    "validation.seq_len": _ignored("the token count follows from training.img_size"),
    "validation.steps": _refused(
        "use validation.samples (= steps x validation.local_batch_size x ranks; -1: all)"
    ),
    "validation.save_img_count": _ignored("one picture is drawn for each of validation.prompts"),
    "validation.all_timesteps": _ignored("every sample meets validation.timesteps values of t"),
    "inference.img_size": _ignored("nothing read it in v0.2; use inference.sizes"),
    "quantize.linear": _ignored("without model.converters they had no effect"),
    "quantize.grouped_mm": _ignored("without model.converters they had no effect"),
    "memory_estimation.enabled": _only(False, "this version does not have it"),
    "memory_estimation": _ignored("without memory_estimation.enabled they had no effect"),
    "fault_tolerance.enable": _only(False, "this version does not have it"),
    "fault_tolerance": _ignored("without fault_tolerance.enable they had no effect"),
    "experimental": _only("", "this version does not import modules by name"),
}

# Values that have another name: key -> old value -> value here.
VALUES: dict[str, dict[str, str]] = {
    "model.name": {"flux": "flux1"},
    "checkpoint.async_mode": {"async_with_pinned_mem": "async"},
}


def old_name(path: Path) -> str | None:
    """The longest name in `RENAMED` that covers `path`."""
    names = (".".join(path[:end]) for end in range(len(path), 0, -1))
    return next((name for name in names if name in RENAMED), None)


def translate(assignments: Iterable[Assignment]) -> tuple[list[Assignment], list[str], list[str]]:
    """Assignments in today's names, notices of what was translated or ignored, and problems with the rest."""
    kept: list[Assignment] = []
    notices: dict[str, None] = {}  # an ordered set: an ignored section is mentioned once
    problems: list[str] = []
    for assignment in assignments:
        origin, path, value = assignment
        key = ".".join(path)
        name = old_name(path)
        if name is None:
            today = VALUES.get(key, {}).get(value) if isinstance(value, str) else None
            if today is not None:
                notices[f"{origin}: {key} = {toml.value(value)} is read as {toml.value(today)}"] = None
            kept.append(assignment if today is None else Assignment(origin, path, today))
            continue
        old = RENAMED[name]
        if old.kind == "moved":
            notices[f"{origin}: {key} is read as {old.note}"] = None
            kept.append(Assignment(origin, tuple(old.note.split(".")), value))
        elif old.kind == "switch" and isinstance(value, bool):
            means = f"read as {old.note} = {toml.value(old.value)}" if value else "ignored: it is so anyway"
            notices[f"{origin}: {key} = {toml.value(value)} is {means}"] = None
            if value:
                kept.append(Assignment(origin, tuple(old.note.split(".")), old.value))
        elif old.kind == "ignored":
            notices[f"{origin}: {name} is ignored: {old.note}"] = None
        elif old.kind == "neutral" and value == old.value:
            notices[f"{origin}: {key} = {toml.value(value)} is ignored: it is so anyway"] = None
        else:
            problems.append(
                f"{origin}: {key} = {toml.value(value)}: a torchtitan v0.2 key, unknown here; {old.note}"
            )
    return kept, list(notices), problems
