"""A pipeline computes what one process does: gradients in float64, losses and predictions."""

import pytest
import torch
import torch.distributed as dist
from helpers.held import whole
from helpers.marks import slow
from helpers.ranks import run_ranks
from helpers.small_model import arguments, small, small2
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from flux_trainer.config.compute import ActivationCheckpoint, Compile, Parallelism
from flux_trainer.models.flops import macs
from flux_trainer.models.init import Normal
from flux_trainer.models.model import FluxModel
from flux_trainer.models.registry import model_class
from flux_trainer.parallel import offload
from flux_trainer.parallel.cast import read_as
from flux_trainer.parallel.compile import compile_blocks
from flux_trainer.parallel.cut import take
from flux_trainer.parallel.fsdp import reshard, shard
from flux_trainer.parallel.init import init_weights
from flux_trainer.parallel.mesh import build_mesh
from flux_trainer.parallel.pipeline import Pipeline
from flux_trainer.parallel.remat import apply_checkpointing
from flux_trainer.parallel.stages import spans
from flux_trainer.runtime.dist import tells_of_lost_peer

CONFIGS = {
    "flux1": small(hidden_size=16, num_heads=2, depth_single_blocks=4),
    "flux2": small2(hidden_size=16, num_heads=2, depth_single_blocks=4),
}
MICRO_BATCHES = 4
SMALL = {"size": 1, "text": 4, "width": 4}  # another shape than the default one of `micro_batches`


def meta_model(family: str = "flux1", dtype=torch.float64) -> FluxModel:
    config = CONFIGS[family]
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        model = model_class(config)(config)
    torch.set_default_dtype(torch.float32)
    return model


def fill(part: torch.nn.Module) -> None:
    """Random values in every parameter: zero gates would hide mistakes."""
    part.to_empty(device="cpu")
    init_weights(part, {name: Normal(0.3) for name, _ in part.named_parameters()}, seed=1)


def micro_batches(
    group: int = 0, size: int = 2, text: int = 5, width: int = 6, family: str = "flux1"
) -> list[dict[str, Tensor]]:
    """The micro-batches of the ranks that work on the same samples."""
    seeds = range(MICRO_BATCHES * group, MICRO_BATCHES * (group + 1))
    return [arguments(CONFIGS[family], size, image=width, text=text, seed=seed) for seed in seeds]


def loss(output: Tensor, number: int) -> Tensor:
    """Another one for each micro-batch."""
    return (output**2).sum() * (number + 1) / 7


def one_process(family: str = "flux1", groups: int = 1, **shape: int) -> dict[str, Tensor]:
    """What the pipeline must reproduce: gradients by name, the sum of the losses, and a prediction."""
    model = meta_model(family)
    fill(model)
    total = 0.0
    for group in range(groups):
        for number, inputs in enumerate(micro_batches(group, family=family, **shape)):
            each = loss(model(**inputs), number)
            each.backward()
            total = total + each.detach()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        prediction = model(**micro_batches(0, family=family, **shape)[1])
    return gradients | {"loss": total, "prediction": prediction}


def pipeline_of(
    parallelism: dict,
    schedule: str,
    remat="none",
    away=False,
    compile=False,
    hold=False,
    dtype=torch.float64,
    family="flux1",
):
    """A pipeline with random weights on this process's mesh, and the mesh."""
    mesh = build_mesh(Parallelism(**parallelism), dist.get_world_size(), "cpu")
    assert mesh.pp is not None
    cost = macs(CONFIGS[family], 6, 5)
    pipeline = Pipeline(
        meta_model(family),
        spans(schedule, mesh.sizes["pp"], cost.blocks, cost.inputs + cost.embedders, cost.head),
        mesh.pp,
        schedule=schedule,
        dtype=dtype,
        hold=hold,
    )
    for part in pipeline.parts:
        blocks = [block for _, block in part.blocks()]
        moves = offload.Offload() if away else None
        apply_checkpointing(part.blocks(), ActivationCheckpoint(mode=remat), moves)
        compile_blocks(blocks, Compile(enable=compile, backend="aot_eager"))
        if moves:
            offload.LARGE = 64
            moves.apply(blocks)
        if mesh.fsdp:
            shard(part, blocks, mesh.fsdp, param_dtype=dtype, reshard_after_forward=not hold)
        elif dtype != torch.float64:
            read_as(part, dtype)
        fill(part)
    return pipeline, mesh


