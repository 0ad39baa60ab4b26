"""What cancels a step or ends a run early: bad data, gradients that are not finite, a peer that dies."""

import copy
import math
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.tiny_run import TinyTrainer, lines, tiny_config, write_assets
from PIL import Image

from flux_trainer.data.bad import DataError
from flux_trainer.optim.guard import SkippedTooOften


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

    def train_step(self, micro_batches):
        if self.step + 1 == self.broken[0]:
            self.before = copy.deepcopy(self.tensors())
        super().train_step(micro_batches)
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


@pytest.mark.parametrize("stopped_at", [None, 3])
def test_a_run_that_has_learned_nothing_fails_and_leaves_no_checkpoint(tmp_path, stopped_at, caplog):
    flags = ["--checkpoint.enable", "--checkpoint.interval=2", "--validation.enable=false"]
    trainer = broken(tmp_path, range(1, 7), *flags)
    if stopped_at:
        after_step = trainer.after_step
        trainer.after_step = lambda stopped: after_step(trainer.step == stopped_at)
    last = stopped_at or 6
    with pytest.raises(SkippedTooOften, match=f"Each step up to step {last} was skipped: its gradients were"):
        trainer.train()
    assert trainer.step == last
    assert list((trainer.dump_folder / "checkpoint").iterdir()) == []
    assert [record["skipped_steps"] for record in lines(trainer.dump_folder)] == list(range(1, last + 1))
    assert "Each step up to step 2 was skipped" in caplog.text, "no checkpoint, and it says so"


def test_without_checkpoints_nothing_is_said_of_them(tmp_path, caplog):
    trainer = broken(tmp_path, range(1, 7), "--checkpoint.interval=2", "--checkpoint.no-enable")
    with pytest.raises(SkippedTooOften, match="Each step up to step 6"):
        trainer.train()
    assert "no checkpoint is written yet" not in caplog.text


def test_a_step_inside_backward_may_leave_out_a_single_parameter(tmp_path):
    """No step of all is accepted, and yet the others have learned."""
    flags = ["--checkpoint.enable", "--optimizer.in_backward", "--training.max_norm=0", "--training.steps=3"]
    trainer = TinyTrainer(tiny_config(tmp_path, *flags))
    trainer.parameters["img_in.bias"].register_hook(lambda gradient: gradient * float("nan"))
    trainer.train()
    assert trainer.guard.skipped == 3
    assert [path.name for path in (trainer.dump_folder / "checkpoint").iterdir()] == ["step-3"]


def test_one_good_step_is_something_learned(tmp_path):
    trainer = broken(tmp_path, (1, 2, 4, 5, 6), "--checkpoint.enable", "--checkpoint.interval=2")
    trainer.train()
    assert sorted(path.name for path in (trainer.dump_folder / "checkpoint").iterdir()) == [
        "step-4",
        "step-6",
    ]


def test_a_checkpoint_written_between_too_many_skips_and_their_line_can_go_on(tmp_path):
    flags = ["--checkpoint.enable", "--training.max_skipped_steps=2", "--metrics.log_freq=100"]
    first = broken(tmp_path, (2, 3), *flags, "--training.steps=100", "--checkpoint.interval=3")
    first.run_validation = lambda: None
    first.loader = first.build_loader(0)
    for _ in range(3):
        first.train_step(first.micro_batches(next(first.loader)))
        first.after_step(stopped=False)
    first.loader.close()
    again = TinyTrainer(tiny_config(tmp_path, *flags, "--training.steps=5"))
    assert again.step == 3
    assert again.guard.skipped == 2
    again.train()
    assert again.step == 5


class Ending(TinyTrainer):
    """Rank 1 comes to grief in its third step (or its first), within the backward pass."""

    how = ""

    def loss(self, output, micro_batch):
        loss = super().loss(output, micro_batch)
        if self.world.rank == 1 and self.step == (0 if self.how == "stopped at first" else 2):
            loss.register_hook(self.come_to_grief)
        return loss

    def come_to_grief(self, gradient):
        (self.dump_folder / "end").touch()
        if self.how == "an error":
            raise ValueError("This is too hard.")
        if self.how != "not at all":
            os.kill(os.getpid(), signal.SIGKILL if self.how == "killed" else signal.SIGSTOP)


