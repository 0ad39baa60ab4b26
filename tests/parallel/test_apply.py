"""A parallel model computes what the plain one does: gradients in float64 against one process."""

from dataclasses import replace

import pytest
import torch
from helpers.held import part, whole
from helpers.marks import slow
from helpers.ranks import run_ranks
from helpers.resident import needs_proc, peak, restart_peak
from helpers.small_model import arguments, inputs, small, small2
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import flux_trainer.models.model
from flux_trainer.config.compute import ActivationCheckpoint, Attention, Compile, Parallelism
from flux_trainer.models.init import Normal
from flux_trainer.models.model import FluxModel
from flux_trainer.models.registry import model_class
from flux_trainer.optim.guard import clip_grad_norm
from flux_trainer.parallel import offload
from flux_trainer.parallel.apply import Parallel, parallelize
from flux_trainer.parallel.fsdp import defer_all_reduce, shard
from flux_trainer.parallel.init import init_weights
from flux_trainer.parallel.mesh import build_mesh

CONFIGS = {
    "flux1": small(hidden_size=16, mlp_ratio=4.0, num_heads=2, depth=1),
    "flux2": small2(hidden_size=16, num_heads=2, depth=1),
}
CONFIG = CONFIGS["flux1"]
BATCH = 8


def build(world_size: int, **options) -> FluxModel:
    """A model with random values in every parameter, on this process's mesh."""
    (model,) = build_parallel(world_size, **options).parts
    return model


def build_parallel(
    world_size: int,
    *,
    family="flux1",
    config=None,
    replicate: int = 1,
    dtype=torch.float64,
    reshard="default",
    remat="none",
    option="op",
    away=False,
    compile=False,
    param_dtype=None,
    attention="auto",
    **degrees,
) -> Parallel:
    config = config or CONFIGS[family]
    if away:
        offload.LARGE = 64
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        model = model_class(config)(config)
    torch.set_default_dtype(torch.float32)
    parallelism = Parallelism(
        data_parallel_replicate_degree=replicate, fsdp_reshard_after_forward=reshard, **degrees
    )
    parallel = parallelize(
        model,
        build_mesh(parallelism, world_size, "cpu") if world_size > 1 else One(),
        tokens=(24, 5),
        parallelism=parallelism,
        activation_checkpoint=ActivationCheckpoint(mode=remat, selective_ac_option=option, offload=away),
        compile=Compile(enable=compile, backend="aot_eager"),
        param_dtype=param_dtype or dtype,
        reduce_dtype=dtype,
        attention=Attention(backend=attention),
    )
    model.to_empty(device="cpu")
    distributions = {name: Normal(0.3) for name, _ in model.named_parameters()}
    init_weights(model, distributions, seed=1, layouts=parallel.layouts)
    return parallel


class One:
    """Stands for the mesh of a single process without a process group."""

    cp = tp = pp = fsdp = None

    def size(self, *dimensions: str) -> int:
        return 1


def sharing(model: FluxModel) -> torch.distributed.ProcessGroup | None:
    """The ranks that hold one copy of the model together."""
    mesh = getattr(model.img_in.weight, "device_mesh", None)
    return mesh.get_group(mesh.ndim - 1) if mesh else None


def gradients(
    model: FluxModel, rows: list[slice], dtype=torch.float64
) -> tuple[dict[str, torch.Tensor], float]:
    """Whole gradients and their norm after accumulating over the given rows of the samples."""
    given = arguments(model.config, BATCH, dtype=dtype)
    for i, micro in enumerate(rows):
        defer_all_reduce(model, is_last=i == len(rows) - 1)
        out = model(**{k: v[micro] for k, v in given.items()})
        (out**2).sum().div(BATCH).backward()
    norm = clip_grad_norm(dict(model.named_parameters()), 0.0, group=sharing(model)).item()
    return {name: whole(p.grad) for name, p in model.named_parameters()}, norm