def on_a_rank(cases: list[dict]) -> list[list[dict[str, Tensor]]]:
    """By case and step: this rank's gradients, its share of the loss, and the first group's prediction."""
    results = []
    for case in cases:
        pipeline, mesh = pipeline_of(**case)
        family = case.get("family", "flux1")
        results.append([])
        for shape in shapes_of(case):
            mine = micro_batches(mesh.rank("dp_replicate", "dp_shard"), family=family, **shape)
            result = {"loss": pipeline.forward_backward(mine, loss)}
            for part in pipeline.parts:
                for name, parameter in part.named_parameters():
                    gathered = mesh.fsdp and not isinstance(parameter, DTensor)
                    assert not gathered, f"{name} is still whole after the step"
                    result[name] = whole(parameter.grad)
                    parameter.grad = None
            result["prediction"] = pipeline.predict(micro_batches(0, family=family, **shape)[1])
            for part in pipeline.parts:
                reshard(part)
            results[-1].append(result)
    return results


def shapes_of(case: dict) -> list[dict]:
    """Of the micro-batches of each step; each compiled graph takes seconds."""
    return [{}] if case.get("compile") else [{}, SMALL, {}]


def check(results: list[dict[str, Tensor]], want: dict[str, Tensor], ranks_per_stage: int) -> None:
    """Compare what all ranks have with what one process has."""
    names = [name for rank in results for name in rank]
    assert sorted(names) == sorted(
        [name for name in want if "." in name] * ranks_per_stage + ["loss", "prediction"] * len(results)
    )
    assert sum(rank["loss"].item() for rank in results) == pytest.approx(want["loss"].item(), rel=1e-12)
    for rank in results:
        for name in rank.keys() - {"loss"}:
            error = (rank[name] - want[name]).abs().max() / want[name].abs().max()
            assert error <= 1e-11, (name, error)


TWO = {"pipeline_parallel_degree": 2}
FOUR = {"pipeline_parallel_degree": 4}
FLUX2 = {"family": "flux2"}  # whose shared modulations are the first stage's


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (
            2,
            [
                {"parallelism": TWO, "schedule": "1F1B"},
                {"parallelism": TWO, "schedule": "Interleaved1F1B"},
                {"parallelism": TWO, "schedule": "Interleaved1F1B", "remat": "full"},
                {"parallelism": TWO, "schedule": "1F1B", "remat": "attention", "away": True},
                {"parallelism": TWO, "schedule": "Interleaved1F1B", "away": True},
            ],
        ),
        pytest.param(
            2,
            [{"parallelism": TWO, "schedule": "1F1B", "remat": "full", "compile": True}],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4,
            [
                {"parallelism": FOUR, "schedule": "1F1B"},
                {"parallelism": TWO, "schedule": "1F1B"},
                {"parallelism": TWO, "schedule": "1F1B", "hold": True, "remat": "full"},
                {"parallelism": TWO, "schedule": "Interleaved1F1B", "remat": "full"},
                {"parallelism": TWO, "schedule": "Interleaved1F1B", "hold": True},
                {"parallelism": {**TWO, "data_parallel_replicate_degree": 2}, "schedule": "1F1B"},
            ],
            marks=pytest.mark.slow,
        ),
        (
            4,
            [
                FLUX2 | {"parallelism": FOUR, "schedule": "1F1B"},
                FLUX2 | {"parallelism": TWO, "schedule": "Interleaved1F1B", "hold": True, "remat": "full"},
            ],
        ),
        pytest.param(
            2,
            [FLUX2 | {"parallelism": TWO, "schedule": "1F1B", "remat": "selective", "compile": True}],
            marks=pytest.mark.slow,
        ),
    ],
    ids=("2 ranks", "compiled", "4 ranks", "4 ranks, flux2", "compiled, flux2"),
)
def test_gradients_losses_and_predictions_equal_one_process(ranks, cases):
    results = run_ranks(ranks, on_a_rank, cases, timeout=60)
    family = cases[0].get("family", "flux1")
    want = {
        (groups, str(shape)): one_process(family, groups, **shape)
        for groups in (1, 2)
        for shape in ({}, SMALL)
    }
    for number, case in enumerate(cases):
        groups = ranks // case["parallelism"]["pipeline_parallel_degree"]
        for step, shape in enumerate(shapes_of(case)):
            got = [rank[number][step] for rank in results]
            check(got, want[groups, str(shape)], ranks_per_stage=groups)


def narrow_on_a_rank(parallelism: dict, schedule: str) -> list[Tensor]:
    """This rank's share of the loss, and the prediction, computed in bfloat16."""
    pipeline, _ = pipeline_of(parallelism, schedule, dtype=torch.bfloat16)
    total = pipeline.forward_backward(micro_batches(), loss)
    return [total, pipeline.predict(micro_batches()[1])]


@pytest.mark.distributed
def test_states_travel_in_the_dtype_of_the_computation():
    """No bit of the forward pass changes; with one rank per stage, and with FSDP."""
    model = meta_model()
    fill(model)
    read_as(model, torch.bfloat16)
    with torch.no_grad():
        outputs = [model(**inputs) for inputs in micro_batches()]
    want = sum(loss(output, number).float() for number, output in enumerate(outputs))
    for ranks, schedule in ((2, "Interleaved1F1B"), (4, "1F1B")):
        results = run_ranks(ranks, narrow_on_a_rank, TWO, schedule)
        assert results[-1][0].item() == want.item()
        for _, prediction in results:
            assert prediction.dtype == torch.bfloat16
            assert torch.equal(prediction, outputs[1])


