"""The estimate against what real ranks hold, closed arithmetic, and memory measured in a real step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import get_args
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers.alive import Alive
from helpers.fake_world import fake_world
from helpers.marks import slow
from helpers.ranks import run_ranks
from helpers.small_model import inputs
from torch import Tensor

from flux_trainer.config.compute import ActivationCheckpoint, Backend, Parallelism
from flux_trainer.config.load import load_config
from flux_trainer.config.schema import JobConfig, Source
from flux_trainer.flow.loss import flow_loss
from flux_trainer.models import registry
from flux_trainer.models.backends import attention_by
from flux_trainer.models.flops import num_params
from flux_trainer.models.model import FluxModel
from flux_trainer.models.on_cpu import as_elsewhere
from flux_trainer.optim.build import build_optimizer, optimizer_tensors
from flux_trainer.parallel import offload
from flux_trainer.parallel.apply import parallelize, use_attention
from flux_trainer.parallel.cast import read_as
from flux_trainer.parallel.context import ContextParallel
from flux_trainer.parallel.estimate import MODES, Plan, costs, parts, plan, sharing
from flux_trainer.parallel.held import Memory, memory
from flux_trainer.parallel.mesh import build_mesh
from flux_trainer.parallel.remat import apply_checkpointing
from flux_trainer.parallel.traffic import traffic
from flux_trainer.runtime.layout import local

MORE_MODES = {
    "every second": ActivationCheckpoint(mode="selective", selective_ac_option="2"),
    "by kind": ActivationCheckpoint(mode="attention", single_blocks="full"),
    "full, offload": ActivationCheckpoint(mode="full", offload=True),
    "attention, offload": ActivationCheckpoint(mode="attention", offload=True),
    "none, offload": ActivationCheckpoint(mode="none", offload=True),
}
MESHES = {
    "fsdp2": (2, {}),
    "hsdp 2x2": (4, {"data_parallel_replicate_degree": 2}),
    "tp2": (2, {"tensor_parallel_degree": 2}),
    "fsdp2 x tp2": (4, {"tensor_parallel_degree": 2}),
    "pp2": (2, {"pipeline_parallel_degree": 2}),
    "cp2": (2, {"context_parallel_degree": 2}),
}


def settings(flavor: str, **degrees) -> JobConfig:
    config = load_config([])
    config.model.name, config.model.flavor = registry.FLAVORS[flavor].family, flavor
    config.parallelism = Parallelism(**degrees)
    config.training.local_batch_size, config.training.img_size = 1, 64
    config.encoder.max_t5_encoding_len = config.encoder.max_llm_encoding_len = 16
    if "pipeline_parallel_degree" in degrees:
        config.training.global_batch_size = 2
    return config


def one_rank(flavor: str, degrees: dict, state_dtype: str | None = None) -> tuple[bool, int, int, int, int]:
    """Whether this rank holds the first shards; its place in the pipeline; bytes of what it holds."""
    torch.manual_seed(0)
    config = settings(flavor, **degrees)
    config.optimizer.state_dtype = state_dtype
    mesh = build_mesh(config.parallelism, torch.distributed.get_world_size(), "cpu")
    with torch.device("meta"):
        model = registry.build(config.model.name, flavor)
    parallel = parallelize(
        model,
        mesh,
        tokens=(16, 16),
        parallelism=config.parallelism,
        activation_checkpoint=ActivationCheckpoint(mode="none"),
        compile=config.compile,
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
    )
    gradients = 0
    if flavor != "flux-debug":  # the larger one stays on the meta device
        for part in parallel.parts:
            part.to_empty(device="cpu")
    parameters = {n: p for part in parallel.parts for n, p in part.named_parameters()}
    if flavor != "flux-debug" and not parallel.pipeline:
        given = inputs(model.config, 1, image=16, text=16, dtype=torch.float32)
        if parallel.context:
            split(parallel.context, given)
        model(**model.arguments(**given)).sum().backward()
        gradients = sum(local(p.grad).nbytes for p in parameters.values())
    optimizer = build_optimizer(parameters.items(), config.optimizer)
    moments = optimizer_tensors(optimizer, parameters.items())
    first = mesh.coordinates["dp_shard"] == 0 and mesh.coordinates["cp"] == 0
    return (
        first,
        mesh.coordinates["pp"],
        sum(local(p).nbytes for p in parameters.values()),
        sum(local(x).nbytes for x in moments.values()),
        gradients,
    )


def split(context: ContextParallel, given: dict[str, Tensor]) -> None:
    """Leave this rank its tokens."""
    context.begin(given["text"].shape[1], given["image"].shape[1])
    streams = ("image", "image_ids", "text", "text_ids")
    parts = context.split(*(given[name] for name in streams))
    given |= {name: x.clone() for name, x in zip(streams, parts, strict=True)}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("flavor", "mesh"),
    [
        *(("flux-tiny", mesh) for mesh in MESHES),
        *slow(*(("flux-debug", mesh) for mesh in MESHES)),
        *slow(*(("flux2-tiny", mesh) for mesh in ("fsdp2 x tp2", "pp2", "cp2"))),
    ],
)
def test_real_ranks_hold_what_is_estimated(flavor, mesh):
    ranks, degrees = MESHES[mesh]
    p = plan(settings(flavor, **degrees), ranks)
    with sharing(p) as group:
        cost = costs(p, group, MODES["none"])
        want = [memory(p, parts(p, rank, group), rank, cost, MODES["none"]) for rank in range(p.sizes["pp"])]
    compared = 0
    for first, place, parameters, optimizer, gradients in run_ranks(ranks, one_rank, flavor, degrees):
        if first:
            assert parameters == want[place].parameters
            assert optimizer == want[place].optimizer
            if flavor != "flux-debug" and p.sizes["pp"] == 1:
                assert gradients == want[place].gradients
            compared += 1
    assert compared


@pytest.mark.distributed
def test_moments_in_bfloat16_take_half():
    config = settings("flux-tiny")
    config.optimizer.state_dtype = "bfloat16"
    p = plan(config, 2)
    estimate = memory(p, parts(p, 0, None), 0, costs(p, None, MODES["none"]), MODES["none"])
    (_, _, parameters, optimizer, _), _ = run_ranks(2, one_rank, "flux-tiny", {}, "bfloat16")
    assert optimizer == estimate.optimizer
    steps = 4 * sum(map(len, parts(p, 0, None)[0].shapes.values()))
    assert optimizer == parameters + steps


@pytest.mark.parametrize("ranks", [8, 64, 1024])
def test_flux_dev_by_arithmetic(ranks):
    p = plan(settings("flux-dev"), ranks)
    (whole,) = parts(p, 0, None)
    model = registry.FLAVORS["flux-dev"]
    h = model.hidden_size
    # Rows x columns of every matrix, how often it is there, and whether with a bias as long as it has rows.
    double = [(6 * h, h), (3 * h, h), (h, h), (4 * h, h), (h, 4 * h)]
    single = [(3 * h, h), (7 * h, h), (h, 5 * h)]
    ends = [(h, 64), (h, 256), (h, h), (h, 768), (h, h), (h, 256), (h, h), (h, 4096), (2 * h, h), (64, h)]
    elements = total = 0
    for matrices, count in ((double, 2 * 19), (single, 38), (ends, 1)):
        for rows, columns in matrices:
            elements += count * ceil(rows / ranks) * (columns + 1)
            total += count * rows * (columns + 1)
    scales = 2 * (2 * 19 + 38)
    elements += scales * ceil(128 / ranks)
    total += scales * 128
    assert total == num_params(model)
    assert sum(whole.shard(name, ranks) for name in whole.shapes) == elements
    sent = traffic(p, [whole], MODES["none"])
    root = sum(ceil(r / ranks) * (c + 1) for r, c in ends)
    assert sent["all-gather"] == 2 * (ranks - 1) * (2 * elements - root)  # bfloat16; the root's only once
    assert sent["reduce-scatter"] == 4 * (ranks - 1) * elements


@pytest.mark.parametrize(
    ("flavor", "compute", "mode"),
    [
        *(("flux-tiny", "bfloat16", mode) for mode in MODES),
        ("flux2-tiny", "float32", "full"),
        *slow(
            *(("flux-tiny", "float32", mode) for mode in MODES),
            ("flux2-tiny", "bfloat16", "none"),
            ("flux2-tiny", "bfloat16", "selective op"),
        ),
    ],
)
def test_the_peak_is_near_a_measured_one(flavor, compute, mode):
    """Also without weights and optimizer state, which are most of a small model's memory."""
    compare_on_one_rank(flavor, compute, MODES[mode])