def train_until_end(folder, how, kind, *flags) -> None:
    """Standard error and exit status go to files."""
    from unittest import mock

    from flux_trainer import train
    from flux_trainer.runtime.log import init_logger

    rank = os.environ["RANK"]
    multiprocessing.current_process()._config["daemon"] = False  # it may start data workers
    if "--comm.init_timeout_seconds" in " ".join(flags):  # with a default group of its own
        torch.distributed.destroy_process_group()
        meet = {
            "init_method": f"file://{folder}/meet",
            "rank": int(rank),
            "world_size": int(os.environ["WORLD_SIZE"]),
        }
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=6), **meet)
    with (folder / f"words{rank}").open("w") as words:
        os.dup2(words.fileno(), 2)
    init_logger(int(rank))
    Ending.how = how
    flags = ("--checkpoint.enable", "--checkpoint.interval=100", *flags)
    with mock.patch("flux_trainer.flux.FluxTrainer", globals()[kind]):
        status = train.train(tiny_config(folder, *flags))
    (folder / f"status{rank}").write_text(str(status))


def run_until_end(folder, ranks, how, *flags, kind=Ending) -> tuple[float, list[str]]:
    """Seconds from rank 1's grief to the end of all ranks, and what each has said."""
    write_assets(folder)
    run_ranks(ranks, train_until_end, folder, how, kind.__name__, *flags, lost=range(ranks), timeout=60)
    seconds = time.time() - (folder / "run/end").stat().st_mtime
    return seconds, [(folder / f"words{rank}").read_text() for rank in range(ranks)]


MESHES = {
    "fsdp2": (2, "dp_shard 1", []),
    "cp2": (2, "cp 1", ["context_parallel_degree=2", "context_parallel_method=ring"]),
    "pp2": (2, "stage 1 of 2", ["pipeline_parallel_degree=2"]),
    "tp2": (2, "tp 1", ["tensor_parallel_degree=2"]),
    "hsdp 2x2": (4, "dp_replicate 0, dp_shard 1", ["data_parallel_replicate_degree=2"]),
}


def flags_of(mesh: str) -> list[str]:
    micro = ["--training.local_batch_size=2"]
    return micro + [f"--parallelism.{flag}" for flag in MESHES[mesh][2]]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "mesh", [m if m in ("fsdp2", "cp2", "pp2") else pytest.param(m, marks=pytest.mark.slow) for m in MESHES]
)
def test_a_killed_rank_is_named_and_ends_all_without_saving(tmp_path, mesh):
    ranks, place, _ = MESHES[mesh]
    seconds, words = run_until_end(tmp_path, ranks, "killed", *flags_of(mesh))
    assert seconds < 8
    for rank, said in enumerate(words):
        assert f"Rank 1 ({place}; machine {socket.gethostname()}) is gone: its process died" in said
        assert set(re.findall(r"Rank (\d+) \(", said)) == {"1"}, "nobody else is blamed"
        if rank != 1:
            assert "This one ends without saving. It noticed by: " in said
            assert (tmp_path / f"status{rank}").read_text() == "1"
    assert len(lines(tmp_path / "run")) == 2
    assert list((tmp_path / "run/checkpoint").iterdir()) == []


