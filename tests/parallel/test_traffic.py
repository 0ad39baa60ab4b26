"""What a rank sends in a step, counted, against the formulas of `parallel/traffic.py`: to the byte.

Where there is no pipeline, the rank is one of a fake world: its step is the real one, with nobody to talk to.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers.fake_world import fake_world
from helpers.marks import slow
from helpers.ranks import run_ranks
from helpers.sent import Sent
from helpers.small_model import inputs, small, small2
from helpers.tiny_run import TinyTrainer, tiny_config, write_assets
from torch import Tensor

from flux_trainer.data.loader import TrainLoader
from flux_trainer.data.samples import Batch
from flux_trainer.encoders.footprint import footprint
from flux_trainer.models import registry
from flux_trainer.parallel.arithmetic import tokens
from flux_trainer.parallel.estimate import parts, plan
from flux_trainer.parallel.traffic import KINDS, traffic
from flux_trainer.trainer import Trainer

MODELS = {"flux-tiny": small(), "flux2-tiny": small2(in_channels=16)}

DEGREES = {
    "replicate": "data_parallel_replicate_degree",
    "shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
}


def flags(mesh: dict, micro: int, **more: str) -> list[str]:
    """Settings of a mesh by its degrees, with `micro` local batches of two 32-px images in a step."""
    groups = mesh.get("replicate", 1) * mesh.get("shard", 1)
    settings = {
        **{f"parallelism.{DEGREES[name]}": degree for name, degree in mesh.items()},
        "encoder.max_llm_encoding_len": 4,
        "training.img_size": 32,
        "training.local_batch_size": 2,
        "training.global_batch_size": 2 * micro * groups,
        "training.dtype": "float32",
        "training.mixed_precision_param": "bfloat16",
        "training.mixed_precision_reduce": "float32",
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return [f"--{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With the encoders' files, which ranks would otherwise write at once."""
    path = tmp_path_factory.mktemp("traffic")
    write_assets(path)
    return path


class RandomInputs(Trainer):
    """Trains a model of either family on numbers without meaning."""

    def build_model(self):
        model = registry.build(self.config.model.name, self.config.model.flavor)
        return model, model.init_distributions()

    def build_loader(self, start_draw: int) -> TrainLoader:
        raise AssertionError("no data are asked for")

    def micro_batches(self, batch: Batch) -> list[dict[str, Tensor]]:
        raise AssertionError("no data are asked for")

    def inputs(self, micro_batch: dict[str, Tensor]) -> dict[str, Tensor | None]:
        given = dict(micro_batch)
        if context := self.parallel.context:
            context.begin(*reversed(self.tokens_per_sample()))
            streams = ("image", "image_ids", "text", "text_ids")
            given |= zip(streams, context.split(*(given[name] for name in streams)), strict=True)
        return self.parallel.parts[0].arguments(**given)

    def loss(self, output: Tensor, micro_batch: dict[str, Tensor]) -> Tensor:
        return output.float().square().sum()

    def work(self, micro_batch: dict[str, Tensor]) -> tuple[int, int]:
        return 1, 1

    def tokens_per_sample(self) -> tuple[int, int]:
        return tokens(self.config)