NARROW = {
    flavor: replace(registry.FLAVORS[flavor], hidden_size=64, axes_dim=axes)
    for flavor, axes in (("flux-tiny", (4, 6, 6)), ("flux2-tiny", (4, 4, 4, 4)))
}


@pytest.mark.parametrize("mode", MODES | MORE_MODES)
@pytest.mark.parametrize("flavor", ["flux-tiny", *slow("flux2-tiny")])
@patch.dict(registry.FLAVORS, NARROW)
def test_the_peak_is_near_a_measured_one_where_it_is_activations(flavor, mode, monkeypatch):
    """A model so narrow that its peak lies where activations are, whatever little of them is kept."""
    monkeypatch.setattr(offload, "LARGE", 1 << 15)  # less than a tensor of tokens
    compare_on_one_rank(flavor, "float32", (MODES | MORE_MODES)[mode], 0.03)


@pytest.mark.parametrize("mode", ["none", *slow(*(mode for mode in MODES if mode != "none"))])
@pytest.mark.parametrize("flavor", ["flux-tiny", *slow("flux2-tiny")])
def test_references_of_different_numbers_are_counted(flavor, mode):
    compare_on_one_rank(flavor, "float32", MODES[mode], references=True)


@pytest.mark.parametrize("mode", ["none", "attention"])
def test_the_probabilities_of_plain_products_are_counted(mode):
    compare_on_one_rank("flux-tiny", "bfloat16", MODES[mode], backend="math")