@pytest.mark.slow
@pytest.mark.distributed
def test_data_workers_of_a_killed_rank_do_not_delay_the_end(tmp_path):
    """They hold its connections open, so the other rank notices nothing by itself."""
    seconds, words = run_until_end(tmp_path, 2, "killed", "--data.num_workers=2")
    assert seconds < 8
    assert "Rank 1 (dp_shard 1" in words[0]
    assert list((tmp_path / "run/checkpoint").iterdir()) == []


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("mesh", "how"),
    [
        ("fsdp2", "stopped"),
        pytest.param("cp2", "stopped", marks=pytest.mark.slow),
        pytest.param("pp2", "stopped", marks=pytest.mark.slow),
        pytest.param("hsdp 2x2", "stopped at first", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_stands_still_is_named_and_ends_all_after_the_timeout(tmp_path, mesh, how):
    ranks, place, _ = MESHES[mesh]
    flags = [*flags_of(mesh), "--comm.train_timeout_seconds=1"]
    # gloo's sends and receives keep the patience of the beginning
    beginning = mesh == "pp2" or how == "stopped at first"
    if beginning:
        flags += ["--comm.init_timeout_seconds=6"]
    seconds, words = run_until_end(tmp_path, ranks, how, *flags)
    assert 1 < seconds < (15 if beginning else 10)
    assert f"Rank 1 ({place}; machine {socket.gethostname()}) stands still" in words[0]
    assert set(re.findall(r"Rank (\d+) \(", "".join(words))) == {"1"}, "nobody else is blamed"
    assert (tmp_path / "status0").read_text() == "1"
    assert list((tmp_path / "run/checkpoint").iterdir()) == []


class Slow(Ending):
    """Beside rank 1, which is stopped, the other replica is slow: it notices 5 s later than rank 0."""

    def loss(self, output, micro_batch):
        if self.step == 2 and self.world.rank >= 2:
            time.sleep(5)
        return super().loss(output, micro_batch)


class Aborting(Ending):
    """Rank 0 is ended while it waits for rank 1, as nccl's watchdog does."""

    def forward_backward(self, micro_batches):
        if self.step == 2 and self.world.rank == 0:
            threading.Timer(2, os.abort).start()
        return super().forward_backward(micro_batches)


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_have_not_noticed_yet_are_not_taken_for_the_one_that_stands_still(tmp_path):
    flags = [*flags_of("hsdp 2x2"), "--training.global_batch_size=8", "--comm.train_timeout_seconds=8"]
    seconds, words = run_until_end(tmp_path, 4, "stopped", *flags, kind=Slow)
    assert seconds < 16
    for said in words:
        assert "Rank 1 (dp_replicate 0, dp_shard 1; machine " in said
        assert "stands still: its process is stopped, in step 3." in said
    assert set(re.findall(r"Rank (\d+) \(", "".join(words))) == {"1"}, "nobody else is blamed"
    late = [said for said in words[2:] if "This one has not noticed in 3 s, and is killed" in said]
    assert late, "the slow replica waited for itself"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_is_ended_for_its_waiting_is_not_to_blame(tmp_path):
    flags = [*flags_of("fsdp2"), "--comm.train_timeout_seconds=20"]
    seconds, words = run_until_end(tmp_path, 2, "stopped", *flags, kind=Aborting)
    assert seconds < 10
    assert "stands still: its process is stopped, in step 3. Rank 0 died" in words[0]
    assert set(re.findall(r"Rank (\d+) \(", "".join(words))) == {"1"}, "nobody else is blamed"


@pytest.mark.distributed
def test_the_error_of_a_rank_is_told_to_the_others(tmp_path):
    seconds, words = run_until_end(tmp_path, 2, "an error")
    assert seconds < 8
    sentence = f"Rank 1 (dp_shard 1; machine {socket.gethostname()}) failed: This is too hard."
    assert sentence in words[0]
    assert "ERROR    [rank 1] This is too hard." in words[1]
    assert "Rank 0" not in words[0] + words[1]


@pytest.mark.distributed
def test_a_run_without_grief_speaks_of_none(tmp_path):
    _, words = run_until_end(tmp_path, 2, "not at all")
    assert "Training completed: step 6 of 6" in words[0]
    assert not any("ERROR" in said or "Rank" in said for said in words)
    assert [(tmp_path / f"status{rank}").read_text() for rank in range(2)] == ["0", "0"]
    assert (tmp_path / "run/checkpoint/step-6").is_dir()
