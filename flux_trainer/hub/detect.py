"""What lies at a path: a weights file, diffusers' folders, a checkpoint, or a run that has some."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flux_trainer.checkpoint.commit import MANIFEST
from flux_trainer.checkpoint.metadata import METADATA
from flux_trainer.hub.errors import WeightsError
from flux_trainer.hub.families import Component
from flux_trainer.hub.safetensors_files import INDEX_SUFFIX

CONFIG = "config.json"
PIPELINE = "model_index.json"
STEM = "diffusion_pytorch_model"
"""What diffusers calls the files of weights; `CONFIG` beside them is theirs."""

PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl"}


@dataclass(frozen=True)
class Place:
    """Where weights lie."""

    kind: Literal["safetensors", "checkpoint", "dcp"]
    """checkpoint: a step of this trainer; dcp: of another one."""
    path: Path
    """The file, the index of several, or the folder."""


def locate(path: str | Path, component: Component = "transformer") -> Place:
    """Find the weights that `path` means.

    Args:
        path: a safetensors file or an index; a folder of diffusers' layout, of a pipeline or one model; a
            checkpoint of this trainer or torchtitan; a folder with such checkpoints, which means the newest.
        component: which part of a pipeline.

    Raises:
        FileNotFoundError: nothing is there.
        WeightsError: what is there cannot be read, or may mean several things.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no file or folder {path.absolute()}.")
    if (path / MANIFEST).is_file():
        return Place("checkpoint", path)
    if (path / METADATA).is_file():
        return Place("dcp", path)
    if (path / PIPELINE).is_file() and (path / component).is_dir():
        return locate(path / component, component)
    return _newest_step(path) or _component(path, component)


def config_beside(place: Place) -> tuple[Path, dict[str, Any]] | None:
    """The JSON file that says which model a set of safetensors files is, and its content.

    It has the name of the weights' file (`ae.json` beside `ae.safetensors`), or is diffusers' `config.json`.
    """
    files = [place.path.parent / CONFIG]
    if place.path.suffix == ".safetensors":
        files.insert(0, place.path.with_suffix(".json"))
    file = next((file for file in files if file.is_file()), None)
    if place.kind != "safetensors" or file is None:
        return None
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:
        raise WeightsError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{file} must hold an object.")
    return file, values


def belongs(config: Path, place: Place) -> bool:
    """Whether a file that `config_beside` found can be of no other model than the weights beside it."""
    return config.name != CONFIG or place.path.name.startswith(STEM)


def _file(path: Path) -> Place:
    if path.name == METADATA or path.suffix == ".distcp":
        return locate(path.parent)
    if path.suffix in PICKLES:
        raise WeightsError(
            f"{path} is a pickle, which can run any code when it is read, and is not opened. "
            "Fetch the safetensors file of the same weights."
        )
    if path.suffix == ".gguf":
        raise WeightsError(f"{path} holds quantised weights; fetch the safetensors file they were made from.")
    return Place("safetensors", path)


def _newest_step(path: Path) -> Place | None:
    """The newest checkpoint in a folder of checkpoints, or in the dump folder of a run."""
    for pattern in ("step-*", "*/step-*"):
        steps: dict[tuple[str, int], Place] = {}
        for folder in path.glob(pattern):
            number = folder.name.removeprefix("step-")
            kind = "checkpoint" if (folder / MANIFEST).is_file() else "dcp"
            if number.isdecimal() and ((folder / MANIFEST).is_file() or (folder / METADATA).is_file()):
                steps[folder.parent.name, int(number)] = Place(kind, folder)  # type: ignore[arg-type]
        if len(parents := sorted({parent for parent, _ in steps})) > 1:
            raise WeightsError(f"{path} has several folders of checkpoints, {', '.join(parents)}: name one.")
        if steps:
            return steps[max(steps)]
    return None


def _component(path: Path, component: Component) -> Place:
    """The safetensors files of one model in a folder."""
    for pattern in (f"*{INDEX_SUFFIX}", "*.safetensors"):
        found = sorted(path.glob(pattern))
        plain = [file for file in found if file.name.count(".") == pattern.count(".")]  # no variant (.fp16.)
        if len(found) == 1 or len(plain) == 1:
            return Place("safetensors", (plain or found)[0])
        if found:
            raise WeightsError(f"{path} has {', '.join(file.name for file in found)}: name one of them.")
    if pickles := sorted(file.name for file in path.iterdir() if file.suffix in PICKLES):
        return _file(path / pickles[0])
    raise WeightsError(
        f"{path} has no weights of a {component}: no safetensors file, no {METADATA} of a checkpoint, no "
        f"folder {component}/ of a pipeline, no step-N."
    )
