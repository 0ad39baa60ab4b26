"""Text in the settings that no file, tokenizer or operating system would take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flux_trainer.config import text
from flux_trainer.config.files import Finding
from flux_trainer.config.schema import JobConfig


def unusable_text(config: JobConfig) -> Iterator[Finding]:
    """(key, sentence) for each string that is not UTF-8, as on a command line, or holds a NUL, as in TOML."""
    for key, value in _strings(config.model_dump(), ""):
        try:
            text.usable(value)
        except text.TextError as error:
            yield key, str(error)


def _strings(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, (dict, list)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _strings(item, f"{key}.{name}" if key else str(name))
