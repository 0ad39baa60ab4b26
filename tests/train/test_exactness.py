"""Runs that must be equal: whatever the split of the batch, the number of ranks, or the interruptions."""

import pytest
import torch
from helpers.marks import slow
from helpers.ranks import run_ranks
from helpers.tiny_run import TinyTrainer, tiny_config, train
from PIL import Image

from flux_trainer.checkpoint.errors import CheckpointError


def column(run, key):
    return [line[key] for line in run["lines"] if key in line]


def assert_equal_runs(a, b, tolerance):
    """Losses, norms and all tensors: bitwise, or within `tolerance` of each tensor's largest entry."""
    for key in ("loss", "grad_norm", "lr", "samples_seen"):
        assert column(a, key) == pytest.approx(column(b, key), rel=tolerance, abs=0)
    assert a["tensors"].keys() == b["tensors"].keys()
    for name, tensor in a["tensors"].items():
        error = (tensor - b["tensors"][name]).abs().max().item()
        assert error <= tolerance * tensor.abs().max().item(), (name, error)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"))


def test_the_run_moves(one_rank):
    """Clipping bites, the loss changes, EMA and weights differ: equality below means something."""
    assert len(column(one_rank, "loss")) == 6
    assert min(column(one_rank, "grad_norm")) > 0.01
    assert len(set(column(one_rank, "loss"))) == 6
    tensors = one_rank["tensors"]
    assert not torch.equal(tensors["ema.img_in.weight"], tensors["img_in.weight"])
    assert tensors["optimizer.state.img_in.weight.step"] == 6


@pytest.mark.parametrize("local", [1, 8])
def test_accumulation_is_one_large_batch(tmp_path, one_rank, local):
    """The batch of 8 in micro-batches of 4, 1 and 8: Adam amplifies rounding, so a little above 1e-11."""
    run = train(tmp_path, f"--training.local_batch_size={local}")
    assert column(run, "loss")[0] == pytest.approx(column(one_rank, "loss")[0], rel=1e-13)
    assert column(run, "grad_norm")[0] == pytest.approx(column(one_rank, "grad_norm")[0], rel=1e-12)
    assert_equal_runs(run, one_rank, 1e-9)


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "replicate"), [(2, 1), *slow((4, 2))])
def test_any_number_of_ranks_trains_the_same(tmp_path, one_rank, ranks, replicate):
    flags = ["--training.local_batch_size=1", f"--parallelism.data_parallel_replicate_degree={replicate}"]
    first, *others = run_ranks(ranks, train, tmp_path, *flags)
    assert_equal_runs(first, one_rank, 1e-9)
    for other in others:
        assert all(torch.equal(first["tensors"][k], v) for k, v in other["tensors"].items())


def interrupted(folder, dtype, *more):
    """Six steps of 8 in one go, and in two: of the data set's 20 samples, the pause lies after 16."""
    flags = [
        "--checkpoint.enable",
        "--checkpoint.interval=2",
        "--ema.enable",
        f"--training.dtype={dtype}",
        f"--training.mixed_precision_param={dtype}",
        f"--training.mixed_precision_reduce={dtype}",
        *more,
    ]
    whole = train(folder / "whole", *flags)
    train(folder / "parts", *flags, "--training.steps=2", "--lr_scheduler.total_steps=6")
    parts = train(folder / "parts", *flags)
    return whole, parts


@pytest.mark.parametrize(
    ("dtype", "flags"),
    [
        ("float32", ["--training.mixed_precision_param=bfloat16"]),  # the default
        *slow(("float32", []), ("float64", []), ("float32", ["--checkpoint.async_mode=async"])),
    ],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, dtype, flags):
    whole, parts = interrupted(tmp_path, dtype, *flags)
    assert column(parts, "step") == [1, 2, 3, 4, 5, 6]
    assert_equal_runs(whole, parts, 0)


def interrupted_on_a_rank(folder):
    return interrupted(folder, "float32")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_resumed_run_is_bitwise_equal_on_two_ranks(tmp_path):
    for whole, parts in run_ranks(2, interrupted_on_a_rank, tmp_path, timeout=60):
        assert_equal_runs(whole, parts, 0)


