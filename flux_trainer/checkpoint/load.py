"""Reading a checkpoint folder: check the files, compare the settings, then fill the tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from flux_trainer.checkpoint import commit
from flux_trainer.checkpoint.commit import STATE
from flux_trainer.checkpoint.errors import CheckpointError, DamagedError, on_first, together
from flux_trainer.checkpoint.identity import differences
from flux_trainer.checkpoint.plan import Tensors
from flux_trainer.checkpoint.tensors import on_no_rank, raise_if_any, read_tensors, saved_dtypes
from flux_trainer.runtime.layout import WHOLE, Layouts
from flux_trainer.runtime.log import logger

NOT_MODEL = ("optimizer.", "ema.", "guard.")
"""Names of a checkpoint that begin so are no parameters of the model."""


def verify(path: Path, group: dist.ProcessGroup | None = None) -> None:
    """Compare every file of a checkpoint folder with its manifest; the ranks of `group` share the work.

    Files that the manifest does not know are never read, so they are only warned of.

    Raises:
        DamagedError: on all ranks, naming each file that is damaged or missing.
        CheckpointError: `path` is no checkpoint folder of this trainer, or cannot be read.
    """
    files = on_first(group, lambda: commit.read_manifest(path))
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    share = commit.pieces(files, rank, size)
    found = together(group, lambda: commit.find_damage(path, files, share))
    if damage := sorted(set().union(*found)):
        raise DamagedError(f"{path} is damaged: {', '.join(damage)}.")
    if extra := {file.name for file in path.iterdir()} - {commit.MANIFEST, *files}:
        logger.warning(f"{path} holds files that the trainer did not write: {', '.join(sorted(extra))}")


def load_run(
    path: Path,
    tensors: Tensors,
    group: dist.ProcessGroup | None = None,
    layouts: Layouts = WHOLE,
    identity: Mapping[str, Any] | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Fill `tensors` with the run saved in a verified folder; returns the state that was saved beside them.

    Together, the ranks of `group` have all the tensors there are; each gives those that it holds.

    Args:
        layouts: how tensor parallelism shares out parameters.
        identity: what the run must share with the saved `state["identity"]`, unless `force` is set.

    Raises:
        CheckpointError: settings differ, or names, shapes or dtypes do; nothing has been filled then.
    """
    state = on_first(group, lambda: json.loads((path / STATE).read_bytes()))
    changed = differences(state.get("identity", {}), identity) if identity is not None else []
    if changed and not force:
        raise CheckpointError(
            f"{path} was written with other settings or data: {'; '.join(changed)}; "
            "set --checkpoint.force_resume to go on."
        )
    if changed:
        logger.warning(f"Going on from {path} in spite of other settings or data: {'; '.join(changed)}")
    dtypes = on_first(group, lambda: saved_dtypes(path))
    _same_choice_of_average(path, saved=_has_average(dtypes), here=_has_average(tensors))
    problems = [f"{name} is not in this run" for name in on_no_rank(dtypes, tensors, group)]
    problems += [
        f"{name} is {dtypes[name]}, here {tensor.dtype}"
        for name, tensor in tensors.items()
        if name in dtypes and dtypes[name] != tensor.dtype
    ]
    together(group, lambda: raise_if_any(path, problems))
    read_tensors(path, tensors, group, layouts)
    return state


def _has_average(names: Iterable[str]) -> bool:
    return any(name.startswith("ema.") for name in names)


def _same_choice_of_average(path: Path, saved: bool, here: bool) -> None:
    if saved != here:
        has, flag = ("a", "--ema.enable") if saved else ("no", "--ema.no-enable")
        raise CheckpointError(
            f"{path} has {has} moving average of the weights, so it goes on with {flag} only. To change "
            f"that, start a new run from its weights: --checkpoint.initial_load_path {path}, and another "
            "--job.dump_folder. Its optimizer starts anew, its average with those weights."
        )


def load_model(
    path: Path,
    tensors: Tensors,
    group: dist.ProcessGroup | None = None,
    layouts: Layouts = WHOLE,
    *,
    ema: bool = False,
) -> None:
    """Fill a model's parameters, given by native name, from any run's folder; dtypes are cast.

    Together, the ranks of `group` have all parameters; each gives those that it holds. `ema`: from the run's
    moving average of them.

    Raises:
        CheckpointError: the folder is damaged, or holds another model.
    """
    verify(path, group)
    saved = on_first(group, lambda: saved_dtypes(path))
    if ema:
        tensors = {f"ema.{name}": tensor for name, tensor in tensors.items()}
    names = [name for name in saved if name.startswith("ema.") == ema]
    names = [name for name in names if ema or not name.startswith(NOT_MODEL)]
    strangers = on_no_rank(names, tensors, group)
    raise_if_any(path, [f"{name} is not in this model" for name in strangers])
    read_tensors(path, tensors, group, layouts)
