"""Checkpoints of several ranks: read by any other number, replicas written once, errors and losses shared."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.marks import slow
from helpers.ranks import run_ranks
from torch import Tensor

from flux_trainer.checkpoint.errors import CheckpointError
from flux_trainer.checkpoint.manager import CheckpointManager
from flux_trainer.config.schema import Checkpoint

pytestmark = pytest.mark.distributed

SHAPES = {
    "img_in.weight": (6, 4),
    "txt_in.bias": (5,),  # not divisible by 2 or 4 ranks
    "norm.scale": (3,),  # fewer rows than 4 ranks: one of them holds nothing
    "final.weight": (1, 2),
}


def whole(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(SHAPES[name], generator=generator)


def make_mesh(replicas: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    size = int(os.environ["WORLD_SIZE"])
    if replicas == 1:
        return init_device_mesh("cpu", (size,))
    return init_device_mesh("cpu", (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))


def make_tensors(replicas: int, zero: bool = False) -> dict[str, Tensor]:
    """FSDP2's own DTensors of every shape, a plain scalar, and a float32 average of a bf16 parameter."""
    from torch.distributed.fsdp import fully_shard

    module = torch.nn.ParameterDict({n.replace(".", "/"): torch.nn.Parameter(whole(n)) for n in SHAPES})
    fully_shard(module, mesh=make_mesh(replicas))
    tensors: dict[str, Tensor] = {n.replace("/", "."): p for n, p in module.named_parameters()}
    tensors |= {f"ema.{name}": p.detach() * 2 for name, p in tensors.items()}
    tensors |= {
        f"optimizer.state.{name}.exp_avg": p.detach().bfloat16()
        for name, p in tensors.items()
        if "ema" not in name
    }
    tensors["optimizer.state.img_in.weight.step"] = torch.tensor(9.0)
    if zero:
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.zero_()
    return tensors


def make(folder: str, **settings: Any) -> tuple[Any, CheckpointManager]:
    from flux_trainer.runtime.dist import init_distributed

    world = init_distributed(20)
    return world, CheckpointManager(Checkpoint(enable=True, **settings), folder, world)


def save(folder: str, replicas: int, mode: str) -> list[int]:
    """Save step 1; returns the sizes of the ranks' files."""
    world, manager = make(folder, async_mode=mode)
    tensors = make_tensors(replicas)
    manager.save(1, tensors, {"step": 1, "identity": {"seed": 3}})
    if mode == "async":
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.zero_()
    manager.close()
    return [os.path.getsize(f"{folder}/checkpoint/step-1/__{rank}_0.distcp") for rank in range(world.size)]


def load(folder: str, replicas: int) -> None:
    from torch.distributed.tensor import DTensor

    _, manager = make(folder)
    tensors = make_tensors(replicas, zero=True)
    kept = dict(tensors)
    assert manager.resume(tensors, {"seed": 3}) == {"step": 1, "identity": {"seed": 3}}
    assert all(tensors[name] is tensor for name, tensor in kept.items())
    for name, tensor in tensors.items():
        got = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if name.endswith(".step"):
            assert got.item() == 9
        elif name.startswith("ema."):
            assert torch.equal(got, whole(name[4:]) * 2), name
        elif name.startswith("optimizer."):
            assert torch.equal(got, whole(name[len("optimizer.state.") : -len(".exp_avg")]).bfloat16()), name
        else:
            assert torch.equal(got, whole(name)), name
    manager.close()


@pytest.mark.parametrize(
    ("saved", "loaded", "mode"),
    [
        ((2, 1), (1, 1), "async"),
        ((4, 1), (2, 1), "disabled"),
        ((2, 1), (4, 2), "disabled"),
        *slow(((1, 1), (2, 1), "disabled"), ((4, 2), (4, 1), "async"), ((4, 2), (1, 1), "disabled")),
    ],
    ids=str,
)
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path, saved, loaded, mode):
    """(ranks, replicas) to (ranks, replicas); (4, 2) is HSDP on a 2 x 2 mesh."""
    run_ranks(saved[0], save, str(tmp_path), saved[1], mode)
    run_ranks(loaded[0], load, str(tmp_path), loaded[1])