def on_a_rank(options: dict, micro: int):
    """This rank's result for its share of the batch, in micro-batches of `micro` samples."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = BATCH // world
    rows = [slice(i, i + micro) for i in range(rank * share, (rank + 1) * share, micro)]
    return gradients(build(world, **options), rows)


def assert_same(got: tuple, want: tuple, tolerance: float) -> None:
    assert got[1] == pytest.approx(want[1], rel=tolerance)
    assert got[0].keys() == want[0].keys()
    for name, gradient in want[0].items():
        error = (got[0][name] - gradient).abs().max() / gradient.abs().max()
        assert error <= tolerance, (name, error)


@pytest.fixture(scope="module")
def of_family():
    """What one process computes, by family."""
    return {family: gradients(build(1, family=family), [slice(0, BATCH)]) for family in CONFIGS}


@pytest.fixture(scope="module")
def one_process(of_family):
    return of_family["flux1"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "options", "micro"),
    [
        (2, {}, 4),
        (2, {}, 1),
        (2, {"reshard": "never"}, 2),
        (4, {"replicate": 2}, 1),
        (2, {"remat": "full"}, 2),
        (2, {"remat": "selective"}, 2),
        (2, {"remat": "none", "away": True, "reshard": "always"}, 2),
        (2, {"remat": "attention", "away": True}, 2),
        (2, {"family": "flux2", "reshard": "never"}, 1),
        *slow(
            (2, {"replicate": 2}, 2),
            (2, {"remat": "selective", "compile": True}, 2),
            (2, {"remat": "attention", "away": True, "compile": True, "family": "flux2"}, 2),
            (4, {"family": "flux2", "replicate": 2, "remat": "selective"}, 1),
        ),
    ],
    ids=str,
)
def test_gradients_equal_one_process(ranks, options, micro, of_family):
    for result in run_ranks(ranks, on_a_rank, options, micro):
        assert_same(result, of_family[options.get("family", "flux1")], 1e-11)


def by_tokens(cases: list[dict]) -> list[tuple[dict, dict]]:
    """For meshes that share out tokens too: this rank's gradients and layouts."""
    results = []
    for case in cases:
        parallel = build_parallel(torch.distributed.get_world_size(), **case)
        (model,), context = parallel.parts, parallel.context
        mesh = build_mesh(
            Parallelism(**{name: n for name, n in case.items() if name.endswith("degree")}),
            torch.distributed.get_world_size(),
            "cpu",
        )
        share = BATCH // mesh.size("dp_shard")
        first = mesh.rank("dp_shard") * share
        given = inputs(model.config, BATCH, image=7)
        for start in range(first, first + share, 2):
            rows = {name: x[start : start + 2] for name, x in given.items()}
            context.begin(5, 7)
            streams = ("image", "image_ids", "text", "text_ids")
            rows |= zip(streams, context.split(*(rows[name] for name in streams)), strict=True)
            (model(**model.arguments(**rows)) ** 2).sum().div(BATCH).backward()
        results.append(({name: whole(p.grad) for name, p in model.named_parameters()}, parallel.layouts))
    return results


CP2 = {"family": "flux2", "context_parallel_degree": 2}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (
            2,
            [CP2 | {"context_parallel_method": method} for method in ("ulysses", "ring", "allgather")]
            + [
                CP2 | {"context_parallel_method": method, "remat": "attention"}
                for method in ("ulysses", "ring")
            ],
        ),
        (4, [CP2 | {"remat": "selective"}, CP2 | {"tensor_parallel_degree": 2, "remat": "full"}]),
    ],
    ids=("2 ranks", "4 ranks"),
)
def test_gradients_where_tokens_are_shared_out(ranks, cases):
    """FLUX.2, with 7 and 5 tokens; the meshes of `tests/train/test_meshes.py` have FLUX.1."""
    model = build(1, family="flux2")
    (model(**arguments(model.config, BATCH, image=7)) ** 2).sum().div(BATCH).backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    for rank in run_ranks(ranks, by_tokens, cases):
        for case, (got, layouts) in zip(cases, rank, strict=True):
            assert got.keys() == want.keys()
            for name, gradient in want.items():
                error = (got[name] - part(gradient, layouts.get(name))).abs().max() / gradient.abs().max()
                assert error <= 1e-11, (case, name, error)


class Kernels(TorchDispatchMode):
    """Counts calls of flash, which on a CPU is not what so few tokens get by themselves."""

    calls = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls += "scaled_dot_product_flash_attention_for_cpu.default" in str(op)
        return op(*args, **(kwargs or {}))


