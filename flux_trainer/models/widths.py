"""Whether text encoders fit a transformer, by their config.json: seen before torch is imported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flux_trainer.config.problems import ConfigError
from flux_trainer.config.schema import JobConfig
from flux_trainer.models.registry import FLAVORS

STATES = 3
"""Hidden states of a language model that FLUX.2 takes side by side."""

_PUBLISHED = {
    "t5_encoder": {4096: "T5 XXL", 2048: "T5 XL"},
    "clip_encoder": {768: "CLIP ViT-L/14", 1280: "CLIP ViT-bigG/14"},
    "llm_encoder": {
        STATES * 2560: "Qwen3-4B",
        STATES * 4096: "Qwen3-8B",
        STATES * 5120: "Mistral-Small-3.2",
    },
}
"""Key of [encoder] -> features -> the published model that gives so many."""


def check_widths(config: JobConfig) -> None:
    """Refuse text encoders whose features the transformer cannot take.

    Folders only; what is to come from the hub, or has no config.json, is checked when it is there.

    Raises:
        ConfigError: with one line for each encoder.
    """
    problems = [misfit(config, *each) for each in _widths(config) if each[1] not in (None, each[2])]
    if problems:
        raise ConfigError(problems)


def misfit(config: JobConfig, key: str, got: int | None, want: int) -> str:
    """What to say of an encoder, named by its key, that gives `got` features where `want` are taken."""
    published = _PUBLISHED[key]
    gives = f"{got} features, as {published[got]} does," if got in published else f"{got} features,"
    takes = f"{want}, {published[want]}'s" if want in published else f"{want}"
    return (
        f"encoder.{key} = {getattr(config.encoder, key)!r} gives {gives} but {config.model.flavor} "
        f"takes {takes}: choose the encoder that belongs to the flavor"
    )


def _widths(config: JobConfig) -> Iterator[tuple[str, int | None, int]]:
    """Key, features that it gives (None: not known), features that are wanted."""
    model = FLAVORS[config.model.flavor]
    if model.family == "flux1":
        yield "t5_encoder", _field(config.encoder.t5_encoder, "d_model"), model.context_in_dim
        yield "clip_encoder", _field(config.encoder.clip_encoder, "hidden_size"), model.vec_in_dim
    else:
        width = _field(config.encoder.llm_encoder, "hidden_size")
        yield "llm_encoder", width and STATES * width, model.context_in_dim


def _field(folder: str, name: str) -> int | None:
    """A number in the folder's config.json, or there in `text_config`, as whole CLIPs and Mistral have it."""
    path = Path(folder).expanduser() / "config.json"
    if not folder or not path.is_file():
        return None
    try:
        values: Any = json.loads(path.read_bytes())
    except ValueError:  # whoever builds the encoder has a sentence for it
        return None
    if isinstance(values, dict) and isinstance(values.get("text_config"), dict):
        values = {**values, **values["text_config"]}
    number = values.get(name) if isinstance(values, dict) else None
    return number if isinstance(number, int) else None
