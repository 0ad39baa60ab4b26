"""What all ranks of a run must have in common, compared once at the start.

Each machine reads its own copy of the settings. Where one differs, say in the learning rate, nothing fails:
replicas drift apart in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flux_trainer.runtime.dist import World, all_gather


def check_agreement(settings: Mapping[str, Any], world: World) -> None:
    """See that all ranks have the same settings. All ranks call it together.

    Args:
        settings: values that JSON knows; nested mappings are named with dots.

    Raises:
        ValueError: on all ranks; names the settings that differ, and the ranks that have each value.
    """
    mine = dict(_flatten(settings))
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    if len(set(all_gather(digest, world.control))) == 1:
        return
    everyone = all_gather(mine, world.control)
    differing = [
        f"{key} is " + ", ".join(f"{value} on {ranks}" for value, ranks in _values(key, everyone).items())
        for key in sorted(set().union(*everyone))
        if len(_values(key, everyone)) > 1
    ]
    raise ValueError(
        f"The ranks were started with different settings: {'; '.join(differing)}. "
        "Give every machine the same files, flags and packages."
    )


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _values(key: str, everyone: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The values of a setting, each with the ranks that have it: `rank 3`, `ranks 0-2, 5`."""
    ranks: dict[str, list[int]] = {}
    for rank, settings in enumerate(everyone):
        ranks.setdefault(json.dumps(settings.get(key)), []).append(rank)
    return {value: _spans(numbers) for value, numbers in ranks.items()}


def _spans(numbers: Sequence[int]) -> str:
    """Rising numbers in words."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ("ranks " if len(numbers) > 1 else "rank ") + ", ".join("-".join(map(str, s)) for s in spans)
