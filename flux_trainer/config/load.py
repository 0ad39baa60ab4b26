"""Settings of a run: defaults < TOML files in the order given < flags of the command line.

Every mistake is collected before anything is refused, so that a run's settings are mended in one go.
Nothing here imports torch: a wrong key is answered in a fraction of a second.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from flux_trainer.config import flags, toml
from flux_trainer.config.fields import field_at
from flux_trainer.config.problems import ConfigError, explain, unknown_key
from flux_trainer.config.renamed import Assignment, old_name, translate
from flux_trainer.config.schema import JobConfig

__all__ = ["ConfigError", "Loaded", "load", "load_config"]


class Loaded(NamedTuple):
    """A validated configuration, what should be said about it, and where each key was written."""

    config: JobConfig
    notices: list[str]
    """Lines about keys that were translated or ignored; for the run's log."""
    origins: dict[str, str]
    """Dotted key -> file or "command line", for keys that differ from the defaults' origin."""


def load_config(argv: Sequence[str]) -> JobConfig:
    """The settings that the words of a command line ask for; see `load`."""
    return load(argv).config


def load(argv: Sequence[str], base: Sequence[Assignment] = ()) -> Loaded:
    """Read the files and flags in `argv` (no program name); `--help [section]` prints and exits with 0.

    Args:
        base: settings that come before those files and flags: a later one counts.

    Raises:
        ConfigError: with one line for each mistake, naming file, key, what is wrong and what would be right.
    """
    line = flags.parse(argv)
    if line.help is not None:
        from flux_trainer.config.help import help_text

        print(help_text(line.help), end="")
        raise SystemExit(0)
    problems = list(line.problems)
    assignments: list[Assignment] = list(base)
    unread = False
    for file in line.files:
        try:
            assignments += [Assignment(file, path, value) for path, value in _flatten(toml.read(file))]
        except (OSError, ValueError) as error:
            problems.append(str(error) if isinstance(error, ValueError) else _unreadable(file, error))
            unread = True
    assignments, notices, refused = translate([*assignments, *line.assignments])
    problems += refused
    raw: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for assignment in assignments:
        if unread and len(assignment.path) > 2:
            continue  # the list it belongs to may be in that file
        if problem := _assign(raw, assignment):
            problems.append(problem)
        else:
            origins[".".join(assignment.path)] = assignment.origin
    try:
        config = JobConfig.model_validate(raw)
    except ValidationError as error:
        problems += explain(error, origins)
    if problems:
        raise ConfigError(problems)
    return Loaded(config, notices, origins)


def _flatten(tables: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The keys of a TOML file as paths; a section that does not exist stays in one piece."""
    for section, keys in tables.items():
        known = section in JobConfig.model_fields or (
            isinstance(keys, dict) and any(old_name((section, k)) for k in keys)
        )
        if not isinstance(keys, dict) or not known:
            yield (section,), keys
            continue
        for key, value in keys.items():
            if isinstance(value, dict) and field_at((section, key)) is None:
                yield from (((section, key, inner), item) for inner, item in value.items())
            else:
                yield (section, key), value


def _assign(raw: dict[str, Any], assignment: Assignment) -> str:
    """Put a value at its path; the problem with it, if there is one."""
    origin, path, value = assignment
    field = field_at(path)
    if field is None:
        return unknown_key(origin, path)
    key = ".".join(path)
    if len(path) == 1:
        return f"{origin}: {key} = {toml.value(value)}: wrong type; {key} is a section: write {key}.KEY"
    section = raw.setdefault(path[0], {})
    if len(path) == 2:
        section[path[1]] = value
        return ""
    # data.sources.1.path: an entry of a list of tables
    name, index = ".".join(path[:2]), int(path[2])
    entries = section.setdefault(path[1], [])
    if not isinstance(entries, list) or index > len(entries):
        return (
            f"{origin}: {key}: no such entry of [[{name}]]; they count from 0, and the next is {len(entries)}"
        )
    if index == len(entries):
        entries.append({})
    if len(path) == 3 or not isinstance(entries[index], dict):
        return f"{origin}: {key}: an entry of [[{name}]] is a table: write {name}.{index}.KEY"
    entries[index][path[3]] = value
    return ""


def _unreadable(file: str, error: OSError) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"{file}: cannot be read: {error.strerror}"
    folders = {Path(file).parent, Path(), Path("train_configs")}
    there = sorted(
        {str(path) for folder in folders for path in folder.glob("*.toml") if path.stem != "pyproject"}
    )
    names = {Path(path).name: path for path in there}
    similar = [names[name] for name in difflib.get_close_matches(Path(file).name, names, n=3)]
    listed = (
        f"; similar: {', '.join(similar)}" if similar else f"; there are {', '.join(there)}" if there else ""
    )
    return f"{file}: no such file (looked in {Path.cwd()}){listed}"
