"""A step inside backward is the plain step bit for bit, and leaves no gradients behind."""

import pytest
import torch
from helpers.alive import Alive
from helpers.marks import slow
from helpers.ranks import run_ranks
from helpers.tiny_run import TinyTrainer, tiny_config, train
from torch import nn

from flux_trainer.config.schema import Optimizer
from flux_trainer.optim.build import build_optimizer, optimizer_tensors
from flux_trainer.optim.guard import SkippedTooOften, clip_grad_norm
from flux_trainer.optim.in_backward import StepInBackward

LOW = ["dtype=float32", "mixed_precision_param=bfloat16", "mixed_precision_reduce=float32"]
FLAGS = ["--training.max_norm=0", "--training.global_batch_size=4", *(f"--training.{key}" for key in LOW)]
IN_BACKWARD = "--optimizer.in_backward"


def net(width: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))


def assert_equal_runs(a, b):
    for key in ("loss", "grad_norm", "skipped_steps"):
        assert [line[key] for line in a["lines"]] == [line[key] for line in b["lines"]], key
    assert a["tensors"].keys() == b["tensors"].keys()
    assert all(torch.equal(tensor, b["tensors"][name]) for name, tensor in a["tensors"].items())


OPTIONS = [
    [],
    ["--training.dtype=bfloat16", "--optimizer.state_dtype=float32"],
    *slow(
        ["--optimizer.implementation=foreach"],
        ["--optimizer.state_dtype=bfloat16"],
        ["--activation_checkpoint.mode=full"],
        ["--model.flavor=flux2-tiny"],
    ),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_run_is_the_plain_one_bit_for_bit(tmp_path, options):
    plain = train(tmp_path / "plain", *FLAGS, *options)
    assert_equal_runs(train(tmp_path / "own", *FLAGS, *options, IN_BACKWARD), plain)
    assert min(line["grad_norm"] for line in plain["lines"]) > 0


def both(folder, *flags):
    return train(folder / "plain", *flags), train(folder / "own", *flags, IN_BACKWARD)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, ["--training.local_batch_size=2"]),
        (2, ["--training.local_batch_size=2", "--optimizer.state_dtype=bfloat16"]),
        (2, ["--parallelism.tensor_parallel_degree=2"]),
        (4, ["--training.local_batch_size=2", "--parallelism.data_parallel_replicate_degree=2"]),
    ],
    ids=str,
)
def test_on_a_mesh_too(tmp_path, ranks, flags):
    if "replicate" in str(flags):
        flags = ["--training.global_batch_size=8", *flags]
    for plain, own in run_ranks(ranks, both, tmp_path, *FLAGS, *flags, timeout=60):
        assert_equal_runs(own, plain)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path):
    flags = [*FLAGS, IN_BACKWARD, "--optimizer.state_dtype=bfloat16", "--checkpoint.enable"]
    whole = train(tmp_path / "whole", *flags)
    train(tmp_path / "parts", *flags, "--training.steps=2", "--lr_scheduler.total_steps=6")
    parts = train(tmp_path / "parts", *flags)
    assert_equal_runs(parts, whole)


def test_no_two_gradients_are_there_at_once():
    """Beside weights and state, the peak of backward holds one layer's gradients and not all four."""
    width, peaks = 256, []
    for in_backward in (False, True):
        model = net(width)
        optimizer = build_optimizer(model.named_parameters(), Optimizer())
        present = [*model.parameters(), *optimizer_tensors(optimizer, model.named_parameters()).values()]
        if in_backward:
            StepInBackward(optimizer, model.named_parameters())
        with Alive() as alive:
            for tensor in present:
                alive.watch(tensor)
            before = alive.now()
            model(torch.ones(1, width)).sum().backward()
        peaks.append(alive.peak - before)
        assert all((p.grad is None) == in_backward for p in model.parameters())
    layer = 4 * width * (width + 1)
    assert peaks[0] >= 4 * layer
    assert peaks[1] < 1.1 * layer


def test_what_is_not_finite_stays_as_it_is_and_is_counted():
    model = net()
    optimizer = build_optimizer(model.named_parameters(), Optimizer(lr=0.1))
    own = StepInBackward(optimizer, model.named_parameters())
    before = [p.detach().clone() for p in model.parameters()]
    model[1].weight.register_hook(lambda grad: grad * torch.nan)
    model(torch.ones(1, 5)).sum().backward()
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(p, old) == (name == "1.weight"), name
    assert optimizer.state[model[1].weight]["step"] == 0
    assert not clip_grad_norm(dict(model.named_parameters()), 0.0, freed=own.norms).isfinite()


def test_a_run_of_broken_gradients_keeps_its_weights_and_counts_every_step(tmp_path):
    class Broken(TinyTrainer):
        def loss(self, output, micro_batch):
            return super().loss(output, micro_batch) * torch.nan

    trainer = Broken(tiny_config(tmp_path, *FLAGS, IN_BACKWARD, "--training.steps=3"))
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    with pytest.raises(SkippedTooOften, match="Each step up to step 3 was skipped"):
        trainer.train()
    assert trainer.guard.skipped == 3
    assert all(torch.equal(before[name], p) for name, p in trainer.parameters.items())
