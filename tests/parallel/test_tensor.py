"""Tensor parallelism computes what one process does: gradients in float64, bytes against the formula."""

from dataclasses import replace

import pytest
import torch
from helpers.held import part, whole
from helpers.marks import slow
from helpers.ranks import run_ranks
from helpers.small_model import arguments, small, small2
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from flux_trainer.config.compute import ActivationCheckpoint, Compile
from flux_trainer.models.init import Normal
from flux_trainer.models.layers import QKNorm
from flux_trainer.models.registry import model_class
from flux_trainer.optim.guard import clip_grad_norm
from flux_trainer.parallel import tensor
from flux_trainer.parallel.cast import read_as
from flux_trainer.parallel.compile import compile_blocks
from flux_trainer.parallel.fsdp import shard
from flux_trainer.parallel.init import init_weights
from flux_trainer.parallel.remat import apply_checkpointing
from flux_trainer.parallel.tensor import tensor_parallel

CONFIGS = {"flux1": small(mlp_ratio=3.0), "flux2": small2()}
CONFIG = CONFIGS["flux1"]
BATCH, TXT, IMG = 4, 5, 6


def build(
    *,
    tp=1,
    fsdp=1,
    replicate=1,
    family="flux1",
    config=None,
    dtype=torch.float64,
    remat="none",
    compile=False,
    distributions=None,
):
    """A model with random values in every parameter, and the layouts of its tensor-parallel parameters."""
    config = config or CONFIGS[family]
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        model = model_class(config)(config)
    torch.set_default_dtype(torch.float32)
    distributions = distributions or {name: Normal(0.3) for name, _ in model.named_parameters()}
    layouts, blocks = {}, [block for _, block in model.blocks()]
    names = ("dp_replicate", "fsdp", "tp")
    mesh = (
        init_device_mesh("cpu", (replicate, fsdp, tp), mesh_dim_names=names) if tp > 1 or fsdp > 1 else None
    )
    if mesh is not None:
        layouts = tensor_parallel(model.blocks(), mesh["tp"].get_group())
    apply_checkpointing(model.blocks(), ActivationCheckpoint(mode=remat))
    compile_blocks(blocks, Compile(enable=compile, backend="aot_eager"))
    if fsdp > 1:
        shard(model, blocks, mesh["dp_replicate", "fsdp"] if replicate > 1 else mesh["fsdp"])
    model.to_empty(device="cpu")
    init_weights(model, distributions, seed=1, layouts=layouts)
    return model, layouts


def samples(config, rows: slice, dtype=torch.float64) -> dict[str, torch.Tensor]:
    given = arguments(config, BATCH, image=IMG, text=TXT, dtype=dtype)
    return {name: value[rows] for name, value in given.items()}


def backward(model, rows=slice(0, BATCH), dtype=torch.float64) -> None:
    (model(**samples(model.config, rows, dtype)) ** 2).sum().div(BATCH).backward()


