"""Pictures from weights: encode the prompts, draw on a mesh, write each picture when it is done.

The text encoders leave the memory before the transformer enters it: no moment holds both.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from dataclasses import asdict
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from flux_trainer.checkpoint.errors import on_first
from flux_trainer.config.compute import ActivationCheckpoint
from flux_trainer.config.pictures import Order, Request, metadata
from flux_trainer.config.schema import JobConfig
from flux_trainer.config.shared import of_pictures
from flux_trainer.data.reference import published_side
from flux_trainer.encoders.bundle import Codec
from flux_trainer.encoders.choose import kind_of, text_encoders
from flux_trainer.encoders.text import TextFeatures
from flux_trainer.flow.latents import LatentSpace
from flux_trainer.hub.load import load_weights
from flux_trainer.hub.weights import open_weights
from flux_trainer.metrics.pictures import grid, thumbnail, to_image
from flux_trainer.metrics.progress import Progress
from flux_trainer.models import registry
from flux_trainer.models.backends import check_backend
from flux_trainer.models.configs import ModelConfig
from flux_trainer.parallel.apply import Parallel, parallelize
from flux_trainer.parallel.arithmetic import tokens
from flux_trainer.parallel.mesh import DataGroup, Mesh, build_mesh, data_group
from flux_trainer.parallel.stages import STAGES_PER_RANK
from flux_trainer.runtime import peers
from flux_trainer.runtime.agree import check_agreement
from flux_trainer.runtime.dist import init_distributed, set_deterministic
from flux_trainer.runtime.log import logger
from flux_trainer.sample import (
    Round,
    batch_of,
    draw,
    encode_prompts,
    encode_references,
    reference_encoder,
    sampler_mu,
    share_out,
)
from flux_trainer.velocity import Velocity, check_features, shared_encoder

THUMBNAIL = 384  # pixels; longest side of a picture on the contact sheet


def draw_pictures(order: Order, config: JobConfig) -> None:
    """Draw and write what is ordered, with all ranks of the world.

    Raises:
        ValueError, FileNotFoundError, CheckpointError: a sentence about what does not fit or is not there.
    """
    set_deterministic(config.debug.seed, config.debug.deterministic)
    world = init_distributed(config.comm.init_timeout_seconds, config.comm.machine_timeout_seconds)
    ordered = {f"picture {i}": asdict(r) for i, r in enumerate(order.requests, 1)}
    check_agreement({**of_pictures(config), **ordered}, world)
    mesh = build_mesh(config.parallelism, world.size, world.device.type, config.comm.init_timeout_seconds)
    peers.introduce(mesh.place(STAGES_PER_RANK[config.parallelism.pipeline_parallel_schedule]))
    group = data_group(mesh, world)
    model = registry.FLAVORS[config.model.flavor]
    requests = order.requests
    dtype: torch.dtype = getattr(torch, config.training.mixed_precision_param)
    ema = config.inference.ema
    # What can fail, before the minutes that the text encoders take.
    check_backend(config.attention.backend, world.device, dtype, model.head_dim, training=False)
    on_first(world.checkpoint, lambda: _look(order, model, ema))
    codec = Codec(config.encoder, world.device, kind_of(model))

    rounds = share_out(requests, group.count, config.inference.local_batch_size)

    side = config.inference.reference_size
    encode = reference_encoder(
        codec.encode_images,
        lambda count: side or published_side(model.family, count),
        config.data.max_pixels,
    )
    shown = encode_references(requests, rounds, encode, group)
    features = _encode(config, model, mesh, group, requests, rounds)
    gc.collect()  # modules are in cycles, with FSDP's hooks and without
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    parallel = _transformer(config, mesh, world.device, dtype, requests)
    parameters = {name: p.detach() for part in parallel.parts for name, p in part.named_parameters()}
    what = load_weights(
        order.weights,
        parameters,
        world.checkpoint,
        parallel.layouts,
        config=model,
        ema=ema,
    )
    logger.info(f"Drawing with {what}")

    velocity = Velocity(parallel, model, world.device)
    mine = [requests[i] for batches in rounds for i in batch_of(batches, group.number)]
    total = sum(_steps(r) * _elements(r, velocity.space) for r in mine)
    total += sum(_elements(r, velocity.space) for r in requests)  # decoding; else 100 % would come before it
    progress, done = Progress(shown=world.rank == 0), 0
    thumbnails: dict[int, Tensor] = {}

    def predict(x_t: Tensor, *others: Any) -> Tensor:
        nonlocal done
        v = velocity(x_t, *others)
        done += x_t.numel()
        progress.show(done, total, f"{len(thumbnails)} of {len(requests)} pictures")
        return v

    pictures = draw(
        requests,
        rounds,
        features,
        predict,
        codec.decode,
        space=velocity.space,
        mu=sampler_mu(config.model.flavor),
        group=group,
        dtype=torch.promote_types(dtype, torch.float32),
        shown=shown,
    )
    for number, picture in pictures:
        thumbnails[number] = thumbnail(picture, THUMBNAIL)
        if world.rank == 0:
            write_png(order.paths[number], picture, metadata(requests[number], str(order.weights), ema))
        done += _elements(requests[number], velocity.space)
        progress.show(done, total, f"{len(thumbnails)} of {len(requests)} pictures")
    progress.close()
    if world.rank == 0:
        _report(order, config, [thumbnails[i] for i in range(len(requests))])
    world.close()


def _look(order: Order, model: ModelConfig, ema: bool) -> None:
    """Raises an error unless the weights are there, by their headers, and the folder of the pictures is."""
    order.paths[0].parent.mkdir(parents=True, exist_ok=True)
    open_weights(order.weights, config=model, ema=ema)


def _encode(
    config: JobConfig,
    model: ModelConfig,
    mesh: Mesh,
    group: DataGroup,
    requests: list[Request],
    rounds: list[Round],
) -> dict[str, TextFeatures]:
    """Features of the texts that this rank needs, on the host; the encoders are gone when it returns."""
    device, seed, shard = group.world.device, config.debug.seed, shared_encoder(mesh)
    text = text_encoders(config.encoder, kind_of(model), device, seed, shard, model.context_in_dim)
    check_features(config, text, model)
    return encode_prompts(requests, rounds, text, group)


def _transformer(
    config: JobConfig, mesh: Mesh, device: torch.device, dtype: torch.dtype, requests: list[Request]
) -> Parallel:
    """The model in `dtype`, shared out over the mesh, with memory but without values."""
    with torch.device("meta"):
        model = registry.build(config.model.name, config.model.flavor).to(dtype).requires_grad_(False)
    parallel = parallelize(
        model,
        mesh,
        tokens=(max(r.width * r.height for r in requests) // 256, tokens(config)[1]),
        parallelism=config.parallelism,
        activation_checkpoint=ActivationCheckpoint(mode="none"),
        compile=config.compile,
        param_dtype=dtype,
        reduce_dtype=dtype,
        attention=config.attention,
    )
    for part in parallel.parts:
        part.to_empty(device=device)
    return parallel


def _elements(request: Request, space: LatentSpace) -> int:
    """Of a picture's latents."""
    return prod(space.shape(request.height, request.width))


def _steps(request: Request) -> int:
    """How often the model sees a picture."""
    return request.steps * (2 if request.guided else 1)


def write_png(path: Path, picture: Tensor, chunks: Mapping[str, str]) -> None:
    """A picture uint8 [3, H, W] with texts inside; under its name it is whole."""
    texts = PngInfo()
    for name, text in chunks.items():
        texts.add_text(name, text)
    passing = path.with_name(f".{path.name}.tmp")
    try:
        to_image(picture).save(passing, format="PNG", pnginfo=texts)
        os.replace(passing, path)
    finally:
        passing.unlink(missing_ok=True)


def _report(order: Order, config: JobConfig, thumbnails: list[Tensor]) -> None:
    """Say where the pictures are, and put them on a sheet of their own."""
    folder = order.paths[0].parent
    logger.info(f"{len(order.paths)} pictures in {folder}, the first {order.paths[0].name}")
    if config.inference.contact_sheet and len(order.paths) > 1:
        names = (folder / f"contact-sheet-{number}.png" for number in count(1))
        path = next(name for name in names if not name.exists())
        captions = [f"{r.prompt} ({r.seed})" for r in order.requests]
        grid(thumbnails, captions).save(path)
        logger.info(f"  all on one sheet: {path}")
