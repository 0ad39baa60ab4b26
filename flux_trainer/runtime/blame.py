"""Who is to blame when a run stands still or falls apart: a function of what all watchers report.

A rank that waits for another has come at least as far as that one, in marks: ranks make them after a thing
that needs others, or right before one. So the culprit is among the ranks furthest behind. What points at
ranks, from strong to weak:

    1. A process that is stopped; a rank that failed with an error of its own; a machine that is gone; a
       process that died while its rank made progress. (One that died after a long wait may have been ended
       for its waiting, as torch's watchdog of nccl does.)
    2. A watcher that does not answer: its whole machine or container may stand still, or be cut off.
    3. Of the ranks that have not given up waiting, those furthest behind when the alarm was raised; of those,
       the ones that did not give up later either, if there are any.

Where several are equally far behind, the marks do not tell which of them stands still, and all are named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from flux_trainer.runtime.progress import STOPPED

End = Literal["", "waited", "failed", "died", "lost"]
"""How a rank has ended: not yet; by giving up waiting for another; by an error; without a word; with its
machine."""

_SHOWN = 8  # ranks that a sentence names one by one


@dataclass(frozen=True)
class Report:
    """What one watcher says of its rank after an alarm."""

    rank: int
    name: str
    """For people: `Rank 3 (dp_shard 1; machine node7)`."""
    step: int = 0
    count: int = 0
    """Marks within the step, when the alarm was heard."""
    idle: float = 0.0
    """Seconds since the last mark."""
    overdue: bool = False
    """Whether that is long, by what the rank is ready to wait for others."""
    activity: str = ""
    """What its process did after the alarm, where that is known."""
    end: End = ""
    late: bool = False
    """Whether it ended a good while after the alarm."""
    reason: str = ""
    """The error by which it failed."""


def evident(reports: Mapping[int, Report]) -> dict[int, str]:
    """Ranks whose own state shows that they are to blame, each with a sentence about it."""
    stopped = [r for r in reports.values() if not r.end and r.activity == STOPPED]
    died = [r for r in reports.values() if r.end == "died" and not r.late and not r.overdue]
    found = {r.rank: f"{r.name} stands still: its process is stopped, {_step(r)}." for r in stopped}
    if stopped and died:
        found[stopped[-1].rank] += " " + " ".join(f"Rank {r.rank} died meanwhile." for r in died[:_SHOWN])
    for r in [] if stopped else died:
        found[r.rank] = f"{r.name} is gone: its process died without a word, perhaps killed."
    for r in reports.values():
        if r.end == "failed":
            found[r.rank] = f"{r.name} failed: {r.reason}"
        elif r.end == "lost":
            found[r.rank] = f"{r.name} is gone: its machine does not answer any more."
    return found


def blame(reports: Mapping[int, Report], size: int) -> dict[int, str]:
    """The ranks to blame, each with a sentence about it; those that cannot be told apart share one.

    Args:
        reports: by rank, at least one.
        size: number of ranks.
    """
    if found := evident(reports):
        return found
    if silent := [rank for rank in range(size) if rank not in reports]:
        ranks = _list((f"rank {rank}" for rank in silent), ", ")
        sentence = (
            f"Nothing is heard from the watchers of {ranks}: their machines or containers stand still, or "
            "are cut off from this one."
        )
        return dict.fromkeys(silent, sentence)
    known = reports.values()
    pool = [r for r in known if r.end != "waited" or r.late] or list(known)
    last = min((r.step, r.count) for r in pool)
    behind = [r for r in pool if (r.step, r.count) == last]
    culprits = [r for r in behind if not r.late] or behind
    if len(culprits) == 1:
        return {culprits[0].rank: _alone(culprits[0])}
    names = _list(f"{r.name}: {_doing(r)}" for r in culprits)
    sentence = (
        f"One of {len(culprits)} ranks holds up all others; they are equally far ({_step(culprits[0])}), and "
        f"which one it is cannot be told: {names}."
    )
    return {r.rank: sentence for r in culprits}


def text(verdict: Mapping[int, str]) -> str:
    """A verdict as one line."""
    return _list(dict.fromkeys(verdict.values()), " ")


def _alone(r: Report) -> str:
    """About the only rank that is furthest behind."""
    if r.end == "died":
        return f"{r.name} is gone: its process died {_step(r)}, after {r.idle:.0f} s without progress."
    if r.end == "waited":
        return f"{r.name} was furthest behind ({_step(r)}) when all ranks gave up waiting for each other."
    return (
        f"{r.name} stands still: others have given up waiting, and of the rest it is furthest behind, "
        f"{_step(r)}; {_doing(r)}."
    )


def _step(r: Report) -> str:
    return f"in step {r.step}" if r.step else "before the first step"


def _doing(r: Report) -> str:
    ends = {"died": "its process died", "waited": "gave up waiting"}
    return f"{ends.get(r.end) or r.activity or 'running'}, no progress for {r.idle:.0f} s"


def _list(words: Iterable[str], separator: str = "; ") -> str:
    shown = list(words)
    more = [f"and {len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else []
    return separator.join(shown[:_SHOWN] + more)