class Traffic(TorchDispatchMode):
    """Counts elements sent to neighbours, and the collectives of FSDP."""

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.gathers, self.reductions = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name == "c10d.send.default":
            self.sent += sum(t.numel() for t in args[0] if t.dtype == torch.float64)
        self.gathers += "allgather" in name
        self.reductions += "reduce_scatter" in name
        return func(*args, **(kwargs or {}))


def traffic_on_a_rank(family: str) -> list[list[int]]:
    counts, given = [], micro_batches(family=family)
    for schedule, hold in (("1F1B", False), ("1F1B", True), ("Interleaved1F1B", False)):
        pipeline, _ = pipeline_of(TWO, schedule, hold=hold, family=family)
        pipeline.forward_backward(given, loss)  # the first step with a shape prepares for it
        with Traffic() as step:
            pipeline.forward_backward(given, loss)
        with Traffic() as prediction:
            pipeline.predict(given[0])
        counts.append([step.sent, step.gathers, step.reductions, prediction.sent])
    return counts


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "vectors"), [*slow(("flux1", 1)), ("flux2", 1 + 6 + 6 + 3)])
def test_traffic_is_what_the_formula_says(family, vectors):
    results = run_ranks(4, traffic_on_a_rank, family)
    state = 2 * (5 + 6 + vectors) * 16  # B (L + v) h
    n, blocks, roots = MICRO_BATCHES, 6, 2  # both stages together
    for number, stages in enumerate((2, 2, 4)):
        per_chain = [[sum(rank[number][i] for rank in results) // 2 for i in (0, 3)]]
        assert per_chain == [[2 * n * (stages - 1) * state, (stages - 1) * state]]
    first, last = (results[rank] for rank in (0, 2))
    # Blocks are gathered for each forward and backward; what lies at the ends stays gathered from its forward
    # to its backward. The first stage has embedders, the last the head.
    both = [[a + b for a, b in zip(first[number], last[number], strict=True)] for number in range(3)]
    assert both[0][1:3] == [n * (2 * blocks + roots), n * (blocks + roots)]
    assert both[1][1:3] == [blocks + roots, blocks + roots], "once in a step"
    assert both[2][1:3] == [n * (2 * blocks + roots), n * (blocks + roots)]


def fail(how: str) -> str | None:
    """An error of this rank's own work; None where there is none."""
    pipeline, _ = pipeline_of(TWO, "1F1B")
    inputs = micro_batches()
    if how == "loss":

        def last(output: Tensor, number: int) -> Tensor:
            raise RuntimeError("this loss is too hard")
    else:
        inputs = [{**each, "guidance": None} for each in inputs]
        last = loss
    try:
        pipeline.forward_backward(inputs, last)
    except Exception as error:
        return "a lost peer" if tells_of_lost_peer(error) else f"{type(error).__name__}: {error}"
    return None


@pytest.mark.distributed
def test_an_error_of_the_model_or_the_loss_is_no_lost_peer():
    """A wrong input is noticed on every rank, for all of them compute the shapes."""
    for message in run_ranks(2, fail, "guidance"):
        assert message.startswith("ValueError: This model has a guidance embedding")
    assert run_ranks(2, fail, "loss", lost={0})[1] == "RuntimeError: this loss is too hard"


EMBEDDERS = {
    "flux1": {"img_in", "time_in", "vector_in", "guidance_in", "txt_in"},
    "flux2": {
        *("img_in", "time_in", "guidance_in", "txt_in", "single_stream_modulation"),
        *("double_stream_modulation_img", "double_stream_modulation_txt"),
    },
}


@pytest.mark.parametrize("family", CONFIGS)
def test_parts_keep_names_and_leave_nothing_out_and_nothing_else_in(family):
    model = meta_model(family)
    cuts = spans("Interleaved1F1B", 2, [1] * 6)
    parts = [take(model, cut, embedders=i == 0, head=i == 3) for i, cut in enumerate(cuts)]
    names = [[name for name, _ in part.named_parameters()] for part in parts]
    together = [name for part in names for name in part]
    assert sorted(together) == sorted(name for name, _ in model.named_parameters())
    assert [name for part in parts for name, _ in part.blocks()] == [name for name, _ in model.blocks()]
    assert {name.split(".")[0] for name in names[0]} == EMBEDDERS[family] | {"double_blocks"}
    assert {name.split(".")[0] for name in names[3]} == {"single_blocks", "final_layer"}
    assert len(list(model.blocks())) == 6, "the model itself is left alone"