@pytest.mark.distributed
def test_a_checkpoint_of_two_ranks_goes_on_with_one(tmp_path, one_rank):
    flags = ["--checkpoint.enable", "--training.local_batch_size=2"]
    run_ranks(2, train, tmp_path, *flags, "--training.steps=3", "--lr_scheduler.total_steps=6")
    assert_equal_runs(train(tmp_path, *flags), one_rank, 1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and TEST_GPU=1")
def test_a_resumed_run_is_bitwise_equal_on_a_gpu(tmp_path):
    low = ["--debug.deterministic", "--training.mixed_precision_param=bfloat16", "--encoder.dtype=bfloat16"]
    whole, parts = interrupted(tmp_path, "float32", *low)
    assert_equal_runs(whole, parts, 0)


@pytest.mark.parametrize(("before", "after"), [("enable", "no-enable"), ("no-enable", "enable")])
def test_switching_the_average_needs_a_new_run_and_is_told_how(tmp_path, before, after):
    """No resume can, not even a forced one; a new run starts from the weights as the message says."""
    flags = ["--checkpoint.enable", "--training.steps=1"]
    saved = train(tmp_path, *flags, f"--ema.{before}")["tensors"]
    step = tmp_path / "run/checkpoint/step-1"
    told = rf"goes on with --ema\.{before} only.*initial_load_path {step}.*--job\.dump_folder"
    with pytest.raises(CheckpointError, match=told):
        train(tmp_path, *flags, f"--ema.{after}", "--checkpoint.force_resume")
    new = [f"--checkpoint.initial_load_path={step}", f"--job.dump_folder={tmp_path / 'new'}"]
    tensors = TinyTrainer(tiny_config(tmp_path, *flags, f"--ema.{after}", *new)).tensors()
    averages = {name.removeprefix("ema."): t for name, t in tensors.items() if name.startswith("ema.")}
    assert (after == "enable") == ("img_in.weight" in averages)
    for name in ("img_in.weight", "final_layer.linear.bias"):
        assert torch.equal(tensors[name], saved[name])
        assert torch.equal(averages.get(name, saved[name]), saved[name])


def test_a_forced_resume_with_another_batch_goes_on_where_the_data_was(tmp_path):
    flags = ["--checkpoint.enable", "--training.local_batch_size=4"]
    train(tmp_path, *flags, "--training.steps=3")
    other = [*flags, "--training.steps=5", "--training.global_batch_size=4"]
    with pytest.raises(CheckpointError, match=r"training\.global_batch_size"):
        train(tmp_path, *other)
    run = train(tmp_path, *other, "--checkpoint.force_resume")
    assert column(run, "samples_seen") == [8, 16, 24, 28, 32]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and TEST_GPU=1")
def test_a_step_that_logs_nothing_never_waits_for_the_gpu(tmp_path):
    low = [
        "--training.dtype=float32",
        "--training.mixed_precision_reduce=float32",
        "--encoder.dtype=bfloat16",
    ]
    low += ["--training.mixed_precision_param=bfloat16", "--metrics.log_freq=1000"]
    trainer = TinyTrainer(tiny_config(tmp_path, *low))
    trainer.loader = trainer.build_loader(0)
    for _ in range(3):  # the first step logs, and the first few fill caches
        trainer.train_step(trainer.micro_batches(next(trainer.loader)))
    batch = next(trainer.loader)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(trainer.micro_batches(batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.loader.close()


def test_a_resume_over_changed_data_is_refused(tmp_path):
    """A picture more in a folder, and every later draw would be another sample."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"picture {i}")
    flags = ["--checkpoint.enable", "--data.sources.0.type=folder", f"--data.sources.0.path={pictures}"]
    train(tmp_path, *flags, "--training.steps=1")
    Image.new("RGB", (16, 16)).save(pictures / "00.png")
    with pytest.raises(CheckpointError, match="samples 3 in the checkpoint, 4 now"):
        train(tmp_path, *flags, "--training.steps=2")
