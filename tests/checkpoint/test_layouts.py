"""Files are native whatever the mesh: names, shapes and row order of one process's, for any other to read."""

import zlib
from pathlib import Path

import pytest
import torch
from helpers.marks import slow
from helpers.ranks import run_ranks
from helpers.small_model import small
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from flux_trainer.checkpoint.errors import CheckpointError
from flux_trainer.checkpoint.load import load_model
from flux_trainer.checkpoint.manager import CheckpointManager
from flux_trainer.checkpoint.metadata import read_metadata
from flux_trainer.checkpoint.tensors import read_tensors, total_bytes
from flux_trainer.config.schema import Checkpoint, Optimizer
from flux_trainer.models.flux1 import Flux1Model
from flux_trainer.optim.build import build_optimizer, optimizer_tensors
from flux_trainer.optim.ema import EMA
from flux_trainer.parallel.fsdp import shard
from flux_trainer.parallel.tensor import tensor_parallel
from flux_trainer.runtime.dist import init_distributed
from flux_trainer.runtime.layout import Layout

pytestmark = pytest.mark.distributed

CONFIG = small(
    in_channels=8,
    out_channels=7,  # rows that do not divide
    vec_in_dim=6,
    context_in_dim=6,
    hidden_size=24,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(2, 2, 2),
)
Mesh = tuple[int, int, int]
"""dp_replicate, fsdp, tp."""
ONE, FSDP3, TP2, FSDP2_TP2, HSDP_TP2 = (1, 1, 1), (1, 3, 1), (1, 1, 2), (1, 2, 2), (2, 2, 2)


def ranks_of(mesh: Mesh) -> int:
    return mesh[0] * mesh[1] * mesh[2]


def build(mesh: Mesh) -> tuple[dict[str, Tensor], dict[str, Layout]]:
    """The tensors of a run on this rank, and the layouts."""
    with torch.device("meta"):
        model = Flux1Model(CONFIG)
    layouts = {}
    if ranks_of(mesh) > 1:
        ranks = init_device_mesh("cpu", mesh, mesh_dim_names=("dp_replicate", "fsdp", "tp"))
        layouts = tensor_parallel(model.blocks(), ranks["tp"].get_group())
        data = ranks["dp_replicate", "fsdp"] if mesh[0] > 1 else ranks["fsdp"]
        if data.size() > 1:
            shard(model, [block for _, block in model.blocks()], data)
    model.to_empty(device="cpu")
    named = dict(model.named_parameters())
    tensors = {name: p.detach() for name, p in named.items()}
    tensors |= optimizer_tensors(build_optimizer(named.items(), Optimizer()), named.items())
    tensors |= EMA(named.items(), 10, 0).tensors() | {"guard.skipped": torch.zeros(())}
    return tensors, layouts


def native(name: str, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator)


def natives() -> dict[str, Tensor]:
    return {name: native(name, tensor.shape) for name, tensor in build(ONE)[0].items()}


def held(name: str, tensor: Tensor, layouts: dict[str, Layout]) -> Tensor:
    """What this rank should hold: sections side by side, then one of FSDP's chunks of rows."""
    parameter = name.removeprefix("ema.").removeprefix("optimizer.state.")
    parameter = parameter.removesuffix(".exp_avg").removesuffix(".exp_avg_sq")
    if layout := layouts.get(parameter):
        whole = native(name, torch.Size(layout.shape))
        whole = torch.cat([whole.narrow(layout.dim, *section) for section in layout.sections], layout.dim)
    else:
        whole = native(name, tensor.shape)
    if isinstance(tensor, DTensor):
        shard_mesh = tensor.device_mesh["fsdp"]
        chunks = whole.chunk(shard_mesh.size())
        return chunks[shard_mesh.get_local_rank()] if shard_mesh.get_local_rank() < len(chunks) else whole[:0]
    return whole


def here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def make(folder: str, layouts: dict[str, Layout], **settings) -> CheckpointManager:
    return CheckpointManager(Checkpoint(enable=True, **settings), folder, init_distributed(20), layouts)


def save(folder: str, mesh: Mesh, mode: str = "disabled") -> int:
    tensors, layouts = build(mesh)
    for name, tensor in tensors.items():
        here(tensor).copy_(held(name, tensor, layouts))
    manager = make(folder, layouts, async_mode=mode)
    manager.save(1, tensors, {"step": 1})
    if mode == "async":
        for tensor in tensors.values():
            here(tensor).zero_()
    manager.close()
    return total_bytes(tensors, manager.group, layouts)


