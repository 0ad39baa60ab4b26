"""Every tensor accounted for: what a set of weights lacks, has too much, or has in another shape."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from flux_trainer.hub.errors import WeightsError, grouped
from flux_trainer.hub.families import Shapes
from flux_trainer.models import keys


def account(path: Path, found: Shapes, expected: Shapes, origin: str) -> None:
    """Raise WeightsError unless names and shapes are those expected; it names all that differ."""
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    misshapen = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if not (missing or unknown or misshapen):
        return
    if missing and not unknown and not misshapen and all("guidance" in name for name in missing):
        raise WeightsError(
            f"{path} has no guidance embedding ({', '.join(grouped(missing))}), and the model has one "
            "(as FLUX.1-dev and FLUX.2 dev): these weights are of the kind of FLUX.1-schnell, FLUX.2 klein "
            "or torchtitan's FLUX. Choose a flavor without it, such as flux-schnell or flux2-klein-4b, or "
            "weights that have it."
        )
    if unknown and not missing and not misshapen and all("guidance" in name for name in unknown):
        raise WeightsError(
            f"{path} has a guidance embedding ({', '.join(grouped(unknown))}), as FLUX.1-dev and FLUX.2 dev "
            "do, and the model has none: choose a flavor that has it, such as flux-dev or flux2-dev."
        )
    described = [f"{len(missing)} missing ({', '.join(grouped(missing))})"] if missing else []
    if unknown:
        near = _nearest(unknown, missing or list(expected))
        described.append(f"{len(unknown)} unknown ({', '.join(near)})")
    if misshapen:
        described.append(f"{len(misshapen)} misshapen ({', '.join(_grouped_shapes(misshapen))})")
    raise WeightsError(f"{path} does not fit {origin}: {'; '.join(described)}.")


def _grouped_shapes(sentences: Sequence[str]) -> list[str]:
    """As `grouped`, of names with something said of them."""
    by_rest: dict[str, list[str]] = {}
    for sentence in sentences:
        name, _, rest = sentence.partition(" ")
        by_rest.setdefault(rest, []).append(name)
    return [f"{', '.join(grouped(names))} {rest}" for rest, names in by_rest.items()]


def _nearest(unknown: Sequence[str], expected: Sequence[str]) -> list[str]:
    """The unknown names, each group with the expected one most like it."""
    choices = list({keys.pattern(name): None for name in expected})
    groups: dict[str, list[str]] = {}
    for name in unknown:
        groups.setdefault(keys.pattern(name), []).append(name)
    lines = []
    for name, members in groups.items():
        close = difflib.get_close_matches(name, choices, n=1)
        lines.append(", ".join(grouped(members)) + (f" [nearest: {close[0]}]" if close else ""))
    return lines
