"""What weights say of their model in headers and JSON: fields of its config, before torch is imported."""

from __future__ import annotations

import json
from typing import Any

from flux_trainer.checkpoint.commit import STATE
from flux_trainer.hub.contents import NOTE, Contents
from flux_trainer.hub.detect import Place, config_beside, read_json
from flux_trainer.hub.errors import WeightsError
from flux_trainer.hub.plain import plain_contents
from flux_trainer.models.recognise import of_config, of_shapes


def read_fields(place: Place) -> dict[str, Any] | None:
    """Fields of the model's config, as far as the file, the files of an index or the checkpoint say them.

    Returns:
        {} for weights of something else, None for a checkpoint that does not say what it holds.

    Raises:
        WeightsError: a file is damaged or missing, or holds no plain weights.
    """
    if place.kind != "safetensors":
        state = place.path / STATE
        note = read_json(state).get("model") if state.is_file() else None
        return of_config(note) if isinstance(note, dict) else None
    contents = plain_contents(place, "transformer")
    shown = of_shapes({name: record.shape for name, record in contents.tensors.items()})
    return shown and {**shown, **_stated(place, contents)}


def _stated(place: Place, contents: Contents) -> dict[str, Any]:
    """What the writer left in the header, else in a config beside it that is a transformer's."""
    if NOTE in contents.metadata:
        try:
            note = json.loads(contents.metadata[NOTE])
        except ValueError as error:
            raise WeightsError(f"{place.path}: the note in its header is damaged: {error}.") from error
        return of_config(note) if isinstance(note, dict) else {}
    beside = config_beside(place)
    return of_config(beside[1]) if beside else {}
