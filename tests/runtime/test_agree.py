"""Settings compared between ranks."""

import os

import pytest
from helpers.ranks import run_ranks


def compare(*settings: dict) -> str | None:
    """What a rank is told, where rank i has the i-th settings."""
    from flux_trainer.runtime.agree import check_agreement
    from flux_trainer.runtime.dist import init_distributed

    world = init_distributed(30)
    try:
        check_agreement(settings[world.rank], world)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.distributed
def test_ranks_with_the_same_settings_agree():
    settings = {"optimizer": {"lr": 1e-3}, "data": {"sources": [{"path": "x"}]}, "torch": "2.13"}
    other = dict(reversed(settings.items()))
    assert run_ranks(2, compare, settings, other) == [None, None]


@pytest.mark.distributed
def test_all_ranks_are_told_what_differs_and_where():
    usual = {"optimizer": {"lr": 1e-3, "eps": 1e-8}, "data": {"sources": [{"path": "x"}]}, "torch": "2.13"}
    other = {**usual, "optimizer": {"lr": 2e-3, "eps": 1e-8}, "torch": "2.15", "new": True}
    told = run_ranks(4, compare, usual, usual, other, usual)
    assert set(told) == {
        "The ranks were started with different settings: "
        "new is null on ranks 0-1, 3, true on rank 2; "
        "optimizer.lr is 0.001 on ranks 0-1, 3, 0.002 on rank 2; "
        'torch is "2.13" on ranks 0-1, 3, "2.15" on rank 2. '
        "Give every machine the same files, flags and packages."
    }


def start_with_settings_of_its_own(folder) -> str | None:
    from helpers.tiny_run import TinyTrainer, tiny_config

    rank = os.environ["RANK"]
    flags = [
        f"--job.description=rank {rank}",
        f"--data.num_workers={rank}",
        "--metrics.no-enable_tensorboard",
    ]
    try:
        TinyTrainer(tiny_config(folder, *flags, f"--optimizer.lr={1 + int(rank)}e-3"))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.distributed
def test_a_trainer_does_not_start_where_a_machine_has_another_learning_rate(tmp_path):
    from helpers.tiny_run import write_assets

    write_assets(tmp_path)
    for told in run_ranks(2, start_with_settings_of_its_own, tmp_path):
        assert "settings: optimizer.lr is 0.001 on rank 0, 0.002 on rank 1. Give" in told
