"""Bad samples: what they are called, where they are listed, and when there are too many.

A sample that cannot be used (corrupt, too large, no caption) raises BadSample where it is found; its draw
takes a substitute (samples.py) and carries a BadRecord to the main process, which lists it here.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


class DataError(ValueError):
    """The data cannot be used as they are; the message says why and what to do."""


class BadSample(Exception):
    """One sample cannot be used; the message is the reason."""


@dataclass(frozen=True)
class BadRecord:
    """Which sample was bad, and why."""

    source: str
    index: int
    reason: str

    def __str__(self) -> str:
        return f"{self.source}, sample {self.index}: {self.reason}"


class BadSamples:
    """The run's account of bad samples, kept in the main process of each rank.

    `draws` counts this rank's draws since the process began, `bad_draws` those whose own sample was bad.
    Every distinct bad sample is one line of `<dump_folder>/bad_samples.jsonl`, whoever met it, however often.
    """

    FILE_NAME = "bad_samples.jsonl"
    MIN_DRAWS = 100  # no share is judged on fewer draws than this

    def __init__(self, dump_folder: str | Path) -> None:
        self.path = Path(dump_folder) / self.FILE_NAME
        self.draws = 0
        self.bad_draws = 0
        self.last: BadRecord | None = None
        self._listed: set[BadRecord] = set()

    def count(self, draws: int, bad_draws: int, records: Iterable[BadRecord]) -> None:
        """Account for a training batch: how many draws, how many of them bad, and what was bad."""
        self.draws += draws
        self.bad_draws += bad_draws
        self.list(records)

    def list(self, records: Iterable[BadRecord]) -> None:
        """List without counting: append what the file does not hold yet, under a lock on the file."""
        new = dict.fromkeys(record for record in records if record not in self._listed)
        if not new:
            return
        self._listed.update(new)
        self.last = next(reversed(new))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
            file.seek(0)
            present = set(file)
            lines = (json.dumps(asdict(record)) + "\n" for record in new)
            file.writelines(line for line in lines if line not in present)

    def raise_if_too_many(self, bad_draws: int, draws: int, max_fraction: float) -> None:
        """DataError once more than `max_fraction` of the draws were bad. Takes counts summed over all ranks.

        The share is taken of at least MIN_DRAWS draws: with 5 % allowed, the sixth bad draw of the first
        hundred stops the run, at once.
        """
        if bad_draws > max_fraction * max(draws, self.MIN_DRAWS):
            example = f" The last one here: {self.last}." if self.last else ""
            raise DataError(
                f"{bad_draws} of {draws} samples were bad ({bad_draws / draws:.1%}), more than "
                f"data.max_bad_fraction = {max_fraction:g} allows.{example} All are listed in {self.path}: "
                "mend or remove them, or raise data.max_bad_fraction."
            )
