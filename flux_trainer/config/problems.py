"""Mistakes in the settings as lines: where it was written, which key, what is wrong, what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from flux_trainer.config import toml
from flux_trainer.config.fields import Path, choices, describe, field_at, nearest
from flux_trainer.config.schema import JobConfig

COMMAND_LINE = "command line"
DEFAULTS = "defaults"

_RANGE = {"greater_than_equal", "greater_than", "less_than_equal", "less_than", "finite_number"}


class ConfigError(ValueError):
    """Mistakes in the settings; `problems` holds one line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def origin_of(key: str, origins: Mapping[str, str]) -> str:
    """Where `key` was written: a file, the command line or nowhere (defaults); tables count for keys."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        if (table := ".".join(parts[:end])) in origins:
            return origins[table]
    inside = (origin for name, origin in origins.items() if name.startswith(key + "."))
    return next(inside, DEFAULTS)


def unknown_key(origin: str, path: Sequence[str]) -> str:
    """The line for a key or a section that does not exist."""
    guesses = nearest(path)
    kind = "key" if len(path) > 1 or any("." in guess for guess in guesses) else "section"
    if guesses:
        return f"{origin}: {'.'.join(path)}: unknown {kind}; did you mean {' or '.join(guesses)}?"
    sections = ", ".join(JobConfig.model_fields)
    known = f"--help {path[0]} lists its section" if field_at(path[:1]) else f"the sections are {sections}"
    return f"{origin}: {'.'.join(path)}: unknown {kind}; {known}"


def explain(error: ValidationError, origins: Mapping[str, str]) -> list[str]:
    """One line for each value that does not fit the schema."""
    found: dict[Path, list[Any]] = {}
    for detail in error.errors(include_url=False):
        path = (
            _known_part(detail["loc"])
            if detail["type"] not in ("extra_forbidden", "missing")
            else detail["loc"]
        )
        found.setdefault(tuple(map(str, path)), []).append(detail)
    return [_line(path, details, origin_of(".".join(path), origins)) for path, details in found.items()]


def _known_part(loc: Sequence[int | str]) -> list[int | str]:
    """pydantic appends a union's members to the location: keep the names and indices that the user wrote."""
    known: list[int | str] = []
    for name in loc:
        if isinstance(name, str) and field_at([*map(str, known), name]) is None:
            break
        known.append(name)
    return known


def _line(path: Path, details: Sequence[Any], origin: str) -> str:
    kinds = {detail["type"] for detail in details}
    if "extra_forbidden" in kinds:
        return unknown_key(origin, path)
    key = ".".join(path)
    annotation, constraints = _accepts(path)
    expected = describe(annotation, constraints)
    if "missing" in kinds:
        return f"{origin}: {key}: missing; expected {expected}"
    given = details[0]["input"]
    words = choices(annotation)
    if kinds & _RANGE:
        what = "out of range"
    elif isinstance(given, str) and words:
        what = "not a valid choice"
        if close := difflib.get_close_matches(given, words, n=1):
            expected += f"; did you mean {toml.value(close[0])}?"
    else:
        what = "wrong type"
    text = toml.value(given)
    text = text if len(text) <= 60 else text[:57] + "..."
    if "value_error" in kinds:  # of a validator of our own, which says everything
        return f"{origin}: {key} = {text}: {details[0]['ctx']['error']}"
    return f"{origin}: {key} = {text}: {what}; expected {expected}"


def _accepts(path: Path) -> tuple[Any, Sequence[Any]]:
    """Annotation and constraints of the field at `path`, or of the items of the list that it indexes."""
    field = field_at(path)
    if field is not None and not path[-1].isdigit():
        return field.annotation, field.metadata
    field = field_at(path[:-1])
    assert field is not None, path
    return field.annotation.__args__[0], ()  # type: ignore[union-attr]