def test_replicas_are_written_once_and_by_all_ranks(tmp_path):
    alone = sum(run_ranks(2, save, str(tmp_path / "fsdp"), 1, "disabled")[0])
    sizes = run_ranks(4, save, str(tmp_path / "hsdp"), 2, "disabled")[0]
    assert abs(sum(sizes) / alone - 1) < 0.05
    assert min(sizes) > 0


def fail_on_rank_1(folder: str, mode: str) -> str:
    """A write error of rank 1 alone."""
    import resource

    world, manager = make(folder, async_mode=mode)
    tensors = {"weight": torch.zeros(world.size, 5000)}
    manager.save(1, tensors, {"step": 1})
    manager.wait()
    tensors = make_tensors(1)
    if world.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        manager.save(2, tensors, {"step": 2})
        manager.wait()
    except CheckpointError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_one_ranks_error_reaches_all(tmp_path, mode):
    first, second = run_ranks(2, fail_on_rank_1, str(tmp_path), mode)
    assert first == second
    assert "rank 1: [Errno 27] File too large" in first
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-1"]


def resume_after_damage(folder: str) -> tuple[int, str]:
    _, manager = make(folder)
    tensors = {"weight": torch.zeros(3)}
    state = manager.resume(tensors, {})
    assert state is not None
    assert tensors["weight"].eq(state["step"]).all()
    manager.close()
    return state["step"], ",".join(sorted(path.name for path in manager.folder.iterdir()))


def save_steps(folder: str) -> None:
    _, manager = make(folder)
    for step in (1, 2):
        manager.save(step, {"weight": torch.full((3,), float(step))}, {"step": step})
    manager.close()


def test_all_ranks_fall_back_together(tmp_path):
    run_ranks(2, save_steps, str(tmp_path))
    path = tmp_path / "checkpoint" / "step-2" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    assert run_ranks(3, resume_after_damage, str(tmp_path)) == [(1, "step-1,step-2.damaged")] * 3


def lose_rank_1(folder: str, mode: str) -> str:
    """Rank 1 dies in the middle of the save; returns what rank 0 learns, and leaves what it leaves."""
    from flux_trainer.checkpoint import tensors as tensors_module
    from flux_trainer.runtime.dist import PeerLost

    world, manager = make(folder, async_mode=mode)
    values = make_tensors(1)
    manager.save(1, values, {"step": 1, "identity": {"seed": 3}})
    manager.wait()
    if world.rank == 1:
        tensors_module._Writer.write_data = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        manager.save(2, values, {"step": 2})
        manager.close()
    except PeerLost as error:
        assert time.monotonic() - began < 10
        return str(error)
    return "no error"


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_rank_that_dies_during_a_save_is_noticed_and_nothing_is_kept(tmp_path, mode):
    message = run_ranks(2, lose_rank_1, str(tmp_path), mode, lost={1})[0]
    assert "noticed while writing" in message
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-1"]
    run_ranks(1, load, str(tmp_path), 1)


def train_beside(folder: str) -> int:
    """Collectives of the training loop run while the writing thread uses its own group."""
    import torch.distributed as dist

    world, manager = make(folder, async_mode="async")
    values = make_tensors(1)
    beside = 0
    for step in range(1, 6):
        manager.save(step, values, {"step": step})
        writing = torch.ones(1)
        while writing.item():
            beside += 1
            writing.fill_(not manager._writing.done())
            dist.all_reduce(writing, dist.ReduceOp.MIN)
            world.sum([1.0])
    manager.close()
    return beside


def test_training_goes_on_beside_the_writing_thread(tmp_path):
    assert min(run_ranks(2, train_beside, str(tmp_path))) >= 1
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == [
        f"step-{n}" for n in range(1, 6)
    ]


def test_checkpoint_of_a_process_without_a_group(tmp_path):
    """Tools read a checkpoint in one plain process."""
    from flux_trainer.checkpoint.load import load_model

    run_ranks(2, save, str(tmp_path), 1, "disabled")
    got = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    load_model(Path(tmp_path) / "checkpoint" / "step-1", got)
    for name in SHAPES:
        assert torch.equal(got[name], whole(name))