def clipped(options: dict, data: int, max_norm: float):
    """The norm before and after clipping, and the first gradient then."""
    model, layouts = build(**options)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share, index = BATCH // data, rank * data // world
    backward(model, slice(index * share, (index + 1) * share))
    copies = options.get("replicate", 1)
    groups = [torch.distributed.new_group(part.tolist()) for part in torch.arange(world).chunk(copies)]
    settings = {"group": groups[rank * copies // world], "layouts": layouts, "tp_rank": rank % options["tp"]}
    parameters = dict(model.named_parameters())
    norms = [clip_grad_norm(parameters, limit, **settings).item() for limit in (max_norm, 0.0)]
    return norms, whole(model.img_in.weight.grad)


def gradients(options: dict, data: int = 1):
    """Gradients of one rank (those of FSDP's shards put together), and the layouts.

    data: number of groups of ranks, one after another, that share the samples out.
    """
    model, layouts = build(**options)
    share = BATCH // data
    index = torch.distributed.get_rank() * data // torch.distributed.get_world_size() if data > 1 else 0
    backward(model, slice(index * share, (index + 1) * share))
    return {name: whole(p.grad) for name, p in model.named_parameters()}, layouts


def errors(result, want: dict[str, torch.Tensor]) -> dict[str, float]:
    got, layouts = result
    assert got.keys() == want.keys()
    return {
        name: ((got[name] - part(value, layouts.get(name))).abs().max() / value.abs().max()).item()
        for name, value in want.items()
    }


@pytest.fixture(scope="module")
def one_process():
    """Its gradients, by family."""
    return {family: gradients({"family": family})[0] for family in CONFIGS}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "options", "data"),
    [
        (2, {"tp": 2}, 1),
        (4, {"tp": 4}, 1),
        (2, {"tp": 2, "remat": "full"}, 1),
        (2, {"tp": 2, "remat": "selective"}, 1),
        (2, {"tp": 2, "remat": "attention", "family": "flux2"}, 1),
        (4, {"tp": 2, "family": "flux2", "fsdp": 2, "remat": "full"}, 2),
        *slow(
            (2, {"tp": 2, "remat": "selective", "compile": True}, 1),
            (2, {"tp": 2, "family": "flux2", "remat": "selective", "compile": True}, 1),
            (4, {"tp": 2, "fsdp": 2}, 2),
            (4, {"tp": 2, "fsdp": 2, "remat": "full"}, 2),
            (4, {"tp": 4, "family": "flux2"}, 1),
            (8, {"tp": 2, "fsdp": 2, "replicate": 2}, 4),
            (8, {"tp": 2, "family": "flux2", "fsdp": 2, "replicate": 2}, 4),
        ),
    ],
    ids=str,
)
def test_gradients_equal_one_process(ranks, options, data, one_process):
    want = one_process[options.get("family", "flux1")]
    for result in run_ranks(ranks, gradients, options, data):
        found = errors(result, want)
        assert max(found.values()) <= 1e-11, max(found.items(), key=lambda item: item[1])
        layouts = result[1]
        assert sum(p.numel() for p in result[0].values()) < 0.8 * sum(p.numel() for p in want.values())
        assert "single_blocks.0.linear1.weight" in layouts


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "options", "data"),
    [
        (2, {"tp": 2}, 1),
        (2, {"tp": 1, "fsdp": 2}, 2),
        (4, {"tp": 2, "fsdp": 2}, 2),
        (8, {"tp": 2, "fsdp": 2, "replicate": 2}, 4),
    ],
    ids=str,
)
def test_each_element_counts_once_in_the_norm(ranks, options, data, one_process):
    want = one_process["flux1"]
    norm = torch.cat([grad.flatten() for grad in want.values()]).norm().item()
    for (before, after), gradient in run_ranks(ranks, clipped, options, data, norm / 3):
        assert before == pytest.approx(norm, rel=1e-11)
        assert after == pytest.approx(norm / 3, rel=1e-5)
        torch.testing.assert_close(gradient, want["img_in.weight"] / 3, rtol=1e-5, atol=0)


def without_the_sum_of_scales() -> tuple:
    tensor._PartialScales.forward = QKNorm.forward
    return gradients({"tp": 2})


@pytest.mark.distributed
def test_qk_scales_need_the_sum_over_ranks(one_process):
    """Without it, their gradients are wrong, and theirs alone: nothing else would notice."""
    found = errors(run_ranks(2, without_the_sum_of_scales)[0], one_process["flux1"])
    wrong = {name for name, error in found.items() if error > 1e-3}
    assert wrong == {name for name in found if name.endswith("_norm.scale")}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "config",
    [replace(CONFIG, qkv_bias=False, guidance_embed=False), small2()],
    ids=lambda config: config.family,
)
def test_names_of_what_is_shared_out(config):
    """The names that are shared out: every matrix of a block, and the biases of column-parallel ones."""
    (layouts,) = {tuple(sorted(found)) for found in run_ranks(2, layout_names, config)}
    model = model_class(config)(config)
    rows = ("proj", "mlp.2", "linear2")
    want = {
        name
        for name, p in model.named_parameters()
        if "_blocks." in name
        and not name.endswith(".scale")
        and not (p.ndim == 1 and name.removesuffix(".bias").endswith(rows))
    }
    assert set(layouts) == want


def layout_names(config) -> list[str]:
    return list(build(tp=2, config=config)[1])


@pytest.mark.distributed
def test_layouts_of_a_rank():
    """Rank 1 of 2: the second half of each of q, k, v and mlp; of attention's and the MLP's columns."""
    for rank, layouts in enumerate(run_ranks(2, layouts_on_a_rank)):
        linear1 = layouts["single_blocks.1.linear1.weight"]
        assert (linear1.shape, linear1.dim) == ((3 * 32 + 96, 32), 0)
        starts = [s + rank * half for s, half in ((0, 16), (32, 16), (64, 16), (96, 48))]
        assert linear1.sections == tuple(zip(starts, (16, 16, 16, 48), strict=True))
        linear2 = layouts["single_blocks.1.linear2.weight"]
        assert (linear2.shape, linear2.dim) == ((32, 32 + 96), 1)
        assert linear2.sections == ((rank * 16, 16), (32 + rank * 48, 48))
        assert layouts["double_blocks.0.img_mod.lin.bias"].sections == ((rank * 96, 96),)


