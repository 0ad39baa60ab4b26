"""The command line: `--section.key value` flags as assignments. The schema tells which words are values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_origin

from flux_trainer.config.fields import Path, field_at, parse_text
from flux_trainer.config.problems import COMMAND_LINE
from flux_trainer.config.renamed import Assignment, old_name
from flux_trainer.runtime.paths import expand_home

_CONFIG_FILE = ("job", "config_file")


@dataclass
class CommandLine:
    """What the words of a command line ask for, in their order."""

    files: list[str] = field(default_factory=list)
    assignments: list[Assignment] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    help: str | None = None
    """The section whose help is wanted; empty: all of them; None: no help."""


def parse(argv: Sequence[str]) -> CommandLine:
    """Read `--a.b v`, `--a.b=v`, `--a.b`, `--a.no-b`; in names a dash is an underscore; lists may repeat."""
    line = CommandLine()
    values: dict[Path, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if any("\ud800" <= letter <= "\udfff" for letter in word):  # how Python keeps bytes that are no text
            line.problems.append(f"{COMMAND_LINE}: {word!a}: not UTF-8 text")
            continue
        if word in ("-h", "--help"):
            line.help = words[0] if words and not words[0].startswith("-") else ""
            break
        if not word.startswith("--") or word == "--":
            line.problems.append(
                f"{COMMAND_LINE}: {word}: not a flag; settings are written --section.key value"
            )
            continue
        name, has_value, text = word[2:].partition("=")
        path = tuple(name.replace("-", "_").split("."))
        if not has_value and words and not words[0].startswith("--") and _takes(path, words[0]):
            has_value, text = "=", words.pop(0)
        if path == _CONFIG_FILE:
            if not text:
                line.problems.append(f"{COMMAND_LINE}: job.config_file: the name of a TOML file is missing")
            for file in filter(None, map(str.strip, text.split(","))):
                try:
                    line.files.append(expand_home(file))
                except ValueError as error:
                    line.problems.append(f"{COMMAND_LINE}: job.config_file: {error}")
            continue
        positive = _without_no(path)
        if positive is None:
            value, problem = _value(path, text if has_value else None)
        else:
            value, path = False, positive
            problem = f"--{name} takes no value" if has_value else ""
        if problem:
            line.problems.append(f"{COMMAND_LINE}: {'.'.join(path)}: {problem}")
        elif isinstance(value, list) and isinstance(values.get(path), list):
            values[path] += value
        else:
            values.pop(path, None)  # the last one counts, in its own place
            values[path] = value
    line.assignments = [Assignment(COMMAND_LINE, path, value) for path, value in values.items()]
    return line


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of settings, and those that are none: neither a flag nor its value, or behind `--`."""
    settings: list[str] = []
    others: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            return settings, others + words
        if not word.startswith("--"):
            others.append(word)
            continue
        settings.append(word)
        name, has_value, _ = word[2:].partition("=")
        path = tuple(name.replace("-", "_").split("."))
        if not has_value and words and not words[0].startswith("--") and _takes(path, words[0]):
            settings.append(words.pop(0))
    return settings, others


def _annotation(path: Path) -> Any:
    """The type of the field at `path`; `Any` for keys that are unknown or were torchtitan's."""
    known = field_at(path)
    return known.annotation if known else Any


def _takes(path: Path, word: str) -> bool:
    """Whether a flag's next word is its value: a boolean takes only true and false, so it can stand alone."""
    if _without_no(path) is not None:
        return False
    return _annotation(path) is not bool or word.lower() in ("true", "false")


def _without_no(path: Path) -> Path | None:
    """`a.b` for `a.no_b` where b is a boolean (or an old key); None for other paths."""
    if not path[-1].startswith("no_") or field_at(path) or old_name(path) == ".".join(path):
        return None
    positive = (*path[:-1], path[-1].removeprefix("no_"))
    return positive if _annotation(positive) is bool or old_name(positive) == ".".join(positive) else None


def _value(path: Path, text: str | None) -> tuple[Any, str]:
    """A flag's value and what is wrong with it."""
    annotation = _annotation(path)
    if text is None:
        return True, "" if annotation in (bool, Any) else "a value is missing"
    if annotation is Any:
        annotation = list[str] if text.startswith("[") else bool | int | float | str
    elif get_origin(annotation) is list and isinstance(value := parse_text(text, annotation), str):
        return value, f"{text}: not a TOML array"
    return parse_text(text, annotation), ""