@pytest.mark.parametrize("compute", [*slow("float32"), "bfloat16"])
def test_what_runs_on_gpus_alone_keeps_what_flash_does(compute):
    """On whatever CPU the estimate is made, with few tokens too."""
    config = settings("flux-tiny")
    config.training.img_size, config.training.local_batch_size = 256, 2
    config.training.mixed_precision_param = compute
    found = {}
    for backend in get_args(Backend):
        config.attention.backend = backend
        found[backend] = costs(plan(config, 1), None, MODES["none"])["none"]["single_blocks"]
    width = {"float32": 4, "bfloat16": 2}[compute]
    # of 2 samples, 4 heads: a number for each pair of tokens in place of a log-sum-exp for each token
    assert found.pop("math").kept - found["flash"].kept >= 2 * 4 * 272 * (272 * width - 4)
    assert set(found.values()) == {found["flash"]}


def compare_on_one_rank(
    flavor: str,
    compute: str,
    section: ActivationCheckpoint,
    tolerance: float = 0.02,
    references: bool = False,
    backend: Backend = "auto",
) -> None:
    batch, side, text = 2, 192, 64
    config = settings(flavor)
    config.encoder.dtype, config.attention.backend = "float32", backend
    config.training.local_batch_size, config.training.img_size = batch, side
    config.training.mixed_precision_param = compute
    config.encoder.max_t5_encoding_len = config.encoder.max_llm_encoding_len = text
    if references:
        config.data.sources = [Source(type="jsonl", reference_key="refs")]
        config.data.reference_size = 96
    p: Plan = plan(config, 1)
    estimate = memory(p, parts(p, 0, None), 0, costs(p, None, section), section)
    lengths = {"lengths": ((sum(p.tokens) - 1,), (sum(p.tokens),))} if references else {}

    model = registry.build(config.model.name, flavor)
    use_attention([block for _, block in model.blocks()], attention_by(backend))
    away = offload.Offload() if section.offload else None
    apply_checkpointing(model.blocks(), section, away)
    if away:
        away.apply([block for _, block in model.blocks()])
    if compute != "float32":
        read_as(model, torch.bfloat16)
    given = inputs(p.model, batch, image=p.tokens[0], text=text, dtype=torch.float32)
    target = torch.randn(batch, p.tokens[0] - p.references, p.model.out_channels)

    def forward_backward() -> None:
        out = model(**model.arguments(**given), **lengths)[:, : target.shape[1]]
        flow_loss(out, target, None, batch, target[0].numel()).backward()

    with watching_the_host() as on_host:
        found = measured(forward_backward, model, *given.values(), target, on_host=on_host)
    assert_near(estimate, found + estimate.optimizer, tolerance)
    assert on_host.peak == pytest.approx(estimate.host, rel=0.02)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_peak_without_gradients_is_near_a_measured_one(compute):
    """optimizer.in_backward: weights free their gradients as these come."""
    config = settings("flux-tiny")
    config.optimizer.in_backward, config.training.mixed_precision_param = True, compute
    config.training.local_batch_size, config.training.img_size = 2, 192
    p = plan(config, 1)
    estimate = memory(p, parts(p, 0, None), 0, costs(p, None, MODES["full"]), MODES["full"])
    model = registry.build(config.model.name, config.model.flavor)
    apply_checkpointing(model.blocks(), MODES["full"])
    if compute != "float32":
        read_as(model, torch.bfloat16)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(free)
    given = inputs(p.model, 2, image=p.tokens[0], text=p.tokens[1], dtype=torch.float32)
    target = torch.randn(2, p.tokens[0], p.model.out_channels)

    def forward_backward() -> None:
        out = model(**model.arguments(**given))
        flow_loss(out, target, None, 2, target[0].numel()).backward()

    assert estimate.gradients == 0
    assert_near(estimate, measured(forward_backward, model, *given.values(), target) + estimate.optimizer)


