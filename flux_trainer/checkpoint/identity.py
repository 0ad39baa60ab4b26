"""Does a checkpoint belong to this run? What two runs must share is compared setting by setting."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from flux_trainer.config.pictures import reference_side
from flux_trainer.config.schema import JobConfig, Source
from flux_trainer.models.registry import FLAVORS

CONTENTS = "data.contents"
"""Of each source in the order of `data.sources`: {"samples": number, and hashes of parts by their names}."""
_ABSENT = "nothing"
# Settings of [training] that decide what a draw becomes, beside seed and data.
_DRAWN_BY = ("img_size", "classifier_free_guidance_prob", "classifier_free_guidance_joint")


def identity(config: JobConfig, global_batch_size: int) -> dict[str, Any]:
    """The settings that a resumed run must share with the one that wrote the checkpoint."""
    text_length, data = FLAVORS[config.model.flavor].text_length, config.data
    of_references = {
        "data.max_references": data.max_references,
        "data.reference_size": reference_side(data, config.training.img_size),
    }
    return {
        "model": config.model.model_dump(),
        "debug.seed": config.debug.seed,
        "data.sources": [_source(source) for source in data.sources],
        "training.global_batch_size": global_batch_size,
        **{f"data.{key}": getattr(data, key) for key in ("crop", "flip_prob")},
        **{f"training.{key}": getattr(config.training, key) for key in _DRAWN_BY},
        f"encoder.{text_length}": getattr(config.encoder, text_length),
        **(of_references if any(source.refers for source in data.sources) else {}),
    }


def _source(source: Source) -> dict[str, Any]:
    """Its settings. Those of reference images came later: where there are none, checkpoints need not know."""
    return {k: v for k, v in source.model_dump().items() if v or not k.startswith("reference_")}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words: settings in the order of `now`, each with both values, then the data."""
    old, new = json.loads(json.dumps(saved)), json.loads(json.dumps(now))
    data = _data_differences(new.get("data.sources", []), old.pop(CONTENTS, []), new.pop(CONTENTS, []))
    old, new = _flatten(old), _flatten(new)
    names = [*new, *(name for name in old if name not in new)]
    settings = [
        f"{name} {_show(old, name)} in the checkpoint, {_show(new, name)} now"
        for name in names
        if name not in old or name not in new or old[name] != new[name]
    ]
    return settings + data


def _data_differences(sources: list[Any], saved: list[Any], now: list[Any]) -> list[str]:
    """Of each source of data, if its samples have changed, which one it is and what has changed."""
    return [
        f"data.sources[{number}] ({' '.join(filter(None, (source['type'], source['path'])))}): {change}"
        for number, (source, before, after) in enumerate(zip(sources, saved, now, strict=False))
        if (change := _changed(before, after))
    ]


def _changed(saved: dict[str, Any] | str, now: dict[str, Any]) -> str:
    """What a source has now that the checkpoint does not know; empty if there is nothing."""
    if isinstance(saved, str):  # the first checkpoints held one hash, or "3 rows"
        counted = re.fullmatch(r"(\d+) (rows|samples)", saved)
        if not counted:
            return "" if saved in now.values() else "other samples than in the checkpoint"
        saved = {"samples": int(counted[1])}
    if saved["samples"] != now["samples"]:
        return f"number of samples {saved['samples']} in the checkpoint, {now['samples']} now"
    parts = [name for name in now if name in saved and now[name] != saved[name]]
    return f"as many samples as in the checkpoint, but other {' and '.join(parts)}" if parts else ""


def _show(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else _ABSENT


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested dicts and lists by path, such as `data.sources[0].path`; empty ones are leaves."""
    if isinstance(value, dict) and value:
        parts = [(f"{name}.{key}" if name else key, inner) for key, inner in value.items()]
    elif isinstance(value, list) and value:
        parts = [(f"{name}[{index}]", inner) for index, inner in enumerate(value)]
    else:
        return {name: value}
    return {path: leaf for key, inner in parts for path, leaf in _flatten(inner, key).items()}
