"""What WEIGHTS on a command line stands for, and the settings that lie beside them. No torch.

A run's folder says everything itself (config.toml), also for what lies in it; files of Black Forest Labs and
diffusers' folders are accompanied by text encoders and autoencoder under known names. The same paths are
found as everywhere, by `hub.detect.locate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux_trainer.cli.fields import read_fields
from flux_trainer.config.load import load_config
from flux_trainer.config.pictures import reference_side
from flux_trainer.config.problems import ConfigError
from flux_trainer.config.renamed import Assignment
from flux_trainer.config.schema import JobConfig
from flux_trainer.hub.detect import locate, newest_step
from flux_trainer.models.recognise import flavors, unlike
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
        FileNotFoundError: nothing is there.
        WeightsError: it cannot be read: it is damaged, quantised, of another model.
        ConfigError: it is a transformer of no flavor, or no transformer.
    """
    path = Path(name).expanduser()
    if (path / "config.toml").is_file():
        config = _load(path)
        return Weights(_newest_of_run(path, config), list(_run(path, config)))
    found = locate(path)
    place = found.path
    fields = read_fields(found)
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
        raise ConfigError([f"{name}: this is {unlike(fields)}; there are {', '.join(FLAVORS)}"])
    return Weights(kept, list(_published(name, place, possible[0])) if possible else [], possible)


def scales(flavor: str) -> Scales:
    """Steps, distilled guidance and classifier-free guidance that suit a flavor."""
    return DISTILLED.get(flavor, UNDISTILLED)


def _load(run: Path) -> JobConfig:
    return load_config(["--job.config_file", str(run / "config.toml")])


def _newest_of_run(run: Path, config: JobConfig) -> Path:
    folder = run / config.checkpoint.folder
    if (newest := newest_step(folder)) is None:
        raise ConfigError([f"{run}: this run has no checkpoint in {folder}; was checkpoint.enable set?"])
    return newest.path


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
