"""Who is to blame: the verdict on what watchers report, case by case."""

import pytest

from flux_trainer.runtime.blame import Report, blame, text


def reports(*changes: dict) -> dict[int, Report]:
    """Of ranks 0, 1, ...; by default in the middle of step 3, asleep and silent."""
    usual = {"step": 3, "count": 5, "idle": 8.0, "activity": "asleep"}
    return {
        rank: Report(**{"rank": rank, "name": f"Rank {rank} (machine m)", **usual, **change})
        for rank, change in enumerate(changes)
    }


WAITED = {"end": "waited"}
NOTICED = {"end": "waited", "late": True}
SILENT: dict = {}
STOPPED = {"activity": "stopped"}
BEHIND = {"count": 4}
KILLED = {"end": "died", "idle": 0.2}
ABORTED = {"end": "died", "overdue": True}
TERMINATED = {"end": "died", "late": True}

CASES = {
    "a rank is killed, the others notice": ([WAITED, KILLED, WAITED], {1}),
    "killed, with marks ahead of the rest": ([WAITED, KILLED | {"count": 9}, SILENT], {1}),
    "two are killed": ([KILLED, KILLED, WAITED], {0, 1}),
    "others die of it": ([KILLED, TERMINATED, TERMINATED], {0}),
    "an error": ([WAITED, {"end": "failed", "reason": "too hard"}, SILENT], {1}),
    "a machine is gone": ([WAITED, {"end": "lost", "count": 0}, WAITED], {1}),
    "killed after a long silence, nobody else silent": ([WAITED, ABORTED, WAITED], {1}),
    "killed after a long silence, behind all others": ([WAITED, ABORTED | BEHIND, SILENT], {1}),
    "one waits for a stopped one, others have not noticed": ([WAITED, STOPPED, SILENT, SILENT], {1}),
    "stopped, though its marks are ahead": ([WAITED, STOPPED | {"count": 9}, BEHIND], {1}),
    "two are stopped": ([WAITED, STOPPED, STOPPED, SILENT], {1, 2}),
    "the waiting one aborts, the culprit is stopped": ([KILLED, STOPPED], {1}),
    "the waiting one aborts, the culprit is behind": ([ABORTED, BEHIND, SILENT], {1}),
    "the waiting one aborts after an alarm": ([WAITED, BEHIND, TERMINATED], {1}),
    "aborts and silence, equally far": ([ABORTED, SILENT, ABORTED, WAITED], {0, 1, 2}),
    "one is behind": ([WAITED, BEHIND, SILENT, SILENT], {1}),
    "one is a step behind, with more marks in it": ([WAITED, {"step": 2, "count": 9}, SILENT], {1}),
    "the only silent one": ([WAITED, SILENT, NOTICED], {1}),
    "behind and silent, others noticed later": ([WAITED, BEHIND, NOTICED, SILENT], {1}),
    "equally far and silent": ([WAITED, SILENT, SILENT, NOTICED], {1, 2}),
    "a stage that waits for its first input is no culprit": ([SILENT, WAITED | {"count": 0}], {0}),
    "the culprit wakes up after the alarm": ([WAITED, NOTICED | BEHIND, SILENT], {1}),
    "all gave up, one was behind": ([WAITED, WAITED | BEHIND, WAITED], {1}),
    "all gave up for each other": ([WAITED, WAITED], {0, 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_verdict(case):
    ranks, culprits = CASES[case]
    verdict = blame(reports(*ranks), len(ranks))
    assert set(verdict) == culprits
    for rank in range(len(ranks)):
        assert (f"Rank {rank} (machine m)" in text(verdict)) == (rank in culprits)


def test_ranks_whose_watchers_do_not_answer_come_before_those_that_are_behind():
    verdict = blame(reports(WAITED, BEHIND), 4)
    assert list(verdict) == [2, 3]
    assert text(verdict).startswith("Nothing is heard from the watchers of rank 2, rank 3: ")


def test_what_is_said():
    assert text(blame(reports(KILLED, STOPPED), 2)) == (
        "Rank 1 (machine m) stands still: its process is stopped, in step 3. Rank 0 died meanwhile."
    )
    assert text(blame(reports(WAITED, BEHIND | {"step": 0, "activity": "busy"}, SILENT), 3)) == (
        "Rank 1 (machine m) stands still: others have given up waiting, and of the rest it is furthest "
        "behind, before the first step; busy, no progress for 8 s."
    )
    assert text(blame(reports(WAITED, SILENT, ABORTED), 3)) == (
        "One of 2 ranks holds up all others; they are equally far (in step 3), and which one it is cannot be "
        "told: Rank 1 (machine m): asleep, no progress for 8 s; Rank 2 (machine m): its process died, no "
        "progress for 8 s."
    )


def test_a_thousand_ranks_fit_into_a_line():
    said = text(blame(reports(WAITED, *[SILENT] * 999), 1000))
    assert said.count("(machine m)") == 8
    assert said.endswith("and 991 more.")
    said = text(blame(reports(*[STOPPED] * 1000), 1000))
    assert said.count("(machine m)") == 8
    assert said.endswith("and 992 more")