def flash_calls(options: dict) -> list[int]:
    found = []
    for attention in ("auto", "flash"):
        parallel = build_parallel(torch.distributed.get_world_size(), attention=attention, **options)
        (model,) = parallel.parts
        given = inputs(model.config, 1)
        if parallel.context:
            parallel.context.begin(given["text"].shape[1], given["image"].shape[1])
            streams = ("image", "image_ids", "text", "text_ids")
            given |= zip(streams, parallel.context.split(*(given[name] for name in streams)), strict=True)
        with Kernels() as kernels:
            model(**model.arguments(**given))
        found.append(kernels.calls)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("options", [CP2, {"tensor_parallel_degree": 2}], ids=("ulysses", "tp"))
def test_the_backend_of_attention_reaches_every_block(options):
    """One double-stream and two single-stream blocks."""
    assert run_ranks(2, flash_calls, options) == [[0, 3]] * 2


def test_accumulation_equals_one_large_batch(one_process):
    assert_same(gradients(build(1), [slice(i, i + 1) for i in range(BATCH)]), one_process, 1e-11)
    assert_same(gradients(build(1), [slice(0, 3), slice(3, 8)]), one_process, 1e-11)


@pytest.mark.parametrize("remat", [("full", "op"), ("selective", "op"), ("selective", "2")], ids=str)
def test_checkpointing_recomputes_and_changes_no_bit(remat, one_process):
    model = build(1, remat=remat[0], option=remat[1])
    calls = []
    model.single_blocks[1].linear1.register_forward_hook(lambda *_: calls.append(1))
    got = gradients(model, [slice(0, BATCH)])
    # blocks 0 and 2 of the three are recomputed with option 2; the hook sits in block 2
    assert len(calls) == 2, "the forward is run again in backward"
    assert all(torch.equal(got[0][k], v) for k, v in one_process[0].items())


def peak_while_building() -> tuple[int, int]:
    """By how many bytes this process's resident memory rose at most, and the size of its shard."""
    before = restart_peak()
    large = replace(CONFIG, hidden_size=1024, axes_dim=(128, 192, 192))
    model = build(torch.distributed.get_world_size(), config=large, dtype=torch.float32)
    return peak() - before, sum(p.to_local().numel() * 4 for p in model.parameters())


@needs_proc
@pytest.mark.distributed
def test_no_rank_ever_holds_the_whole_model():
    """From the meta device to initial weights; a whole copy would be four times the shard. What else is
    taken (code that is loaded, the generator's buffers) does not grow with the model."""
    for rise, shard_bytes in run_ranks(4, peak_while_building):
        assert shard_bytes > 60 << 20
        assert rise < 2 * shard_bytes


def weights(world_size: int, replicate: int = 1) -> dict[str, torch.Tensor]:
    model = build(world_size, replicate=replicate, dtype=torch.float32)
    return {name: whole(p) for name, p in model.named_parameters()}


def weights_on_a_rank(replicate: int) -> dict[str, torch.Tensor]:
    return weights(torch.distributed.get_world_size(), replicate)


@pytest.mark.distributed
def test_initial_weights_do_not_depend_on_the_world():
    """Also where rows do not divide by ranks: 20 columns, 16 rows, 64 rows over 3 ranks."""
    want = weights(1)
    assert want["double_blocks.0.img_attn.qkv.weight"].std() == pytest.approx(0.3, rel=0.1)
    flat = torch.cat([w.flatten() for w in want.values()])
    assert flat.unique().numel() > 0.99 * flat.numel(), "every element has a value of its own"
    for ranks, replicate in ((2, 1), (3, 1), (4, 2)):
        for got in run_ranks(ranks, weights_on_a_rank, replicate):
            assert all(torch.equal(got[k], want[k]) for k in want)


def dtypes_on_a_rank(family: str) -> dict[str, set]:
    """What blocks and embedders see under bf16 mixed precision."""
    seen: dict[str, set] = {"pe": set(), "img": set(), "weight": set(), "time": set(), "grad": set()}
    world = torch.distributed.get_world_size()
    model = build(world, family=family, dtype=torch.float32, param_dtype=torch.bfloat16)

    def look(block, args):
        seen["img"].add(args[0].dtype)
        seen["pe"].add(args[-1].dtype)
        seen["weight"].add(block.img_attn.qkv.weight.dtype)

    model.double_blocks[0].register_forward_pre_hook(look)
    module = flux_trainer.models.model
    original = module.timestep_embedding

    def spy(t, *args):
        seen["time"] |= {t.dtype, original(t, *args).dtype}
        return original(t, *args)

    module.timestep_embedding = spy
    grads, _ = gradients(model, [slice(0, 4)], torch.float32)
    module.timestep_embedding = original
    seen["grad"] = {g.dtype for g in grads.values()}
    return seen