@patch.dict(registry.FLAVORS, MODELS)
def one_step(folder: Path, settings: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by kind that this rank sends in a step, and those that are foreseen."""
    config = tiny_config(folder, *settings)
    trainer = RandomInputs(config)
    p = plan(config, dist.get_world_size())
    image, text = p.tokens
    micro_batches = [
        inputs(p.model, p.batch, image=image, text=text, dtype=torch.float32) for _ in range(p.micro_batches)
    ]
    trainer.forward_backward(micro_batches)  # a pipeline's neighbours exchange shapes in the first step
    with Sent() as sent:
        trainer.forward_backward(micro_batches)
    counted = Counter(dict.fromkeys(KINDS, 0))
    for (kind, group), size in sent.bytes.items():
        if kind == "send":
            kind = "pipeline" if trainer.mesh.pp and group == trainer.mesh.pp.group_name else "ring"
        counted[kind] += size
    stages = parts(p, trainer.mesh.coordinates["pp"], trainer.mesh)
    return dict(counted), traffic(p, stages, config.activation_checkpoint)


def test_the_text_encoders_weights_are_foreseen(folder):
    """Two ranks encode 4 local batches each, and send what the other lacks of T5 for each."""
    config = tiny_config(folder, *flags({"shard": 2}, 4))
    with fake_world(2):
        trainer = TinyTrainer(config)
        loader = trainer.build_loader(0)
        batch = next(loader)
        with Sent() as sent:
            trainer.micro_batches(batch)
        loader.close()
    share = footprint(config.encoder, 2, 2, 32).t5
    assert plan(config, 2).encoder_calls == 4
    assert sum(sent.bytes.values()) == 4 * share


CP_METHODS = ("ulysses", "ring", "allgather")
FULL = {"activation_checkpoint__mode": "full"}
SELECTIVE = {"activation_checkpoint__mode": "selective"}
ATTENTION = {"activation_checkpoint__mode": "attention"}
BY_KIND = {**FULL, "activation_checkpoint__single_blocks": "attention"}
EVERY_SECOND = {**SELECTIVE, "activation_checkpoint__selective_ac_option": "2"}
NEVER = {"parallelism__fsdp_reshard_after_forward": "never"}
ALWAYS = {"parallelism__fsdp_reshard_after_forward": "always"}
INTERLEAVED = {"parallelism__pipeline_parallel_schedule": "Interleaved1F1B"}


FLUX2 = {"model__flavor": "flux2-tiny"}


def by(method: str) -> dict[str, str]:
    return {"parallelism__context_parallel_method": method}


# Mesh, local batches in a step, other settings.
ROWS: list[tuple[dict[str, int], int, dict[str, str]]] = [
    ({}, 2, {}),
    ({"shard": 2}, 1, {}),
    ({"shard": 3}, 2, FULL),  # rows that do not divide
    ({"shard": 2}, 3, NEVER),
    ({"replicate": 2}, 2, {}),
    ({"replicate": 2, "shard": 2}, 1, {}),
    ({"replicate": 2, "shard": 2}, 3, SELECTIVE),
    *(({"cp": cp}, 1, by(method)) for cp in (2, 4) for method in CP_METHODS),
    *(({"cp": 2}, 2, by(method) | mode) for method in CP_METHODS for mode in (FULL, SELECTIVE)),
    ({"tp": 2}, 1, {}),
    ({"tp": 4}, 2, {}),
    *(({"tp": 2}, 2, mode) for mode in (FULL, SELECTIVE, BY_KIND)),
    ({"shard": 2, "cp": 2}, 2, {}),
    ({"shard": 2, "tp": 2}, 2, {}),
    *(({"cp": 2, "tp": 2}, 1, by(method)) for method in CP_METHODS),
    ({"replicate": 2, "shard": 2, "cp": 2}, 2, {}),
    ({"replicate": 2, "shard": 2, "cp": 2, "tp": 2}, 2, SELECTIVE),
    ({"tp": 2}, 2, FLUX2 | ATTENTION),
    ({"replicate": 2, "shard": 2, "cp": 2, "tp": 2}, 2, FLUX2 | SELECTIVE),
]
MORE_ROWS: list[tuple[dict[str, int], int, dict[str, str]]] = [
    *(({"cp": 2}, 2, by(method) | mode) for method in CP_METHODS for mode in (EVERY_SECOND, ATTENTION)),
    *(({"tp": 2}, 2, mode) for mode in (EVERY_SECOND, ATTENTION)),
    ({"shard": 3}, 2, FLUX2 | FULL),
    *(({"tp": 2}, 2, FLUX2 | mode) for mode in ({}, FULL, SELECTIVE, EVERY_SECOND)),
    *(({"cp": 2, "tp": 2}, 1, FLUX2 | by(method)) for method in CP_METHODS),
]
PIPELINES: list[tuple[dict[str, int], int, dict[str, str]]] = [
    ({"pp": 2}, 2, {}),
    ({"pp": 2}, 4, INTERLEAVED),
    ({"pp": 2, "cp": 2}, 2, FLUX2 | INTERLEAVED),
]
MORE_PIPELINES: list[tuple[dict[str, int], int, dict[str, str]]] = [
    ({"pp": 2, "shard": 2}, 2, {}),
    ({"pp": 2, "shard": 2}, 3, ALWAYS),
    ({"pp": 2, "cp": 2}, 2, by("ring") | FULL),
]


def name(row: tuple[dict[str, int], int, dict[str, str]]) -> str:
    mesh, micro, more = row
    return "-".join([*(f"{key}{degree}" for key, degree in mesh.items()), f"x{micro}", *more.values()])


@pytest.mark.parametrize("row", [*ROWS, *slow(*((row,) for row in MORE_ROWS))], ids=name)
def test_every_byte_is_foreseen(row, folder):
    mesh, micro, more = row
    with fake_world(prod(mesh.values())):
        counted, foreseen = one_step(folder, flags(mesh, micro, **more))
    assert counted == foreseen
    assert any(counted.values()) == bool(mesh)


@pytest.mark.distributed
@pytest.mark.parametrize("row", [*PIPELINES, *slow(*((row,) for row in MORE_PIPELINES))], ids=name)
def test_every_byte_of_a_pipeline_is_foreseen(row, folder):
    mesh, micro, more = row
    for counted, foreseen in run_ranks(prod(mesh.values()), one_step, folder, flags(mesh, micro, **more)):
        assert counted == foreseen
        assert counted["pipeline"]