def free(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def watching_the_host() -> Iterator[Alive]:
    """Sees what `Offload` copies to the host, and nothing else."""
    alive, copy = Alive(), offload.Moved._copy

    def look(moved: offload.Moved, target: Tensor, source: Tensor) -> None:
        if target is moved.host:
            alive.watch(target)
            alive.peak = max(alive.peak, alive.now())
        copy(moved, target, source)

    with patch.object(offload.Moved, "_copy", look):
        yield alive


def measured(
    forward_backward: Callable[[], None], model: FluxModel, *present: Tensor, on_host: Alive | None = None
) -> int:
    """Peak of forward and backward beside inputs, optimizer state and what is on the host."""
    with Alive(apart=on_host) as alive, as_elsewhere():
        for tensor in (*present, *map(local, model.parameters())):
            alive.watch(tensor)
        forward_backward()
    return alive.peak - sum(x.nbytes for x in present)


def assert_near(estimate: Memory, found: int, tolerance: float = 0.02) -> None:
    """The whole peak, and what of it is neither weights nor optimizer state."""
    assert estimate.training == pytest.approx(found, rel=max(0.01, tolerance / 2))
    assert estimate.training - estimate.stored == pytest.approx(found - estimate.stored, rel=tolerance)


def measured_on_a_mesh(config: JobConfig, p: Plan, mode: str) -> int:
    batch, (image, text) = p.batch, p.tokens
    with torch.device("meta"):
        model = registry.build(config.model.name, config.model.flavor)
    parallel = parallelize(
        model,
        build_mesh(config.parallelism, dist.get_world_size(), "cpu"),
        tokens=p.tokens,
        parallelism=config.parallelism,
        activation_checkpoint=MODES[mode],
        compile=config.compile,
        param_dtype=torch.bfloat16,
        reduce_dtype=p.dtype("mixed_precision_reduce"),
    )
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).normal_(0, 0.02)
    if config.optimizer.in_backward:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(free)
    given = inputs(p.model, batch, image=image, text=text, dtype=torch.float32)
    target = torch.randn(batch, image, p.model.out_channels)
    if parallel.context:
        split(parallel.context, given)
        target = parallel.context.split(target)[0].clone()

    def forward_backward() -> None:
        out = model(**model.arguments(**given))
        flow_loss(out, target, None, batch, target[0].numel()).backward()

    forward_backward()
    model.zero_grad()
    return measured(forward_backward, model, *given.values(), target)


PEAKS = {
    "fsdp2": (2, {}),
    "hsdp 2x2": (4, {"data_parallel_replicate_degree": 2}),
    "fsdp2 x tp2": (4, {"tensor_parallel_degree": 2}),
    "cp2": (2, {"context_parallel_degree": 2}),
    "fsdp2 x cp2": (4, {"context_parallel_degree": 2}),
    "cp4 ring": (4, {"context_parallel_degree": 4, "context_parallel_method": "ring"}),
    "cp4 allgather": (4, {"context_parallel_degree": 4, "context_parallel_method": "allgather"}),
    "cp2 x tp2": (4, {"context_parallel_degree": 2, "tensor_parallel_degree": 2}),
    "prefetch 2": (2, {"fsdp_prefetch": 2}),
}


