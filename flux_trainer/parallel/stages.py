"""Which blocks each stage of a pipeline gets. Arithmetic alone, without torch: settings are checked with it.

Stage s lies on rank s mod P of the P ranks of a pipeline. With one stage per rank a micro-batch passes every
rank once (1F1B); with several it goes round as often, and ranks wait for each other for a shorter time
(Interleaved1F1B; Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters", 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

STAGES_PER_RANK = {"1F1B": 1, "Interleaved1F1B": 2}
"""By name of the schedule."""


def spans(schedule: str, ranks: int, blocks: Sequence[int], first: int = 0, last: int = 0) -> list[range]:
    """Consecutive blocks for each stage, in order, such that the dearest stage is as cheap as can be.

    Args:
        ranks: of the pipeline.
        blocks: the cost of each block, in any unit.
        first: what the first stage does beside its blocks (embedders).
        last: what the last stage does beside its blocks (head).

    Raises:
        ValueError: there are more stages than blocks.
    """
    stages, n = ranks * STAGES_PER_RANK[schedule], len(blocks)
    if stages > n:
        raise ValueError(
            f"The pipeline has more stages than the model has blocks: {ranks} ranks "
            f"(pipeline_parallel_degree) x {STAGES_PER_RANK[schedule]} per rank ({schedule}) = {stages} "
            f"stages for {n} blocks, and each needs one at least. Take a smaller degree"
            + (", or 1F1B." if STAGES_PER_RANK[schedule] > 1 else ".")
        )
    upto = list(accumulate(blocks, initial=0))
    upto = [cost + first * (end > 0) + last * (end == n) for end, cost in enumerate(upto)]
    # By end: of the ways to cut the first `end` blocks into as many stages as rounds so far, the one whose
    # dearest stage is cheapest and, among equals, with the least sum of squares; then where its stages end.
    ways = {0: (0, 0, [0])}
    for _ in range(stages):
        ways = {
            end: min(
                (max(most, upto[end] - upto[start]), squares + (upto[end] - upto[start]) ** 2, [*ends, end])
                for start, (most, squares, ends) in ways.items()
                if start < end
            )
            for end in range(min(ways) + 1, n + 1)
        }
    return [range(start, end) for start, end in pairwise(ways[n][2])]


def check_micro_batches(schedule: str, ranks: int, count: int) -> None:
    """Raise ValueError unless the schedule can run steps of `count` micro-batches on `ranks` ranks."""
    if schedule == "1F1B" and count < ranks:
        raise ValueError(
            f"1F1B needs as many micro-batches as ranks or more: a step has {count}, the pipeline {ranks} "
            "ranks (pipeline_parallel_degree). Take a smaller local_batch_size, a larger global_batch_size, "
            "or a smaller degree."
        )
    rounds = max(1, count // ranks)
    if schedule == "Interleaved1F1B" and count % rounds:
        raise ValueError(
            f"Interleaved1F1B takes micro-batches in rounds of the same size: {count} of them on {ranks} "
            f"ranks (pipeline_parallel_degree) make {count} // {ranks} = {rounds} rounds, which does not "
            f"divide {count}. Change global_batch_size or local_batch_size: any multiple of {ranks} will do."
        )
