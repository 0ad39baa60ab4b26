"""Cutting blocks into stages, and which steps a schedule can run."""

import random
import subprocess
import sys
from itertools import combinations
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from flux_trainer.config.compute import Parallelism
from flux_trainer.models.registry import FLAVORS
from flux_trainer.parallel.arithmetic import cuts
from flux_trainer.parallel.stages import STAGES_PER_RANK, check_micro_batches, spans


def dearest(cuts: list[range], blocks: list[int], first: int, last: int) -> int:
    costs = [sum(blocks[i] for i in cut) for cut in cuts]
    costs[0] += first
    costs[-1] += last
    return max(costs)


def test_the_dearest_stage_is_as_cheap_as_any_cut_makes_it():
    rng = random.Random(0)
    for _ in range(60):
        blocks = [rng.randint(1, 9) for _ in range(rng.randint(4, 8))]
        first, last = rng.randint(0, 12), rng.randint(0, 12)
        found = spans("1F1B", 4, blocks, first, last)
        assert [i for cut in found for i in cut] == list(range(len(blocks)))
        assert len(found) == 4
        assert all(found)
        others = (
            [range(a, b) for a, b in zip((0, *inner), (*inner, len(blocks)), strict=True)]
            for inner in combinations(range(1, len(blocks)), 3)
        )
        best = min(dearest(other, blocks, first, last) for other in others)
        assert dearest(found, blocks, first, last) == best


def test_equal_blocks_are_shared_out_evenly():
    assert [len(cut) for cut in spans("Interleaved1F1B", 3, [5] * 13)].count(2) == 5


def test_a_double_block_costs_as_much_as_a_single_one_but_for_modulation():
    found = cuts(FLAVORS["flux-dev"], (4096, 512), Parallelism(pipeline_parallel_degree=4))
    assert [len(cut) for cut in found] in ([14, 14, 14, 15], [14, 14, 15, 14], [14, 15, 14, 14])


def test_more_stages_than_blocks_are_refused_with_the_arithmetic():
    assert spans("Interleaved1F1B", 3, [1] * 6) == [range(i, i + 1) for i in range(6)]
    with pytest.raises(ValueError, match=r"4 ranks .* x 2 per rank \(Interleaved1F1B\) = 8 stages for 6"):
        spans("Interleaved1F1B", 4, [1] * 6)
    with pytest.raises(ValueError, match=r"7 ranks .* x 1 per rank \(1F1B\) = 7 stages for 6 blocks"):
        spans("1F1B", 7, [1] * 6)


@pytest.mark.parametrize("schedule", STAGES_PER_RANK)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_steps_are_refused_exactly_where_torch_refuses_them(schedule, ranks):
    kind = get_schedule_class(schedule)
    per_rank = STAGES_PER_RANK[schedule]
    stages = [
        SimpleNamespace(
            num_stages=per_rank * ranks, group_size=ranks, group_rank=0, stage_index=i * ranks, is_last=False
        )
        for i in range(per_rank)
    ]

    def refused(function, *args, **options) -> bool:
        try:
            function(*args, **options)
        except ValueError:
            return True
        return False

    for count in range(1, 15):
        by_torch = refused(
            kind, stages if issubclass(kind, PipelineScheduleMulti) else stages[0], n_microbatches=count
        )
        assert refused(check_micro_batches, schedule, ranks, count) == by_torch, count


def test_settings_can_be_checked_without_torch():
    code = "import sys, flux_trainer.parallel.stages; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
