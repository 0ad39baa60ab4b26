"""The error of this layer, and how long lists of names are said in short without leaving any out."""

from __future__ import annotations

from collections.abc import Iterable

from flux_trainer.checkpoint.errors import CheckpointError


class WeightsError(CheckpointError, ValueError):
    """Weights cannot be used or written; the message says why, where, and what to do."""


def grouped(names: Iterable[str]) -> list[str]:
    """All the names; those that differ in their first number alone are one: `blocks.0-3,7.norm.weight`."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is None:
            groups[(name, "")] = []
        else:
            key = (".".join([*parts[:at], ""]), ".".join(["", *parts[at + 1 :]]))
            groups.setdefault(key, []).append(int(parts[at]))
    return [before + _ranges(sorted(numbers)) + after for (before, after), numbers in groups.items()]


def _ranges(numbers: list[int]) -> str:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
