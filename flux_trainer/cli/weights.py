"""What WEIGHTS on a command line stands for, and the settings that lie beside them. No torch.

A run's folder says everything itself (config.toml), also for what lies in it; files of Black Forest Labs and
diffusers' folders are accompanied by text encoders and autoencoder under known names. The same paths are
found as by `hub.detect.locate`, which needs torch, or fewer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux_trainer.cli.contents import INDEX, read_fields
from flux_trainer.config.load import load_config
from flux_trainer.config.pictures import reference_side
from flux_trainer.config.problems import ConfigError
from flux_trainer.config.renamed import Assignment
from flux_trainer.config.schema import JobConfig
from flux_trainer.models.recognise import describe, flavors
from flux_trainer.models.registry import FLAVORS
from flux_trainer.parallel.arithmetic import has_references

RUN_SECTIONS = ("model", "encoder", "flow", "training", "inference", "debug")
"""Those of a run's settings that its pictures depend on; the mesh, for one, is another."""

Scales = tuple[int, float | None, float]
"""Steps, distilled guidance and classifier-free guidance."""
DISTILLED: dict[str, Scales] = {
    "flux-dev": (50, 3.5, 1.0),
    "flux-schnell": (4, None, 1.0),
    "flux2-dev": (50, 4.0, 1.0),
    "flux2-klein-4b": (4, None, 1.0),
    "flux2-klein-9b": (4, None, 1.0),
}
"""What a flavor was distilled for."""
KLEIN_BASE: Scales = (50, None, 4.0)
"""klein before its distillation: weights of the same shapes, which do not say which of the two they are."""
UNDISTILLED: Scales = (50, None, 5.0)

_LENGTHS = {"flux-dev": 512, "flux-schnell": 256}
_PARTS = {
    "flux1": {
        "t5_encoder": "text_encoder_2",
        "clip_encoder": "text_encoder",
        "t5_tokenizer": "tokenizer_2",
        "clip_tokenizer": "tokenizer",
    },
    "flux2": {"llm_encoder": "text_encoder", "llm_tokenizer": "tokenizer"},
}
"""Family -> key of [encoder] -> published name of the folder."""


@dataclass(frozen=True)
class Weights:
    """A transformer's weights on disk."""

    path: Path
    """A step's folder, a file, an index of files or a diffusers folder."""
    settings: list[Assignment]
    """What lies beside them says; files and flags of the command line come after."""
    flavors: list[str] = field(default_factory=list)
    """Those that they can be of; none: they do not say it."""


def find_weights(name: str) -> Weights:
    """What `name` stands for: a run's folder (its newest step), a step's folder, a safetensors file or the
    index of several, a diffusers folder.

    Raises:
        ConfigError: nothing of the kind is there, or it is of no flavor.
    """
    path = Path(name).expanduser()
    if (path / "config.toml").is_file():
        config = _load(path)
        return Weights(_newest_of_run(path, config), list(_run(path, config)))
    place = _locate(name, path)
    fields = read_fields(place)
    if fields == {}:
        raise ConfigError([f"{name}: these are not the weights of a FLUX transformer"])
    possible = flavors(fields) if fields else []
    kept = place if place.is_dir() else path  # a pipeline goes by its own name, a step by its number
    for folder in list(place.absolute().parents)[:4]:
        # An export, or a step; files that lie in a run's folder by chance are of another flavor.
        if (folder / "config.toml").is_file():
            config = _load(folder)
            if config.model.flavor in possible or (place.is_dir() and not possible):
                return Weights(kept, list(_run(folder, config)))
    if fields and not possible:
        known = ", ".join(FLAVORS)
        raise ConfigError([f"{name}: this is {describe(fields)}, which is no flavor; there are {known}"])
    return Weights(kept, list(_published(name, place, possible[0])) if possible else [], possible)


def scales(flavor: str) -> Scales:
    """Steps, distilled guidance and classifier-free guidance that suit a flavor."""
    return DISTILLED.get(flavor, UNDISTILLED)


