"""The helper that runs functions on several ranks: results in order, failures told, hangs ended."""

import os
import signal
import time

import pytest
from helpers.ranks import run_ranks, start

pytestmark = pytest.mark.distributed


def total(offset: int) -> int:
    import torch
    import torch.distributed as dist

    value = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(value)
    return int(value)


def fail_on_last() -> None:
    import torch.distributed as dist

    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("a sentence from the last rank")
    dist.barrier()


def hang() -> None:
    time.sleep(60)


def die_on_rank_1() -> str:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def write(path: str) -> None:
    with open(path, "w") as file:
        file.write("done")


def test_results_come_in_rank_order_from_a_working_group() -> None:
    assert run_ranks(2, total, 10) == [21, 21]


def test_a_failing_rank_is_told_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1: .*a sentence from the last rank") as caught:
        run_ranks(2, fail_on_last)
    assert "fail_on_last" in str(caught.value)


def test_a_hang_ends() -> None:
    with pytest.raises(AssertionError, match="rank 0 did not end in time"):
        run_ranks(1, hang, timeout=0.5)


def test_a_lost_rank_is_expected_or_an_error() -> None:
    assert run_ranks(2, die_on_rank_1, lost={1}) == ["alive", None]
    with pytest.raises(AssertionError, match="exit code -9"):
        run_ranks(2, die_on_rank_1, timeout=10)


def test_start_runs_a_function_in_a_process(tmp_path) -> None:
    process = start(write, str(tmp_path / "file"))
    process.join(60)
    assert (tmp_path / "file").read_text() == "done"
