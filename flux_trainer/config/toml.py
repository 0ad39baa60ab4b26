"""TOML in and out: files read with errors that name file and line, values and whole configs written.

Writing needs only scalars, arrays and tables of tables, so these few lines stand in for one more dependency.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
from typing import Any

from flux_trainer.config.schema import JobConfig
from flux_trainer.config.section import Section

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read(path: str) -> dict[str, Any]:
    """The tables of a TOML file in UTF-8, with or without a byte order mark.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not TOML; the message starts with `path:line:`.
    """
    with open(path, "rb") as file:
        content = file.read()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:4]:
        raise ValueError(f"{path}:1: not TOML: this is UTF-16 or UTF-32 text; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not TOML: this is not UTF-8 text") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        what, _, where = str(error).partition(" (at ")
        found = re.match(r"line (\d+)", where)
        line = int(found[1]) if found else text.count("\n") + 1
        raise ValueError(f"{path}:{line}: not TOML: {what}") from error


def parse_value(text: str) -> Any:
    """A value as TOML writes it; text that is none is returned unchanged."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def value(item: Any) -> str:
    """A scalar or an array as TOML text."""
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, str):
        return json.dumps(item, ensure_ascii=False).replace(
            "\x7f", "\\u007f"
        )  # JSON's escapes are TOML's too
    if isinstance(item, list):
        return "[" + ", ".join(value(entry) for entry in item) + "]"
    return repr(item)


def to_toml(config: JobConfig) -> str:
    """All settings as a TOML file that `load_config` reads back; unset optional keys are left out."""
    return "\n".join(_table(name, section) for name, section in config)


def _table(name: str, section: Section, brackets: str = "[{}]") -> str:
    tables = {
        key: item for key, item in section if isinstance(item, list) and item and isinstance(item[0], Section)
    }
    lines = [brackets.format(name)]
    lines += [f"{key} = {value(item)}" for key, item in section if item is not None and key not in tables]
    text = "\n".join(lines) + "\n"
    for key, items in tables.items():
        text += "".join("\n" + _table(f"{name}.{key}", item, "[[{}]]") for item in items)
    return text