@pytest.mark.parametrize(
    ("flavor", "mesh", "mode"),
    [
        *(("flux-tiny", mesh, "selective op") for mesh in ("fsdp2", "cp2")),
        ("flux2-tiny", "fsdp2 x tp2", "full"),
        *slow(
            *(("flux-tiny", mesh, "selective op") for mesh in PEAKS if mesh not in ("fsdp2", "cp2")),
            ("flux-tiny", "fsdp2", "none"),
            ("flux-tiny", "fsdp2 x tp2", "full"),
            ("flux-tiny", "cp2 x tp2", "attention"),
            ("flux2-tiny", "fsdp2", "none"),
            ("flux2-tiny", "fsdp2", "attention"),
            ("flux2-tiny", "cp2", "selective op"),
        ),
    ],
)
def test_the_peak_on_a_mesh_is_near_a_measured_one(flavor, mesh, mode):
    ranks, degrees = PEAKS[mesh]
    config = settings(flavor, **degrees)
    config.training.local_batch_size, config.training.img_size = 2, 192
    config.encoder.max_t5_encoding_len = config.encoder.max_llm_encoding_len = 64
    p = plan(config, ranks)
    with sharing(p) as group:
        estimate = memory(p, parts(p, 0, group), 0, costs(p, group, MODES[mode]), MODES[mode])
    with fake_world(ranks):
        found = measured_on_a_mesh(config, p, mode) + estimate.optimizer
    assert_near(estimate, found)


@pytest.mark.parametrize("reduce", ["float32", "bfloat16"])
def test_the_peak_on_a_mesh_without_gradients_is_near_a_measured_one(reduce):
    config = settings("flux-tiny")
    config.optimizer.in_backward, config.training.mixed_precision_reduce = True, reduce
    config.training.local_batch_size, config.training.img_size = 2, 192
    config.encoder.max_t5_encoding_len = 64
    p = plan(config, 2)
    estimate = memory(p, parts(p, 0, None), 0, costs(p, None, MODES["full"]), MODES["full"])
    with fake_world(2):
        found = measured_on_a_mesh(config, p, "full") + estimate.optimizer
    assert_near(estimate, found)


def on_a_stage(flavor: str) -> tuple[Memory, int]:
    """Of this rank of a pipeline of two: what is estimated for it, and what it holds."""
    config = settings(flavor, pipeline_parallel_degree=2)
    config.training.local_batch_size, config.training.global_batch_size = 2, 8
    config.training.img_size = 192
    config.encoder.max_t5_encoding_len = config.encoder.max_llm_encoding_len = 64
    p, rank = plan(config, 2), dist.get_rank()
    estimate = memory(p, parts(p, rank, None), rank, costs(p, None, MODES["none"]), MODES["none"])
    with torch.device("meta"):
        model = registry.build(config.model.name, flavor)
    parallel = parallelize(
        model,
        build_mesh(config.parallelism, 2, "cpu"),
        tokens=p.tokens,
        parallelism=config.parallelism,
        activation_checkpoint=MODES["none"],
        compile=config.compile,
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
    )
    (part,), pipeline = parallel.parts, parallel.pipeline
    part.to_empty(device="cpu")
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
    given = [inputs(p.model, 2, image=p.tokens[0], text=64, dtype=torch.float32) for _ in range(4)]
    target = torch.randn(2, p.tokens[0], p.model.out_channels)

    def forward_backward() -> None:
        pipeline.forward_backward(
            [model.arguments(**each) for each in given],
            lambda out, _: flow_loss(out, target, None, 2, target[0].numel()),
        )

    present = [x for each in given for x in each.values()]
    return estimate, measured(forward_backward, part, *present, target) + estimate.optimizer


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("flavor", ["flux-tiny", "flux2-tiny"])
def test_the_peak_of_a_pipeline_is_near_a_measured_one(flavor):
    for estimate, found in run_ranks(2, on_a_stage, flavor):
        assert_near(estimate, found, 0.03)


def test_a_model_that_cannot_be_shared_out_is_refused():
    with pytest.raises(ValueError, match=r"24 attention heads cannot be shared out evenly: 24 / 5"):
        plan(settings("flux-dev", tensor_parallel_degree=5), 10)
    with pytest.raises(ValueError, match="needs as many micro-batches as ranks"):
        plan(settings("flux-dev", pipeline_parallel_degree=4), 4)
