"""Files of weights that settings name, looked at before torch is imported: tables of contents only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from flux_trainer.config.problems import ConfigError
from flux_trainer.config.schema import JobConfig
from flux_trainer.hub.detect import CONFIG, Component, locate
from flux_trainer.hub.errors import WeightsError
from flux_trainer.hub.plain import Part, encoder_contents, plain_contents
from flux_trainer.models.registry import FLAVORS


def check_weights(config: JobConfig, *, training: bool) -> None:
    """Refuse encoders and an autoencoder that are cut off, quantised, or something else.

    What is to come from the hub, or has no config.json, is checked when it is there.

    Args:
        training: look at the weights that training starts from, too.

    Raises:
        ConfigError: with one line for each setting.
    """
    problems = []
    for key, value, look in _named(config, training):
        try:
            look()
        except (WeightsError, OSError) as error:
            problems.append(f'{key} = "{value}": {error}')
    if problems:
        raise ConfigError(problems)


def _named(config: JobConfig, training: bool) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Key, value, and what looks at the files there."""
    parts: tuple[Part, ...] = ("t5", "clip") if FLAVORS[config.model.flavor].family == "flux1" else ("llm",)
    for part in () if config.encoder.random_init else parts:
        key = f"{part}_encoder"
        value = getattr(config.encoder, key)
        if value and ((folder := Path(value)) / CONFIG).is_file():
            yield f"encoder.{key}", value, partial(encoder_contents, folder, part)
    value = config.encoder.autoencoder_path
    if value and Path(value).exists():
        yield "encoder.autoencoder_path", value, partial(_open, value, "vae")
    section, run = config.checkpoint, Path(config.job.dump_folder)
    resumes = section.enable and any((run / section.folder).glob("step-*"))
    value = section.initial_load_path if training and not resumes else ""
    if value and Path(value).exists():
        yield "checkpoint.initial_load_path", value, partial(_open, value, "transformer")


def _open(path: str, component: Component) -> None:
    place = locate(path, component)
    if place.kind == "safetensors":
        plain_contents(place, component)
