"""The estimate against what real ranks hold, closed arithmetic, and memory measured in a real step."""

from math import ceil

import pytest
import torch
import torch.distributed as dist
from helpers.fake_world import fake_world
from helpers.ranks import run_ranks
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker

from flux_trainer.config.load import load_config
from flux_trainer.config.schema import ActivationCheckpoint, JobConfig, Parallelism
from flux_trainer.flow.latents import FLUX1
from flux_trainer.flow.loss import flow_loss
from flux_trainer.models import registry
from flux_trainer.models.flops import num_params
from flux_trainer.optim.build import build_optimizer, optimizer_tensors
from flux_trainer.parallel.apply import parallelize
from flux_trainer.parallel.cast import read_as
from flux_trainer.parallel.estimate import MODES, Plan, costs, parts, plan, sharing
from flux_trainer.parallel.held import memory
from flux_trainer.parallel.mesh import build_mesh
from flux_trainer.parallel.remat import apply_checkpointing
from flux_trainer.parallel.traffic import traffic
from flux_trainer.runtime.layout import local

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
    config.model.flavor = flavor
    config.parallelism = Parallelism(**degrees)
    config.training.local_batch_size, config.training.img_size = 1, 64
    config.encoder.max_t5_encoding_len = 16
    if "pipeline_parallel_degree" in degrees:
        config.training.global_batch_size = 2
    return config


def one_rank(flavor: str, degrees: dict) -> tuple[bool, int, int, int, int]:
    """Whether this rank holds the first shards; its place in the pipeline; bytes of what it holds."""
    torch.manual_seed(0)
    config = settings(flavor, **degrees)
    mesh = build_mesh(config.parallelism, torch.distributed.get_world_size(), "cpu")
    with torch.device("meta"):
        model = registry.build("flux1", flavor)
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
    if flavor == "flux-tiny":  # the larger one stays on the meta device
        for part in parallel.parts:
            part.to_empty(device="cpu")
    parameters = {n: p for part in parallel.parts for n, p in part.named_parameters()}
    if flavor == "flux-tiny" and not parallel.pipeline:
        width, side = parallel.parts[0].config.context_in_dim, 4
        inputs = {
            "img": torch.randn(1, side * side, 64),
            "img_ids": FLUX1.image_ids(1, 2 * side, 2 * side, torch.device("cpu")),
            "txt": torch.randn(1, 16, width),
            "txt_ids": FLUX1.text_ids(1, 16, torch.device("cpu")),
        }
        if context := parallel.context:
            context.begin(16, side * side)
            inputs = dict(zip(inputs, context.split(*inputs.values()), strict=True))
        out = model(**inputs, timesteps=torch.rand(1), y=torch.randn(1, width))
        out.sum().backward()
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


