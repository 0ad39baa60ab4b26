"""Where a run writes: folders that cannot be made, and what is in the way of its checkpoints. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from flux_trainer.config.files import Finding
from flux_trainer.config.schema import JobConfig
from flux_trainer.runtime.paths import folder_problem

MANIFEST = "manifest.json"
"""The file that a complete checkpoint has."""
STEP = re.compile(r"step-(0|[1-9][0-9]*)")
"""What the trainer calls the folder of a checkpoint."""


def unusable_outputs(config: JobConfig) -> Iterator[Finding]:
    """(key, sentence) for every folder of the run that cannot be written to."""
    dump = Path(config.job.dump_folder)
    if problem := folder_problem(dump):
        yield "job.dump_folder", f"cannot be used: {problem}"
        return  # the others lie in it
    for key, folder in _folders(config):
        if problem := folder_problem(dump / folder):
            yield key, f"cannot be used: {problem}"
    if config.checkpoint.enable:
        yield from _checkpoints(config, dump / config.checkpoint.folder)


def folders_of_one_run(config: JobConfig) -> Iterator[tuple[str, Path]]:
    """The setting and the folder of what two runs must not share: the dump folder, checkpoints elsewhere."""
    dump = Path(config.job.dump_folder)
    checkpoints = dump / config.checkpoint.folder
    yield "job.dump_folder", dump
    if config.checkpoint.enable and not checkpoints.resolve().is_relative_to(dump.resolve()):
        yield "checkpoint.folder", checkpoints


def _folders(config: JobConfig) -> Iterator[tuple[str, str]]:
    """What the run will write into, relative to the dump folder: the setting that asks for it, the folder."""
    checkpoint, profiling, validation = config.checkpoint, config.profiling, config.validation
    if checkpoint.enable:
        yield "checkpoint.folder", checkpoint.folder
    if checkpoint.export:
        yield "checkpoint.export", "export"
    if validation.enable and (validation.prompts or validation.prompts_path):
        yield "validation.save_img_folder", validation.save_img_folder
    if config.metrics.enable_tensorboard:
        yield "metrics.save_tb_folder", config.metrics.save_tb_folder
    if profiling.enable_profiling:
        yield "profiling.save_traces_folder", profiling.save_traces_folder
    if profiling.enable_memory_snapshot:
        yield "profiling.save_memory_snapshot_folder", profiling.save_memory_snapshot_folder


def _checkpoints(config: JobConfig, folder: Path) -> Iterator[Finding]:
    """A step to go back to that is not there; other things under the names of checkpoints to come."""
    section, last = config.checkpoint, config.training.steps
    steps = {int(name[1]): path for path in folder.glob("step-*") if (name := STEP.fullmatch(path.name))}
    complete = {step for step, path in steps.items() if os.path.isfile(path / MANIFEST)}
    first = section.load_step if section.load_step >= 0 else max(complete, default=0)
    if section.load_step >= 0 and not os.path.isdir(folder / f"step-{section.load_step}"):
        listed = ", ".join(steps[step].name for step in sorted(steps))
        there = f"there are {listed}" if listed else "there are none"
        yield "checkpoint.load_step", f"is not among the checkpoints in {folder}; {there}"
        return  # what else lies there depends on it
    for step in sorted(steps.keys() - complete):
        if first < step <= last:  # a signal may stop the run at any of them
            yield (
                "checkpoint.folder",
                f"holds {steps[step]}, which is not a complete checkpoint and blocks one; move it",
            )