def load(folder: str, mesh: Mesh) -> None:
    tensors, layouts = build(mesh)
    manager = make(folder, layouts)
    for tensor in tensors.values():
        here(tensor).fill_(float("nan"))
    assert manager.resume(tensors, {}) == {"step": 1}
    for name, tensor in tensors.items():
        assert torch.equal(here(tensor), held(name, tensor, layouts)), name
    weights = {
        name: tensor for name, tensor in tensors.items() if not name.startswith(("opt", "ema", "guard"))
    }
    for tensor in weights.values():
        here(tensor).zero_()
    load_model(Path(folder) / "checkpoint/step-1", weights, manager.group, layouts)
    for name, tensor in weights.items():
        assert torch.equal(here(tensor), held(name, tensor, layouts)), name
    manager.close()


def folder_of(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint" / "step-1"


@pytest.mark.parametrize(
    ("mesh", "mode"),
    [
        (ONE, "disabled"),
        (FSDP2_TP2, "async"),
        *slow((TP2, "disabled"), (TP2, "async"), (HSDP_TP2, "disabled")),
    ],
    ids=str,
)
def test_files_hold_what_one_process_would_write(tmp_path, mesh, mode):
    sizes = run_ranks(ranks_of(mesh), save, str(tmp_path), mesh, mode)
    want = natives()
    assert set(sizes) == {total_bytes(want, None)}, "what is asked of the disk does not depend on the mesh"
    table = read_metadata(folder_of(tmp_path)).state_dict_metadata
    assert {name: entry.size for name, entry in table.items()} == {n: t.shape for n, t in want.items()}
    written = sum(file.stat().st_size for file in folder_of(tmp_path).glob("*.distcp"))
    chunks = sum(len(entry.chunks) for entry in table.values())
    elements = sum(tensor.numel() * 4 for tensor in want.values())
    assert 1000 < (written - elements) / chunks < 2000, "each element once, and a frame per chunk"
    got = {name: torch.zeros_like(tensor) for name, tensor in want.items()}
    read_tensors(folder_of(tmp_path), got, None)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [(TP2, FSDP3), (FSDP3, FSDP2_TP2), *slow((ONE, TP2), (TP2, ONE), (FSDP2_TP2, TP2), (FSDP2_TP2, FSDP3))],
    ids=str,
)
def test_any_mesh_reads_what_any_other_wrote(tmp_path, saved, loaded):
    run_ranks(ranks_of(saved), save, str(tmp_path), saved)
    run_ranks(ranks_of(loaded), load, str(tmp_path), loaded)


def stage(tensors: dict[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """Some names for each rank, and a scalar that all of them have."""
    names = sorted(tensors)
    return {name: tensors[name] for name in {*names[rank::size], "guard.skipped"}}


def save_stage(folder: str) -> int:
    world = init_distributed(20)
    tensors = stage(natives(), world.rank, world.size)
    manager = make(folder, {}, async_mode="async")
    manager.save(1, tensors, {"step": 1})
    manager.close()
    return total_bytes(tensors, manager.group)


def load_stage(folder: str) -> None:
    world = init_distributed(20)
    want = stage(natives(), world.rank, world.size)
    got = {name: torch.zeros_like(tensor) for name, tensor in want.items()}
    assert make(folder, {}).resume(got, {}) == {"step": 1}
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_ranks_may_hold_different_names(tmp_path):
    """As the stages of a pipeline do: 3 write, 2 read, then one with all names, then 2 x 2."""
    sizes = run_ranks(3, save_stage, str(tmp_path))
    assert len(set(sizes)) == 1
    assert 0 <= sizes[0] / total_bytes(natives(), None) - 1 < 0.01, "only the scalar is counted thrice"
    run_ranks(2, load_stage, str(tmp_path))
    run_ranks(1, load, str(tmp_path), ONE)
    run_ranks(4, load, str(tmp_path), FSDP2_TP2)


def load_wrongly(folder: str, mistake: str) -> str:
    world = init_distributed(20)
    tensors = stage(natives(), world.rank, world.size)
    if world.rank == 1:
        name = min(tensors)
        if mistake == "dtype":
            tensors[name] = tensors[name].double()
        elif mistake == "absent":
            del tensors[name]
        else:
            tensors["new"] = torch.zeros(3)
    try:
        make(folder, {}).resume(tensors, {})
    except CheckpointError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [("dtype", "float32, here torch.float64"), ("absent", "is not in this run"), ("new", "new is missing")],
)
def test_a_stage_that_does_not_fit_stops_all_ranks(tmp_path, mistake, sentence):
    run_ranks(2, save_stage, str(tmp_path))
    first, second = run_ranks(2, load_wrongly, str(tmp_path), mistake)
    assert first == second
    assert sentence in first


def test_a_model_of_another_width_is_told_by_its_native_shapes(tmp_path):
    run_ranks(2, save, str(tmp_path), TP2)
    want = {"single_blocks.0.linear1.bias": torch.zeros(121)}
    with pytest.raises(CheckpointError, match=r"linear1.bias has shape \[120\], here \[121\]"):
        read_tensors(folder_of(tmp_path), want, None)
    with pytest.raises(CheckpointError, match="is not in this model"):
        load_model(folder_of(tmp_path), want)