@pytest.mark.distributed
@pytest.mark.parametrize("flavor", ["flux-tiny", "flux-debug"])
@pytest.mark.parametrize("mesh", MESHES)
def test_real_ranks_hold_what_is_estimated(flavor, mesh):
    ranks, degrees = MESHES[mesh]
    p = plan(settings(flavor, **degrees), ranks)
    with sharing(p) as group:
        cost = costs(p, group, MODES["none"])
        want = [memory(p, parts(p, rank, group), rank, cost) for rank in range(p.sizes["pp"])]
    compared = 0
    for first, place, parameters, optimizer, gradients in run_ranks(ranks, one_rank, flavor, degrees):
        if first:
            assert parameters == want[place].parameters
            assert optimizer == want[place].optimizer
            if flavor == "flux-tiny" and p.sizes["pp"] == 1:
                assert gradients == want[place].gradients
            compared += 1
    assert compared


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_peak_is_near_a_measured_one(mode, compute):
    """Also without weights and optimizer state, which are most of a small model's memory."""
    batch, side, text = 2, 192, 64
    config = settings("flux-tiny")
    config.training.local_batch_size, config.training.img_size = batch, side
    config.training.mixed_precision_param = compute
    config.encoder.max_t5_encoding_len = text
    p: Plan = plan(config, 1)
    estimate = memory(p, parts(p, 0, None), 0, costs(p, None, MODES[mode]))

    model = registry.build("flux1", "flux-tiny")
    apply_checkpointing([block for _, block in model.blocks()], MODES[mode])
    if compute != "float32":
        read_as(model, torch.bfloat16)
    optimizer = build_optimizer(model.named_parameters(), config.optimizer)
    inputs = {
        "img": torch.randn(batch, p.tokens[0], 64),
        "img_ids": FLUX1.image_ids(batch, side // 8, side // 8, torch.device("cpu")),
        "txt": torch.randn(batch, text, 256),
        "txt_ids": FLUX1.text_ids(batch, text, torch.device("cpu")),
        "timesteps": torch.rand(batch),
        "y": torch.randn(batch, 256),
    }
    target = torch.randn(batch, p.tokens[0], 64)

    def step() -> None:
        flow_loss(model(**inputs), target, None, batch, target[0].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    given = [*inputs.values(), target]
    tracker = MemTracker()
    tracker.track_external(model, optimizer, *given)
    with tracker:
        step()
    measured = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    measured -= sum(x.nbytes for x in given)
    assert estimate.training == pytest.approx(measured, rel=0.05)
    assert estimate.training - estimate.stored == pytest.approx(measured - estimate.stored, rel=0.1)


def measured(config: JobConfig, p: Plan, mode: str) -> int:
    """Peak of forward and backward beside inputs and optimizer state (which the tracker would get wrong)."""
    batch, (image, text), side = p.batch, p.tokens, config.training.img_size
    with torch.device("meta"):
        model = registry.build("flux1", "flux-tiny")
    parallel = parallelize(
        model,
        build_mesh(config.parallelism, dist.get_world_size(), "cpu"),
        tokens=p.tokens,
        parallelism=config.parallelism,
        activation_checkpoint=MODES[mode],
        compile=config.compile,
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
    )
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).normal_(0, 0.02)
    inputs = {
        "img": torch.randn(batch, image, 64),
        "img_ids": FLUX1.image_ids(batch, side // 8, side // 8, torch.device("cpu")),
        "txt": torch.randn(batch, text, 256),
        "txt_ids": FLUX1.text_ids(batch, text, torch.device("cpu")),
    }
    target = torch.randn(batch, image, 64)
    if context := parallel.context:
        context.begin(text, image)
        inputs = {name: x.clone() for name, x in zip(inputs, context.split(*inputs.values()), strict=True)}
        target = context.split(target)[0].clone()
    inputs |= {"timesteps": torch.rand(batch), "y": torch.randn(batch, 256)}

    def forward_backward() -> None:
        flow_loss(model(**inputs), target, None, batch, target[0].numel()).backward()

    forward_backward()
    model.zero_grad()
    given = (*inputs.values(), target)
    tracker = FSDPMemTracker(model)
    tracker.track_inputs(given)
    with tracker:
        forward_backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return peak - sum(x.nbytes for x in given)


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
    ("mesh", "mode"),
    [*((mesh, "selective op") for mesh in PEAKS), ("fsdp2", "none"), ("fsdp2 x tp2", "full")],
)
def test_the_peak_on_a_mesh_is_near_a_measured_one(mesh, mode):
    ranks, degrees = PEAKS[mesh]
    config = settings("flux-tiny", **degrees)
    config.training.local_batch_size, config.training.img_size = 2, 192
    config.encoder.max_t5_encoding_len = 64
    p = plan(config, ranks)
    with sharing(p) as group:
        estimate = memory(p, parts(p, 0, group), 0, costs(p, group, MODES[mode]))
    with fake_world(ranks):
        found = measured(config, p, mode) + estimate.optimizer
    assert estimate.training == pytest.approx(found, rel=0.02)
    assert estimate.training - estimate.stored == pytest.approx(found - estimate.stored, rel=0.05)


def test_a_model_that_cannot_be_shared_out_is_refused():
    with pytest.raises(ValueError, match=r"24 attention heads cannot be shared out evenly: 24 / 5"):
        plan(settings("flux-dev", tensor_parallel_degree=5), 10)
    with pytest.raises(ValueError, match="needs as many micro-batches as ranks"):
        plan(settings("flux-dev", pipeline_parallel_degree=4), 4)
