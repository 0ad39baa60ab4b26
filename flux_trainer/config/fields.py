"""The schema as a tree of dotted keys: find a field, say what it accepts, read its text, guess a name.

Command line, help page and error messages are built on this, so that none of them repeats the schema.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from flux_trainer.config import toml
from flux_trainer.config.schema import JobConfig
from flux_trainer.config.section import Section

Path = tuple[str, ...]


def section_in(annotation: Any) -> type[Section] | None:
    """The `Section` that a field holds, itself or as the items of a list."""
    if get_origin(annotation) is list:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def leaves(model: type[Section] = JobConfig, prefix: Path = ()) -> Iterator[tuple[Path, FieldInfo]]:
    """Every key that holds a value, in the schema's order; keys of a list of tables under the index `0`."""
    for name, field in model.model_fields.items():
        path = (*prefix, name)
        inner = section_in(field.annotation)
        if inner is None:
            yield path, field
        else:
            yield from leaves(inner, (*path, "0") if get_origin(field.annotation) is list else path)


def field_at(path: Sequence[str]) -> FieldInfo | None:
    """The field at a path such as (training, steps) or (data, sources, 3, path); None: no such key."""
    model: type[Section] | None = JobConfig
    field: FieldInfo | None = None
    index_next = False
    for name in path:
        if index_next and name.isdigit():
            index_next = False
            continue
        if index_next or model is None or name not in model.model_fields:
            return None
        field = model.model_fields[name]
        model = section_in(field.annotation)
        index_next = model is not None and get_origin(field.annotation) is list
    return field


def nearest(path: Sequence[str]) -> list[str]:
    """Valid names for an unknown path, best first: the same key of another section, then similar ones."""
    sections = list(JobConfig.model_fields)
    if path[0] not in sections and (close := difflib.get_close_matches(path[0], sections, n=1)):
        moved = (close[0], *path[1:])
        return [".".join(moved)] if field_at(moved) else nearest(moved)
    parent = tuple("0" if name.isdigit() else name for name in path[:-1])
    siblings: list[str] = []
    elsewhere: dict[str, list[str]] = {}
    for *table, key in (known for known, _ in leaves()):
        if tuple(table) == parent:
            siblings.append(key)
        elif "0" not in table:
            elsewhere.setdefault(key, []).append(".".join((*table, key)))
    same_key = elsewhere.get(path[-1], [])
    similar = [".".join((*path[:-1], key)) for key in difflib.get_close_matches(path[-1], siblings, n=2)]
    if not same_key and not similar:
        similar = [
            name for key in difflib.get_close_matches(path[-1], elsewhere, n=1) for name in elsewhere[key]
        ]
    return (same_key + similar)[:3]


def describe(annotation: Any, constraints: Sequence[Any] = ()) -> str:
    """What a field accepts, in words: "an integer >= 1", 'one of "a", "b"', "a list of strings or none"."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [c for info in args[1:] for c in (info.metadata if isinstance(info, FieldInfo) else [info])]
        return describe(args[0], [*constraints, *inner])
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg, constraints) for arg in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(toml.value(arg) for arg in args)
    if origin is list:
        if section_in(annotation):
            return "a list of tables"
        items = describe(args[0])
        return f"a list of {'strings' if items == 'a string' else items.removeprefix('one of ')}"
    if section_in(annotation):
        return "a table"
    word = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "none"}[
        annotation
    ]
    return word + _bounds(constraints)


def _bounds(constraints: Sequence[Any]) -> str:
    bounds = {
        sign: getattr(c, name) for c in constraints for name, sign in _SIGNS.items() if hasattr(c, name)
    }
    if bounds.keys() == {">=", "<="}:
        return f" from {bounds['>=']} to {bounds['<=']}"
    return "".join(f" {sign} {bound}" for sign, bound in bounds.items())


_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def choices(annotation: Any) -> list[str]:
    """The words that a field accepts, its items included when it is a list."""
    if get_origin(annotation) is Literal:
        return [str(arg) for arg in get_args(annotation)]
    return [word for arg in get_args(annotation) for word in choices(arg)]


def parse_text(text: str, annotation: Any) -> Any:
    """Text from the command line as a field's value; text that does not fit is returned, and refused later.

    Lists take `a,b` or, when an item holds a comma, a TOML array: `["a cat, asleep", "a dog"]`.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is list:
        if text.lstrip().startswith("["):
            return toml.parse_value(text)
        return [parse_text(item.strip(), args[0]) for item in text.split(",")] if text else []
    if origin is Annotated:
        return parse_text(text, args[0])
    if origin in (Union, types.UnionType):
        return next((value for arg in args if (value := parse_text(text, arg)) is not text), text)
    if annotation is type(None):
        return None if text.lower() == "none" else text
    if annotation is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            return text
    return text
