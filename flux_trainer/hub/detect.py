"""What lies at a path: a weights file, diffusers' folders, a checkpoint, or a run that has some. No torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flux_trainer.checkpoint.commit import MANIFEST, METADATA
from flux_trainer.hub.contents import is_index
from flux_trainer.hub.errors import WeightsError
from flux_trainer.hub.foreign import PICKLES, what_else

Component = Literal["transformer", "vae"]
"""diffusers' names of a pipeline's parts, and of their folders."""

CONFIG = "config.json"
PIPELINE = "model_index.json"
STEM = "diffusion_pytorch_model"
"""What diffusers calls the files of weights; `CONFIG` beside them is theirs."""
ENCODER_STEM = "model"
"""What transformers calls them."""

SUFFIXES = {".safetensors", ".sft"}
"""Of safetensors files in a folder, in upper or lower case; a file that is named may be called anything."""
_SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.\w+$")

_INDEX_OF_PICKLES = ".bin.index.json"


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
        raise FileNotFoundError(_not_there(path))
    if (path / MANIFEST).is_file():
        return Place("checkpoint", path)
    if (path / METADATA).is_file():
        return Place("dcp", path)
    if (path / PIPELINE).is_file() and (path / component).is_dir():
        return locate(path / component, component)
    if step := newest_step(path):
        return step
    if file := weights_in(path):
        return Place("safetensors", file)
    if (path / component).is_dir():  # of a pipeline that was fetched in part
        return locate(path / component, component)
    raise WeightsError(
        f"{path} has no weights of a {component}: no safetensors file, no {METADATA} of a checkpoint, no "
        f"folder {component}/ of a pipeline, no step-N."
    )


def weights_in(folder: Path, stem: str = STEM) -> Path | None:
    """The safetensors file of one model in a folder, or the index of several; None if it has none.

    Of several, those called `stem` come first; of these, the ones without a variant, such as that of
    `model.fp16.safetensors`.

    Raises:
        WeightsError: it is not clear which file is meant, or there are only some that are not read.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file() or file.is_symlink())
    weights = [file for file in files if file.suffix.lower() in SUFFIXES]
    groups: dict[tuple[bool, bool, bool], list[Path]] = {}
    for file in files:
        if is_index(file) or (file in weights and not _SHARD.search(file.name)):
            plain = not _variant(file)
            rank = (file.name.startswith(f"{stem}."), plain, plain and is_index(file))
            groups.setdefault(rank, []).append(file)
    indexed = any(map(is_index, files))
    shards = [] if indexed else [file for file in weights if _SHARD.search(file.name)]
    if groups and (max(groups)[0] or not shards):
        best = groups[max(groups)]
        if len(best) > 1:
            names = ", ".join(file.name for file in best)
            raise WeightsError(f"{folder} has {names}: name one of them, or leave only one.")
        return _file(best[0]).path
    if shards:
        raise WeightsError(
            f"{folder} has {shards[0].name}, but not the index of these files "
            "(*.safetensors.index.json). Fetch it too."
        )
    foreign = [
        file
        for file in files
        if file.suffix.lower() in {".gguf", *PICKLES} or file.name.endswith(_INDEX_OF_PICKLES)
    ]
    return _file(foreign[0]).path if foreign else None


def newest_step(path: Path) -> Place | None:
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


def config_beside(place: Place) -> tuple[Path, dict[str, Any]] | None:
    """The JSON file that says which model a set of safetensors files is, and its content.

    It has the name of the weights' file (`ae.json` beside `ae.safetensors`), or is diffusers' `config.json`.
    """
    files = [place.path.parent / CONFIG]
    if not is_index(place.path):
        files.insert(0, place.path.with_suffix(".json"))
    file = next((file for file in files if file.is_file()), None)
    if place.kind != "safetensors" or file is None:
        return None
    return file, read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; WeightsError if there is none."""
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{file} must hold an object.")
    return values


def belongs(config: Path, place: Place) -> bool:
    """Whether a file that `config_beside` found can be of no other model than the weights beside it."""
    return config.name != CONFIG or place.path.name.startswith(STEM)


def _file(path: Path) -> Place:
    if path.name == METADATA or path.suffix == ".distcp":
        return locate(path.parent)
    if not path.is_file():
        raise WeightsError(_not_there(path))
    if path.name.endswith(_INDEX_OF_PICKLES):
        raise WeightsError(
            f"{path} is an index of pickles, which can run any code when they are read, and are not opened. "
            "Fetch the safetensors files of the same weights."
        )
    if not is_index(path):
        with open(path, "rb") as file:
            begins = file.read(9)
        if begins[8:] != b"{":
            raise WeightsError(what_else(path))
        if _SHARD.search(path.name):
            raise WeightsError(f"{path} is one of several files of a model: name their folder or index.")
    return Place("safetensors", path)


def _variant(file: Path) -> bool:
    """Whether a file is of a variant: model.fp16.safetensors, model.safetensors.index.fp16.json."""
    return file.name.count(".") > (3 if file.suffix == ".json" else 1)


def _not_there(path: Path) -> str:
    if path.is_symlink():
        return f"{path.absolute()} is a link to {path.readlink()}, which is not there."
    return f"There is no file or folder {path.absolute()}."
