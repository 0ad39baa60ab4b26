"""Every mesh computes the same training: one table of meshes, each compared with a single process.

A run of 20 steps with accumulation, caption dropout, clipping that bites, EMA and random weights everywhere,
then validation and pictures. A new parallelism is a new row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.referring import referring_flags, write_referring
from helpers.tiny_run import TinyTrainer, lines, tiny_config
from PIL import Image
from torch import Tensor

from flux_trainer.runtime.layout import boxes, local, native_shape

STEPS = 20


@dataclass(frozen=True)
class Row:
    """A mesh, by the degrees that are not 1."""

    shard: int = 1
    replicate: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    more: dict[str, Any] = field(default_factory=dict)
    refers: bool = False
    """Whether samples have reference images, of different numbers and sizes."""

    @property
    def ranks(self) -> int:
        return prod((self.shard, self.replicate, self.cp, self.tp, self.pp))

    @property
    def flavor(self) -> str:
        return self.more.get("model.flavor", "flux-tiny")

    def flags(self) -> list[str]:
        settings = {
            "parallelism.data_parallel_shard_degree": self.shard,
            "parallelism.data_parallel_replicate_degree": self.replicate,
            "parallelism.context_parallel_degree": self.cp,
            "parallelism.tensor_parallel_degree": self.tp,
            "parallelism.pipeline_parallel_degree": self.pp,
            # Where every rank has all samples, fewer and larger micro-batches save a third of the time.
            "training.local_batch_size": 4 if self.shard == self.replicate == self.pp == 1 else 2,
            **self.more,
        }
        return [f"--{key}={value}" for key, value in settings.items()]

    def __str__(self) -> str:
        names = ("shard", "replicate", "cp", "tp", "pp")
        degrees = [f"{name}{getattr(self, name)}" for name in names if getattr(self, name) > 1]
        words = [*degrees, *(str(v) for v in self.more.values()), *(["references"] if self.refers else [])]
        return "-".join(words) or "one"


FLUX2 = {"model.flavor": "flux2-tiny"}


def method(name: str) -> dict[str, str]:
    return {"parallelism.context_parallel_method": name}


ROWS = [
    Row(shard=2),
    Row(shard=2, replicate=2),
    Row(cp=2, more=method("ring")),
    Row(cp=4, more=method("ulysses")),
    Row(shard=2, cp=2),
    Row(shard=2, tp=2),
    Row(cp=2, tp=2),
    Row(pp=2, shard=2),
    Row(shard=2, cp=2, more=FLUX2),
    Row(tp=2, more=FLUX2),
    Row(pp=2, more=FLUX2),
]
INTERLEAVED = {"parallelism.pipeline_parallel_schedule": "Interleaved1F1B"}
# In float64 alone, which tells the most.
MORE_ROWS = [
    *(Row(cp=2, more=method(name)) for name in ("ulysses", "allgather")),
    Row(cp=4, more=method("ring")),
    Row(shard=2, replicate=2, cp=2),
    Row(tp=2),
    Row(pp=2),
    Row(replicate=2),
    Row(cp=3),  # neither tokens nor heads divide
    Row(tp=4),
    Row(tp=2, replicate=2),
    Row(pp=2, more=INTERLEAVED),
    Row(pp=4),
    Row(pp=2, shard=2, more=INTERLEAVED),
    Row(pp=2, replicate=2),
    Row(pp=2, cp=2),
    Row(pp=2, tp=2),
    Row(shard=2, more=FLUX2),
    Row(replicate=2, shard=2, more=FLUX2),
    Row(cp=2, more=FLUX2),
    Row(pp=2, cp=2, more=FLUX2),
    Row(shard=2, more=FLUX2, refers=True),
    *(Row(cp=2, more=method(name), refers=True) for name in ("ulysses", "ring")),
    Row(tp=2, cp=2, more=FLUX2, refers=True),
    Row(pp=2, more=FLUX2, refers=True),
    Row(pp=2, cp=2, refers=True),
]


class Recorder(TinyTrainer):
    """Keeps the gradients of the first step as they are before clipping."""

    first_gradients: dict[str, Any]

    def forward_backward(self, micro_batches):
        loss = super().forward_backward(micro_batches)
        if not hasattr(self, "first_gradients"):
            self.first_gradients = {
                name: parts(p.grad, self.layouts.get(name)) for name, p in self.parameters.items()
            }
        return loss


def parts(tensor: Tensor, layout) -> tuple[torch.Size, list[tuple[tuple[int, ...], Tensor]]]:
    """The native shape, and what this rank holds: (offset in the native tensor, values)."""
    held = [(box.offsets, box.of(local(tensor)).clone()) for box in boxes(tensor, layout)]
    return native_shape(tensor, layout), held


def run(folder: Path, dtype: str, *flags: str) -> dict[str, Any]:
    """Train on this rank; losses and norms by step, and parts of gradients and parameters."""
    settings = {
        "training.steps": STEPS,
        "training.local_batch_size": 2,
        "training.img_size": 32,
        "encoder.max_t5_encoding_len": 5,
        "training.dtype": "float32" if dtype == "bfloat16" else dtype,
        "training.mixed_precision_param": dtype,
        "training.mixed_precision_reduce": "float32" if dtype == "bfloat16" else dtype,
        "optimizer.lr": 1e-3,
        "validation.enable": "true" if dtype == "float64" else "false",  # compared there only
        "validation.freq": STEPS,
        "validation.timesteps": 2,
        "validation.denoising_steps": 2,
        "validation.prompts": "a,b,c",
        "validation.local_batch_size": 2,
        "validation.sources.0.type": "synthetic",
        "validation.sources.0.size": 5,
    }
    given = [*(f"--{key}={value}" for key, value in settings.items()), *flags]
    trainer = Recorder(tiny_config(folder, *given))
    trainer.train()
    return {
        "lines": lines(trainer.dump_folder),
        "gradients": trainer.first_gradients,
        "parameters": {n: parts(p, trainer.layouts.get(n)) for n, p in trainer.parameters.items()},
    }


def whole(ranks: list[dict[str, Any]], what: str) -> dict[str, Tensor]:
    """Native tensors put together from the parts of all ranks, which must agree where they overlap."""
    tensors: dict[str, Tensor] = {}
    for rank in ranks:
        for name, (shape, held) in rank[what].items():
            tensor = tensors.setdefault(name, torch.full(shape, torch.nan, dtype=torch.float64))
            for offsets, values in held:
                place = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))]
                known = ~place.isnan()
                assert torch.equal(place[known], values.double()[known]), name
                place.copy_(values)
    assert not any(tensor.isnan().any() for tensor in tensors.values())
    return tensors


def column(result: dict[str, Any], key: str) -> list[float]:
    return [line[key] for line in result["lines"] if key in line]


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest difference, in units of each tensor's largest entry."""
    assert got.keys() == want.keys()
    return max(((got[k] - want[k]).abs().max() / want[k].abs().max()).item() for k in want)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The runs of one process, by dtype and flavor."""
    results: dict[tuple[str, str, bool], Any] = {}

    def of(dtype: str, flavor: str = "flux-tiny", refers: bool = False) -> tuple[dict[str, Any], Path]:
        key = (dtype, flavor, refers)
        if key not in results:
            folder = tmp_path_factory.mktemp(dtype)
            results[key] = (on(1, folder, dtype, refers, f"--model.flavor={flavor}")[0], folder)
        return results[key]

    return of


def on(ranks: int, folder: Path, dtype: str, refers: bool, *flags: str) -> list[dict[str, Any]]:
    """`run` on so many ranks."""
    if refers:
        write_referring(folder / "data")
        flags += tuple(referring_flags(folder / "data"))
    return run_ranks(ranks, run, folder, dtype, *flags, timeout=60)


def compare(row: Row, dtype: str, single, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any], Path]:
    one, one_folder = single(dtype, row.flavor, row.refers)
    return on(row.ranks, folder, dtype, row.refers, *row.flags()), one, one_folder


@pytest.mark.distributed
@pytest.mark.mesh
@pytest.mark.parametrize("row", [*ROWS, *MORE_ROWS], ids=str)
def test_float64(row, single, tmp_path):
    """Gradients, norms, parameters, validation and pictures."""
    ranks, one, one_folder = compare(row, "float64", single, tmp_path)
    assert min(column(one, "grad_norm")) > 0.01, "clipping bites"
    assert worst(whole(ranks, "gradients"), whole([one], "gradients")) <= 1e-11
    assert worst(whole(ranks, "parameters"), whole([one], "parameters")) <= 1e-10
    for key in ("loss", "grad_norm", "validation_loss", "ema_validation_loss"):
        assert column(ranks[0], key) == pytest.approx(column(one, key), rel=1e-10), key
    for name in ("step-00.png", f"ema_step-{STEPS}.png"):
        got, want = (Image.open(path / "run/img" / name).tobytes() for path in (tmp_path, one_folder))
        assert got == want


@pytest.mark.distributed
@pytest.mark.mesh
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_float32(row, single, tmp_path):
    ranks, one, _ = compare(row, "float32", single, tmp_path)
    data_only = row.cp == row.tp == row.pp == 1
    tolerance = 1e-6 if data_only else 1e-5  # relative: the losses lie between 3 and 18
    assert column(ranks[0], "loss") == pytest.approx(column(one, "loss"), rel=tolerance)
    assert worst(whole(ranks, "gradients"), whole([one], "gradients")) <= 1e-5


@pytest.mark.distributed
@pytest.mark.mesh
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_bfloat16_follows_the_float32_curve(row, single, tmp_path):
    ranks = on(row.ranks, tmp_path, "bfloat16", row.refers, *row.flags())
    want = torch.tensor(column(single("float32", row.flavor)[0], "loss"))
    error = (torch.tensor(column(ranks[0], "loss")) - want).abs() / want
    assert error.max() < 0.02


ELASTIC = [
    (Row(cp=2, tp=2), Row(shard=2)),
    (Row(shard=2, replicate=2), Row(tp=2)),
    (Row(tp=2), Row()),
    (Row(pp=2), Row(shard=2, cp=2)),
    (Row(cp=2), Row(pp=2)),
]


@pytest.mark.distributed
@pytest.mark.mesh
@pytest.mark.parametrize("rows", ELASTIC, ids=lambda rows: f"{rows[0]}-to-{rows[1]}")
def test_a_checkpoint_goes_on_on_any_other_mesh(rows, single, tmp_path):
    """Half of the steps on one mesh, half on another, optimizer state and EMA included."""
    first, second = rows
    half = [f"--training.steps={STEPS // 2}", f"--lr_scheduler.total_steps={STEPS}", "--checkpoint.enable"]
    run_ranks(first.ranks, run, tmp_path, "float64", *first.flags(), *half, timeout=60)
    flags = [*second.flags(), "--checkpoint.enable"]
    ranks = run_ranks(second.ranks, run, tmp_path, "float64", *flags, timeout=60)
    one, _ = single("float64")
    assert worst(whole(ranks, "parameters"), whole([one], "parameters")) <= 1e-10
    for key in ("loss", "grad_norm", "ema_validation_loss"):
        assert column(ranks[0], key)[-1] == pytest.approx(column(one, key)[-1], rel=1e-10), key