@pytest.mark.distributed
def test_layouts_of_a_rank_with_gated_mlps():
    """Rank 1 of 2: the second half of the gates and of what they let through, whose products meet."""
    for rank, layouts in enumerate(run_ranks(2, layouts_on_a_rank, "flux2")):
        linear1 = layouts["single_blocks.1.linear1.weight"].sections
        assert linear1[3:] == ((96 + rank * 48, 48), (192 + rank * 48, 48))
        assert layouts["single_blocks.1.linear2.weight"].sections == ((rank * 16, 16), (32 + rank * 48, 48))
        assert layouts["double_blocks.0.txt_mlp.0.weight"].sections == (
            (rank * 48, 48),
            (96 + rank * 48, 48),
        )


def layouts_on_a_rank(family="flux1"):
    return build(tp=2, family=family)[1]


def weights(options: dict):
    model, layouts = build(dtype=torch.float32, **options)
    return {name: whole(p) for name, p in model.named_parameters()}, layouts


@pytest.mark.distributed
def test_initial_weights_are_those_of_one_process():
    """Bit for bit; `Normal` in every element, and the model's own, whose fused linears have sections."""
    own = model_class(CONFIG)(CONFIG).init_distributions()
    for distributions in (None, own):
        want = weights({"distributions": distributions})[0]
        if distributions is None:
            assert want["single_blocks.0.linear2.weight"].unique().numel() > 4000, "each has its own value"
        for ranks, options in ((2, {"tp": 2}), (4, {"tp": 2, "fsdp": 2}), (3, {"fsdp": 3})):
            for got, layouts in run_ranks(ranks, weights, {**options, "distributions": distributions}):
                assert all(
                    torch.equal(got[name], part(value, layouts.get(name))) for name, value in want.items()
                )


def test_rows_are_filled_some_at_a_time(monkeypatch):
    want = weights({})[0]
    monkeypatch.setattr("flux_trainer.parallel.init.CHUNK", 50)
    assert all(torch.equal(got, want[name]) for name, got in weights({})[0].items())


class Counter(TorchDispatchMode):
    """Elements that pass through collectives, by kind; of an all-gather, those of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.namespace == "_c10d_functional" and "wait" not in str(op):
            self.elements.setdefault(op._opname, []).append(out.numel())
        return out


def counted(family: str, remat: str) -> list[dict[str, list[int]]]:
    """What forward, then backward, communicate."""
    model, _ = build(tp=2, family=family, remat=remat)
    with Counter() as forward:
        loss = (model(**samples(model.config, slice(0, BATCH))) ** 2).sum()
    with Counter() as after:
        loss.backward()
    return [forward.elements, after.elements]


@pytest.mark.distributed
@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_communicated_is_what_the_formula_says(family):
    config = CONFIGS[family]
    h, d, tokens = config.hidden_size, config.head_dim, BATCH * (TXT + IMG)
    double, single = config.depth, config.depth_single_blocks
    reduced = (2 * double + single) * tokens * h
    want = {"all_reduce": reduced}
    small = (2 * double + single) * 2 * d
    if family == "flux1":  # whose blocks have modulations of their own
        want["all_gather_into_tensor"] = (12 * double + 3 * single) * BATCH * h
        small += (2 * double + single) * BATCH * h
    for forward, after in run_ranks(2, counted, family, "none"):
        assert {op: sum(sizes) for op, sizes in forward.items()} == want
        assert {op: sum(sizes) for op, sizes in after.items()} == {"all_reduce": reduced + small}
        assert len(forward["all_reduce"]) == 4 * double + single
    for forward, after in run_ranks(2, counted, family, "full"):
        assert sum(forward["all_reduce"]) == reduced
        assert sum(after["all_reduce"]) == 2 * reduced + small, "the forward again"
    for forward, after in run_ranks(2, counted, family, "selective"):
        assert sum(forward["all_reduce"]) == reduced
        assert {op: sum(sizes) for op, sizes in after.items()} == {"all_reduce": reduced + small}, (
            "all is kept"
        )


def bfloat16(tp: int) -> dict:
    """Weights read as bfloat16, as where there is no FSDP to cast them."""
    model, layouts = build(tp=tp, dtype=torch.float32)
    read_as(model, torch.bfloat16)
    backward(model, dtype=torch.float32)
    return {name: p.grad for name, p in model.named_parameters()}, layouts


@pytest.mark.distributed
def test_narrow_reads_keep_the_roles():
    """`read_as` changes the classes once more: the sums over ranks must still be there."""
    want, _ = bfloat16(1)
    found = errors(run_ranks(2, bfloat16, 2)[0], want)
    assert max(found.values()) < 0.1
    assert max(error for name, error in found.items() if "norm.scale" in name) > 0


def graphs() -> int:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile
    torch.compile = lambda f, backend, fullgraph: compiled(f, backend=counter, fullgraph=fullgraph)
    backward(build(tp=2, compile=True)[0])
    return counter.frame_count


@pytest.mark.slow
@pytest.mark.distributed
def test_blocks_of_a_kind_still_share_one_graph():
    assert run_ranks(2, graphs) == [2, 2]
