"""What cancels a step or ends a run early: bad data, gradients that are not finite, a peer that dies."""

import copy
import math
import os
import signal
import time

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.tiny_run import TinyTrainer, lines, tiny_config
from PIL import Image

from flux_trainer.data.bad import DataError
from flux_trainer.optim.guard import SkippedTooOften


@pytest.fixture(scope="module", autouse=True)
def process_group():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_too_many_bad_samples_end_the_run(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(20):
        (images / f"{i}.txt").write_text(f"picture {i}")
        if i % 2:
            (images / f"{i}.png").write_bytes(b"rubbish")
        else:
            Image.new("RGB", (16, 16)).save(images / f"{i}.png")
    flags = ["--data.sources.0.type=folder", f"--data.sources.0.path={images}", "--training.steps=100"]
    trainer = TinyTrainer(tiny_config(tmp_path, *flags))
    with pytest.raises(DataError, match=r"samples were bad .* data\.max_bad_fraction = 0\.05"):
        trainer.train()
    assert 1 <= trainer.step <= 5, "6 bad draws of the first hundred are too many"
    assert (tmp_path / "run/bad_samples.jsonl").is_file()


class Broken(TinyTrainer):
    """The loss is not a number in the given steps; `before` and `after` hold the tensors around the first."""

    broken: tuple[int, ...] = ()

    def loss(self, output, micro_batch):
        return super().loss(output, micro_batch) * (math.nan if self.step + 1 in self.broken else 1)

    def train_step(self, batch):
        if self.step + 1 == self.broken[0]:
            self.before = copy.deepcopy(self.tensors())
        super().train_step(batch)
        if self.step == self.broken[0]:
            self.after = copy.deepcopy(self.tensors())


def broken(folder, steps, *flags):
    trainer = Broken(tiny_config(folder, *flags))
    trainer.broken = steps
    return trainer


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_a_step_with_a_broken_loss_changes_nothing_but_the_count(tmp_path, implementation):
    trainer = broken(tmp_path, (3,), f"--optimizer.implementation={implementation}")
    trainer.train()
    changed = {
        name for name, tensor in trainer.before.items() if not torch.equal(tensor, trainer.after[name])
    }
    assert changed == {"guard.skipped", "guard.skipped_in_row"}
    kinds = {name.split(".")[0] for name in trainer.before}
    assert {"ema", "optimizer", "img_in"} <= kinds
    records = lines(trainer.dump_folder)
    assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1, 1, 1]
    assert [record["longest_skip"] for record in records] == [0, 0, 1, 0, 0, 0]
    after = trainer.tensors()
    for name in ("img_in.weight", "ema.img_in.weight", "optimizer.state.img_in.weight.exp_avg"):
        assert after[name].isfinite().all()
        assert not torch.equal(after[name], trainer.after[name]), "the steps after it count"


def test_many_skipped_steps_in_a_row_end_the_run(tmp_path):
    trainer = broken(tmp_path, (2, 4, 5, 6, 7), "--training.max_skipped_steps=3", "--training.steps=20")
    with pytest.raises(SkippedTooOften, match="3 steps in a row were skipped up to step 6"):
        trainer.train()


def test_a_checkpoint_written_between_too_many_skips_and_their_line_can_go_on(tmp_path):
    flags = ["--checkpoint.enable", "--training.max_skipped_steps=2", "--metrics.log_freq=100"]
    first = broken(tmp_path, (2, 3), *flags, "--training.steps=100", "--checkpoint.interval=3")
    first.run_validation = lambda: None
    first.loader = first.build_loader(0)
    for _ in range(3):
        first.train_step(next(first.loader))
        first.after_step(stopped=False)
    first.loader.close()
    again = TinyTrainer(tiny_config(tmp_path, *flags, "--training.steps=5"))
    assert again.step == 3
    assert again.guard.skipped == 2
    again.train()
    assert again.step == 5


class Dying(TinyTrainer):
    """Rank 1 is killed in its third step, within the backward pass."""

    def loss(self, output, micro_batch):
        loss = super().loss(output, micro_batch)
        if self.world.rank == 1 and self.step == 2:
            loss.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGKILL))
        return loss


def train_until_death(folder) -> tuple[int, str, float]:
    """Exit status, last words, and seconds since the last step."""
    from unittest import mock

    from flux_trainer import train
    from flux_trainer.runtime.log import logger

    words = []
    with (
        mock.patch("flux_trainer.flux.FluxTrainer", Dying),
        mock.patch.object(logger, "error", words.append),
    ):
        status = train.train(tiny_config(folder, "--training.steps=100", "--checkpoint.enable"))
    return status, words[-1], time.time() - (folder / "run/metrics.jsonl").stat().st_mtime


@pytest.mark.distributed
def test_the_survivor_of_a_killed_rank_says_so_and_ends_without_saving(tmp_path):
    """It notices in the middle of a step, where FSDP waits for gradients."""
    status, words, seconds = run_ranks(2, train_until_death, tmp_path, lost={1}, timeout=60)[0]
    assert status == 1
    assert words.startswith("Another rank is gone or hung; noticed in the middle of a step: ")
    assert seconds < 15, "it does not wait for a timeout"
    assert len(lines(tmp_path / "run")) == 2
    assert list((tmp_path / "run/checkpoint").iterdir()) == []