def _locate(name: str, path: Path) -> Path:
    """The file, index, checkpoint or step that `path` means."""
    if path.is_file():
        if path.name == ".metadata" or path.suffix == ".distcp":
            return path.parent
        if path.suffix != ".safetensors" and not path.name.endswith(INDEX):
            raise ConfigError([f"{name}: weights are read from .safetensors files; a pickle could run code"])
        return path
    if not path.is_dir():
        raise ConfigError([f"{name}: there is no such file or folder (looked in {Path.cwd()})"])
    if _is_checkpoint(path):
        return path
    if (path / "model_index.json").is_file():
        if not (path / "transformer").is_dir():
            raise ConfigError([f"{name}: this folder of a diffusers pipeline has no transformer"])
        return _locate(name, path / "transformer")
    if step := _newest_step(name, path):
        return step
    for pattern in (f"*{INDEX}", "*.safetensors"):
        found = sorted(path.glob(pattern))
        plain = [file for file in found if file.name.count(".") == pattern.count(".")]  # no variant (.fp16.)
        if len(found) == 1 or len(plain) == 1:
            return (plain or found)[0]
        if found:
            raise ConfigError([f"{name} has {', '.join(file.name for file in found)}: name one of them"])
    raise ConfigError(
        [
            f"{name}: this folder is neither a run (config.toml), nor a checkpoint (step-N), nor diffusers' "
            "(model_index.json, or safetensors files)"
        ]
    )


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() or (folder / ".metadata").is_file()


def _newest_step(name: str, path: Path) -> Path | None:
    """The newest checkpoint in a folder of checkpoints, or one level below."""
    for pattern in ("step-*", "*/step-*"):
        steps = [s for s in path.glob(pattern) if re.fullmatch(r"step-\d+", s.name) and _is_checkpoint(s)]
        if len(parents := sorted({step.parent.name for step in steps})) > 1:
            raise ConfigError([f"{name} has several folders of checkpoints, {', '.join(parents)}: name one"])
        if steps:
            return max(steps, key=_number)
    return None


def _number(step: Path) -> int:
    return int(step.name.removeprefix("step-"))


def _load(run: Path) -> JobConfig:
    return load_config(["--job.config_file", str(run / "config.toml")])


def _newest_of_run(run: Path, config: JobConfig) -> Path:
    folder = run / config.checkpoint.folder
    steps = [path.parent for path in folder.glob("step-*/manifest.json")]
    steps = [step for step in steps if re.fullmatch(r"step-\d+", step.name)]
    if not steps:
        raise ConfigError([f"{run}: this run has no checkpoint in {folder}; was checkpoint.enable set?"])
    return max(steps, key=_number)


def _run(folder: Path, run: JobConfig) -> Iterator[Assignment]:
    """The settings of a run; where it draws while it validates, its pictures' settings too."""
    origin = str(folder / "config.toml")
    yield Assignment(origin, ("job", "dump_folder"), str(folder))
    if run.validation.enable:
        guided = run.validation.enable_classifier_free_guidance
        scale = run.validation.classifier_free_guidance_scale if guided else 1.0
        yield Assignment(origin, ("inference", "denoising_steps"), run.validation.denoising_steps)
        yield Assignment(origin, ("inference", "cfg_scale"), scale)
        yield Assignment(origin, ("inference", "guidance"), run.flow.guidance)
    if has_references(run):
        size = reference_side(run.data, run.training.img_size)
        yield Assignment(origin, ("inference", "reference_size"), size)
    for section in RUN_SECTIONS:
        for key, value in getattr(run, section):
            if value is not None:
                yield Assignment(origin, (section, key), value)


def _published(name: str, place: Path, flavor: str) -> Iterator[Assignment]:
    """Settings for published weights, with the encoders and the autoencoder that lie beside them."""
    folder = place if place.is_dir() else place.parent
    if place.is_file() and (folder.name == "transformer" or (folder / "config.json").is_file()):
        folder = folder.parent  # of the pipeline that the transformer's folder is a part of
    settings: dict[tuple[str, str], Any] = {("model", "flavor"): flavor}
    if length := _LENGTHS.get(flavor):
        settings["encoder", "max_t5_encoding_len"] = length
    parts: Mapping[str, str] = _PARTS[FLAVORS[flavor].family]
    found = {key: folder / part for key, part in parts.items() if (folder / part).exists()}
    for part in ("ae.safetensors", "vae"):
        if "autoencoder_path" not in found and (folder / part).exists():
            found["autoencoder_path"] = folder / part
    settings |= {("encoder", key): str(path) for key, path in found.items()}
    for key, value in settings.items():
        yield Assignment(name, key, value)
