"""Text from other programs, and what keeps it from being used. No torch.

Captions, prompts and settings pass through here: what is wrong with them is told in the same words.
"""

from __future__ import annotations

import codecs
import re
from typing import Any

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # two that belong together are one character in Python
_KINDS = (
    (str, "text"),
    (bool, "true or false"),
    (int | float, "a number"),
    (list, "a list"),
    (dict, "an object"),
)


class TextError(ValueError):
    """Why something is no text that can be used: a predicate, such as "is a list, not text"."""


def decode(data: bytes) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises TextError if it is none."""
    if data.startswith(_UTF16):
        raise TextError("is UTF-16 text; save it as UTF-8")
    try:
        return usable(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TextError(f"is not UTF-8 text: {error}") from error


def usable(value: Any) -> str:
    """`value` as it is. Raises TextError where it is no text, or text that no tokenizer takes."""
    if not isinstance(value, str):
        raise TextError(f"is {kind(value)}, not text")
    if "\0" in value:
        raise TextError("holds a NUL character, as UTF-16 does; save it as UTF-8")
    if found := _LONE_SURROGATE.search(value):
        raise TextError(f"is not UTF-8 text: {found[0]!a} is half of a surrogate pair")
    return value


def trimmed(text: str) -> str:
    """Without blanks at both ends, nor a byte order mark that joining files has left there."""
    return text.strip().strip("\ufeff").strip()


def kind(value: Any) -> str:
    """What a value of JSON is, in words."""
    return next((words for types, words in _KINDS if isinstance(value, types)), "null")