@pytest.mark.distributed
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_positions_and_times_stay_float32_under_mixed_precision(ranks, family):
    for seen in run_ranks(ranks, dtypes_on_a_rank, family):
        assert seen == {
            "pe": {torch.float32},
            "time": {torch.float32},
            "img": {torch.bfloat16},
            "weight": {torch.bfloat16},
            "grad": {torch.float32},
        }


def mixed(with_fsdp: bool, remat: str = "none") -> tuple[dict[str, torch.Tensor], float]:
    """Gradients of one rank computing in bfloat16, accumulated over two micro-batches."""
    model = build(1, dtype=torch.float32, remat=remat, param_dtype=None if with_fsdp else torch.bfloat16)
    if with_fsdp:
        blocks = [block for _, block in model.blocks()]
        mesh = init_device_mesh("cpu", (1,))
        shard(model, blocks, mesh, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return gradients(model, [slice(0, 4), slice(4, 8)], torch.float32)


@pytest.mark.distributed
def test_one_rank_reads_bfloat16_as_fsdp_would_gather_it():
    """Bit for bit, also with recomputation; but the gradients of `vec`, which every block reads, are summed
    in another order, and that in bfloat16."""
    (want,) = run_ranks(1, mixed, True)
    for remat in ("none", "full"):
        got = mixed(False, remat)
        for name, gradient in want[0].items():
            feeds_vec = name.startswith(("time_in", "vector_in", "guidance_in"))
            error = (got[0][name] - gradient).abs().max() / gradient.abs().max()
            assert error <= (0.02 if feeds_vec else 0.0), (name, error)


def test_what_is_stored_stays_wide():
    model = build(1, dtype=torch.float32, param_dtype=torch.bfloat16)
    assert model.img_in.weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in model.state_dict().values()} == {torch.float32}
    assert model.state_dict().keys() == model_class(CONFIG)(CONFIG).state_dict().keys()
    assert isinstance(model.img_in, torch.nn.Linear)


@pytest.mark.parametrize(
    ("family", "remat", "narrow"),
    [
        ("flux1", "selective", False),
        *slow(
            *(("flux1", remat, False) for remat in ("none", "full")),
            *(("flux1", remat, True) for remat in ("none", "full", "selective")),
            ("flux2", "selective", False),
        ),
    ],
)
def test_blocks_of_a_kind_share_one_compiled_graph(monkeypatch, family, remat, narrow):
    """Without that, every block is compiled, and the compiler gives up at its limit."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, backend, fullgraph: compiled(f, backend=counter, fullgraph=fullgraph)
    )
    deep = replace(CONFIGS[family], depth=2, depth_single_blocks=3)
    dtype = torch.float32 if narrow else torch.float64
    options = {"config": deep, "dtype": dtype, "param_dtype": torch.bfloat16 if narrow else None}
    got = gradients(build(1, remat=remat, compile=True, **options), [slice(0, BATCH)], dtype)
    assert counter.frame_count == 2, "one for double, one for single blocks"
    if not narrow:
        assert_same(got, gradients(build(1, **options), [slice(0, BATCH)]), 1e-11)


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"dp_replicate 3 x dp_shard 1 .* = 3 ranks, but the world has 4"):
        build_mesh(Parallelism(data_parallel_replicate_degree=3), 4, "cpu")


def gathered_after_forward() -> list[bool]:
    """Whether a block's weights are still whole after a forward, for each setting."""
    whole = []
    for setting in ("always", "default", "never"):
        model = build(torch.distributed.get_world_size(), reshard=setting)
        model(**arguments(CONFIG, BATCH))
        whole.append(not isinstance(model.double_blocks[0].img_attn.qkv.weight, DTensor))
    return whole


@pytest.mark.distributed
def test_weights_are_freed_after_forward_unless_told_otherwise():
    assert run_ranks(2, gathered_after_forward) == [[False, False, True]] * 2
