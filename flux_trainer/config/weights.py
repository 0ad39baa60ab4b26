"""What WEIGHTS on a command line stands for, and the settings that lie beside them. No torch.

A run's folder says everything itself (config.toml); files of Black Forest Labs' and diffusers' folders are
accompanied by text encoders and autoencoder under known names.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux_trainer.config.load import load_config
from flux_trainer.config.problems import ConfigError
from flux_trainer.config.renamed import Assignment

RUN_SECTIONS = ("model", "encoder", "flow", "training", "inference", "debug")
"""Those of a run's settings that its pictures depend on; the mesh, for one, is another."""

DISTILLED: dict[str, tuple[int, float | None, float]] = {
    "flux-dev": (50, 3.5, 1.0),
    "flux-schnell": (4, None, 1.0),
}
"""Flavor -> steps, distilled guidance and classifier-free guidance that it was distilled for."""
UNDISTILLED: tuple[int, float | None, float] = (50, None, 5.0)


@dataclass(frozen=True)
class Weights:
    """A transformer's weights on disk."""

    path: Path
    """A step's folder, a file or a diffusers folder."""
    settings: list[Assignment]
    """What lies beside them says; files and flags of the command line come after."""
    belong_to_run: bool


def find_weights(name: str) -> Weights:
    """What `name` stands for: a run's folder (its newest step), a step's folder, a safetensors file with
    Black Forest Labs' names, or a diffusers folder.

    Raises:
        ConfigError: nothing of the kind is there.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ConfigError([f"{name}: weights are read from .safetensors files; a pickle could run code"])
        return Weights(path, list(_published(name, path.parent, _header(path))), False)
    if not path.is_dir():
        raise ConfigError([f"{name}: there is no such file or folder (looked in {Path.cwd()})"])
    if (path / "config.toml").is_file():
        return Weights(_newest_step(path), list(_run(path)), True)
    if (path / "manifest.json").is_file() or (path / ".metadata").is_file():
        run = next((up for up in list(path.absolute().parents)[:3] if (up / "config.toml").is_file()), None)
        return Weights(path, list(_run(run)) if run else [], run is not None)
    if (path / "model_index.json").is_file():
        return Weights(path, list(_published(name, path, _json(path / "transformer" / "config.json"))), False)
    if (path / "config.json").is_file():
        return Weights(path, list(_published(name, path.parent, _json(path / "config.json"))), False)
    raise ConfigError(
        [
            f"{name}: this folder is neither a run (config.toml), nor one of its checkpoints (step-N with "
            "manifest.json), nor diffusers' (model_index.json)"
        ]
    )


def scales(flavor: str) -> tuple[int, float | None, float]:
    """Steps, distilled guidance and classifier-free guidance that suit a flavor."""
    return DISTILLED.get(flavor, UNDISTILLED)


def _newest_step(run: Path) -> Path:
    folder = run / load_config(["--job.config_file", str(run / "config.toml")]).checkpoint.folder
    whole = [path.parent for path in folder.glob("step-*/manifest.json")]
    steps = {int(match[1]): step for step in whole if (match := re.fullmatch(r"step-(\d+)", step.name))}
    if not steps:
        raise ConfigError([f"{run}: this run has no checkpoint in {folder}; was checkpoint.enable set?"])
    return steps[max(steps)]


def _run(folder: Path) -> Iterator[Assignment]:
    """The settings of a run; where it draws while it validates, its pictures' settings too."""
    origin = str(folder / "config.toml")
    run = load_config(["--job.config_file", origin])
    yield Assignment(origin, ("job", "dump_folder"), str(folder))
    if run.validation.enable:
        guided = run.validation.enable_classifier_free_guidance
        scale = run.validation.classifier_free_guidance_scale if guided else 1.0
        yield Assignment(origin, ("inference", "denoising_steps"), run.validation.denoising_steps)
        yield Assignment(origin, ("inference", "cfg_scale"), scale)
        yield Assignment(origin, ("inference", "guidance"), run.flow.guidance)
    for section in RUN_SECTIONS:
        for key, value in getattr(run, section):
            if value is not None:
                yield Assignment(origin, (section, key), value)


def _published(name: str, folder: Path, contents: Mapping[str, Any]) -> Iterator[Assignment]:
    """Settings for FLUX.1's published weights, with the encoders and the autoencoder in `folder`."""
    guided = contents.get("guidance_embeds") or any("guidance_in." in key for key in contents)
    flavor, length = ("flux-dev", 512) if guided else ("flux-schnell", 256)
    yield Assignment(name, ("model", "flavor"), flavor)
    yield Assignment(name, ("encoder", "max_t5_encoding_len"), length)
    for key, part in {
        "t5_encoder": "text_encoder_2",
        "clip_encoder": "text_encoder",
        "t5_tokenizer": "tokenizer_2",
        "clip_tokenizer": "tokenizer",
        "autoencoder_path": "ae.safetensors",
    }.items():
        if (folder / part).exists():
            yield Assignment(name, ("encoder", key), str(folder / part))
    if not (folder / "ae.safetensors").exists() and (folder / "vae").is_dir():
        yield Assignment(name, ("encoder", "autoencoder_path"), str(folder / "vae"))


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read as JSON: {error}"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: not a JSON object"])
    return values


def _header(path: Path) -> dict[str, Any]:
    """A safetensors file's table of contents."""
    with open(path, "rb") as file:
        length = file.read(8)
        size = struct.unpack("<Q", length)[0] if len(length) == 8 else 0
        if not 0 < size <= path.stat().st_size - 8:
            raise ConfigError([f"{path}: not a safetensors file, or cut off"])
        try:
            header = json.loads(file.read(size))
        except ValueError as error:
            raise ConfigError([f"{path}: not a safetensors file: {error}"]) from error
    return dict(header)
